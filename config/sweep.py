"""Schema of `transformerlm-sweep`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from config.keys import Key, describe_value, iter_keys
from config.layers import options_layer
from config.schemas import FilePath, PositiveInt, Section
from config.suggest import hint
from config.train import TrainConfig

_OURS = {
    "runs_dir": "a run's directory is in dir",
    "logging.run_name": "runs are named after their settings",
    "training.seed": "seeds names the seeds",
    "checkpoint.resume": "a sweep always resumes its runs",
}
# With match = "seconds" the time ends a run, and the schedule follows it; no run makes this many steps.
ENDLESS_STEPS = 10**9

Value = bool | int | float | Annotated[str, Field(min_length=1, max_length=1000)]
Setting = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_.]{1,200} ?= ?[^\x00]{1,1000}$",
        json_schema_extra={"takes": 'a setting such as "model.ffn=silu"'},
    ),
]
"""One setting of transformerlm-train, as on its command line but without the dashes."""
VariantName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,39}$",
        json_schema_extra={"takes": "a name of at most 40 letters, digits and . _ + -"},
    ),
]


@cache
def train_keys() -> Mapping[str, Key]:
    """Return the keys of transformerlm-train by name."""
    return {key.name: key for key in iter_keys(TrainConfig)}


def as_text(value: Value) -> str:
    """Return a value as one writes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def parsed_setting(setting: Setting) -> tuple[str, str]:
    """Return the key and the value of "key=value"."""
    key, _, value = setting.partition("=")
    return key.strip(), value.strip()


def overrides_of(settings: Mapping[str, str]) -> dict[str, str | list[str]]:
    """Return settings as `config.layers.options_layer` takes them from the command line."""
    return {key: [text] if train_keys()[key].is_list else text for key, text in settings.items()}


def setting_problem(key: str, text: str) -> str | None:
    """Say what is wrong with one setting of transformerlm-train by itself; None if nothing is."""
    if key in _OURS:
        return f"{key} cannot be varied: {_OURS[key]}"
    if key not in train_keys():
        return f"{key} is not a key of transformerlm-train{hint(key, list(train_keys()), sections=False)}"
    layer = options_layer(TrainConfig, overrides_of({key: text}))
    try:
        TrainConfig.model_validate(layer.tree)
    except ValidationError as error:
        parts = tuple(key.split("."))
        for item in error.errors(include_url=False):
            if item["loc"][: len(parts)] == parts and item["type"] != "missing":
                reason = item.get("ctx", {}).get("error")
                if reason is not None:
                    return f"{key}: {reason}"
                found = layer.find(parts)
                return f"{key}: expected {train_keys()[key].takes}, found {describe_value(found)}"
    return None


def _refuse(problems: Iterator[str | None]) -> None:
    if found := list(dict.fromkeys(problem for problem in problems if problem)):
        raise ValueError("; ".join(found[:3]) + (f"; and {len(found) - 3:,} more" if len(found) > 3 else ""))


class AxisConfig(Section):
    """One thing that is varied: a key of transformerlm-train, and its values or the range that they are from."""

    key: str = Field(
        min_length=1,
        max_length=500,
        description="key of transformerlm-train; several that change together with commas between them: "
        '"model.d_model, model.num_heads"',
    )
    values: list[Value] = Field(
        [],
        max_length=1000,
        description='values, as in its TOML file; for several keys texts such as "256, 8"; none: from low to high',
    )
    low: float | None = Field(None, description="lowest value of a range")
    high: float | None = Field(None, description="highest value of a range")
    scale: Literal["linear", "log"] = Field("linear", description="how values are spread over the range")
    points: int | None = Field(None, ge=2, le=1000, description='method = "grid": number of values from low to high')

    @property
    def keys(self) -> list[str]:
        """The keys that change together, mostly one."""
        return [one.strip() for one in self.key.split(",")]

    @property
    def is_integer(self) -> bool:
        """Whether the values of the range are integers, because the key takes integers."""
        return train_keys()[self.key].expected.startswith("an integer")

    def settings(self) -> list[dict[str, str]]:
        """Return what each value sets: keys and texts."""
        rows = [_cells(as_text(value), len(self.keys)) for value in self.values]
        return [dict(zip(self.keys, row, strict=True)) for row in rows]

    @field_validator("key")
    @classmethod
    def _check_key(cls, key: str) -> str:
        names = [one.strip() for one in key.split(",")]
        unknown = (setting_problem(name, "") for name in names if name in _OURS or name not in train_keys())
        twice = (f"{name} is there twice" for name, times in Counter(names).items() if times > 1)
        _refuse(iter([*unknown, *twice]))
        return key

    @field_validator("values")
    @classmethod
    def _check_values(cls, values: list[Value], info: Any) -> list[Value]:
        if "key" not in info.data:
            return values
        keys = [one.strip() for one in info.data["key"].split(",")]
        rows = [_cells(as_text(value), len(keys)) for value in values]
        short = next((value for value, row in zip(values, rows, strict=True) if len(row) != len(keys)), None)
        if short is not None:
            raise ValueError(f"expected {len(keys)} values with commas between them, found {describe_value(short)}")
        _refuse(setting_problem(key, text) for row in rows for key, text in zip(keys, row, strict=True))
        if len({tuple(row) for row in rows}) < len(rows):
            raise ValueError("expected each value once, found one twice")
        return values

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        ends = (self.low, self.high)
        if self.values and (ends != (None, None) or self.points or self.scale != "linear"):
            raise ValueError("low, high, scale and points are for a range, found values beside them")
        if self.values:
            return self
        if self.low is None or self.high is None:
            raise ValueError("values: expected some, or low and high, found none")
        if self.low >= self.high:
            raise ValueError(f"low: expected less than high, found {self.low:g} and {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f'low: expected a number > 0 with scale = "log", found {self.low:g}')
        if len(self.keys) > 1:
            raise ValueError("low and high are for one key, found several; give values")
        if not train_keys()[self.key].expected.startswith(("an integer", "a number")):
            raise ValueError(f"low and high are for numbers, and {self.key} takes {train_keys()[self.key].takes}")
        if self.is_integer and any(end != int(end) for end in (self.low, self.high)):
            raise ValueError(f"low, high: expected integers for {self.key}, found {self.low:g} and {self.high:g}")
        texts = [str(int(end)) if self.is_integer else repr(end) for end in (self.low, self.high)]
        _refuse(setting_problem(self.key, text) for text in texts)
        return self


def _cells(text: str, number: int) -> list[str]:
    return [part.strip() for part in text.split(",")] if number > 1 else [text]


class VariantConfig(Section):
    """One of several named sets of settings."""

    name: VariantName = Field(description="name, which is in the names of the runs")
    set: list[Setting] = Field([], max_length=100, description="settings of transformerlm-train; none: those of base")

    @field_validator("set")
    @classmethod
    def _check_settings(cls, settings: list[Setting]) -> list[Setting]:
        return _checked_settings(settings)


def _checked_settings(settings: list[Setting]) -> list[Setting]:
    pairs = [parsed_setting(setting) for setting in settings]
    twice = (f"{key} is set twice" for key, times in Counter(key for key, _ in pairs).items() if times > 1)
    _refuse(iter([*(setting_problem(*pair) for pair in pairs), *twice]))
    return settings


class HalvingConfig(Section):
    """Successive halving: at each rung, the settings with the lowest validation losses go on, and the others stop."""

    rungs: list[PositiveInt] = Field(
        min_length=1, max_length=20, description="steps at which losses are compared, ascending; each has a validation"
    )
    factor: int = Field(2, ge=2, le=1000, description="of this many settings, one goes on")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.rungs != sorted(set(self.rungs)):
            raise ValueError(f"rungs: expected ascending steps, found {self.rungs}")
        return self


class RecordsConfig(Section):
    """What is written to stdout; stderr has the words for people."""

    format: Literal["auto", "json", "text"] = Field(
        "auto", description="json: JSON lines; text: none of them; auto: none on a terminal, elsewhere json"
    )


class SweepConfig(Section):
    """Train many models that differ in some settings, and compare them; the same command goes on after a stop."""

    base: FilePath = Field(description="TOML file of transformerlm-train, or the name of a shipped one, such as train")
    dir: FilePath = Field("runs/sweep", validate_default=True, description="directory of the runs and of the result")
    set: list[Setting] = Field([], max_length=100, description="settings of transformerlm-train for all runs")
    method: Literal["grid", "random", "tpe"] = Field(
        "grid",
        description="grid: every combination; random: some of them by chance; tpe: guided search by optuna (extra "
        "sweep)",
    )
    trials: int | None = Field(None, ge=1, le=100_000, description="random, tpe: number of settings to try")
    search_seed: int = Field(0, ge=0, le=2**32 - 1, description="random, tpe: seed of the choice")
    seeds: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] = Field(
        [0], min_length=1, max_length=1000, description="seeds that each setting is trained with (training.seed)"
    )
    match: Literal["steps", "tokens", "flops", "seconds"] | None = Field(
        None,
        description="what all runs spend equally: max_steps follows from it (seconds: max_time); none: as base says",
    )
    budget: float | None = Field(None, gt=0, le=1e30, description="how much of it each run spends")
    parallel: int = Field(1, ge=1, le=1024, description="runs at the same time, which share the cores equally")
    retries: int = Field(
        1, ge=0, le=1000, description="times that a crashed run is started again, if it gets no further than before"
    )
    axes: list[AxisConfig] = Field([], max_length=20, description="what is varied")
    variants: list[VariantConfig] = Field(
        [], max_length=1000, description="named sets of settings, each combined with every point of the axes"
    )
    halving: HalvingConfig | None = None
    output: RecordsConfig = RecordsConfig()
    dry_run: bool = Field(
        False, description="say what would run and how long it takes, only", json_schema_extra={"short": "dry-run"}
    )
    print_commands: bool = Field(
        False,
        description="write the runs' TOML files and print one command line for each, which another scheduler may run",
        json_schema_extra={"short": "print-commands"},
    )

    @field_validator("set")
    @classmethod
    def _check_settings(cls, settings: list[Setting]) -> list[Setting]:
        return _checked_settings(settings)

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        problems = []
        if self.method == "grid" and self.trials is not None:
            problems.append('trials does nothing with method = "grid", which takes every combination')
        if self.method != "grid" and self.trials is None:
            problems.append(f'method = "{self.method}" needs trials, found none')
        if self.method != "grid" and not self.axes:
            problems.append(f'method = "{self.method}" needs axes, found none')
        if self.method == "tpe" and self.halving:
            problems.append('halving does nothing with method = "tpe"')
        if self.print_commands and (self.method == "tpe" or self.halving):
            found = "halving" if self.halving else 'method = "tpe"'
            problems.append(f"print_commands is not for {found}, which needs the results of the runs before")
        for axis in self.axes:
            if axis.low is not None and (self.method == "grid") != (axis.points is not None):
                needs = "needs points for a range" if self.method == "grid" else "takes a range without points"
                problems.append(f'method = "{self.method}" {needs}, found axes with key = "{axis.key}"')
        if len(set(self.seeds)) < len(self.seeds):
            problems.append("seeds: expected each seed once, found one twice")
        if self.dry_run and self.print_commands:
            problems.append("expected dry_run or print_commands, found both")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        names = Counter(variant.name for variant in self.variants)
        problems = [f"variants: the name {name} is there twice" for name, times in names.items() if times > 1]
        groups = [[parsed_setting(one)[0] for one in self.set]]
        groups += [axis.keys for axis in self.axes]
        groups.append(sorted({parsed_setting(one)[0] for variant in self.variants for one in variant.set}))
        if self.match:
            groups.append(["training.max_steps", *(["training.max_time"] if self.match == "seconds" else [])])
        times = Counter(key for group in groups for key in group)
        where = "set, axes, variants and match"
        problems += [f"{key}: expected in one of {where}, found in several" for key in times if times[key] > 1]
        if (self.match is None) != (self.budget is None):
            problems.append(f"match and budget go together, found match = {self.match}, budget = {self.budget}")
        if self.halving and self.match not in (None, "steps"):
            problems.append(f'halving compares at equal steps, found match = "{self.match}"')
        if problems:
            raise ValueError("; ".join(problems))
        return self
