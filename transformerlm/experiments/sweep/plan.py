"""Which runs a sweep has: each point and seed as a checked configuration with a name that says what it is.

Everything is resolved and checked before the first run begins. The name ends in a hash of all settings that can change
the losses, and the seed. Points with the same hash are one run, under the name of the first, or the one that it has in
the sweep's directory already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from config.errors import MAX_ERRORS, ConfigError
from config.io import dump_toml, load_config, read_layers, validate
from config.layers import Layer, options_layer
from config.sweep import ENDLESS_STEPS, SweepConfig, overrides_of, parsed_setting
from config.train import TrainConfig
from transformerlm.experiments.metric_lines import METRICS, first_records
from transformerlm.experiments.sweep.points import Axis, Point, edges, points_with
from transformerlm.token_files.sidecar import sidecar_path
from transformerlm.utils.files import file_sha256
from transformerlm.utils.json_files import read_json_object

# They say where a run is and what is written of it; no loss depends on them.
_IDLE_SECTIONS = ("logging", "wandb", "samples", "parallel")
_IDLE_KEYS = {
    "training": ("log_interval", "log_norms", "seed"),  # the seed is in the name by itself
    "checkpoint": ("keep", "max_file_mb", "resume"),
}
_OF_THE_TEXT = ("sources", "settings_sha256", "sidecar_sha256")
# What the event `environment` of a run says of its data and tokenizer, by the keys of [data].
_RECORDED = {"train": "data.train.sha256", "valid": "data.valid.sha256", "tokenizer": "tokenizer_sha256"}
_CONTENT = "# content of data and tokenizer: "
_TOKEN_FILES = (".npy", ".shards")
_MOST_BYTES = 1 << 28  # of a description
_HASH_DIGITS = 10
_MOST_NAME_CHARS = 80
_GROUP = re.compile(rf"(?P<group>.+-(?P<key>[0-9a-f]{{{_HASH_DIGITS}}}))-\d+")  # a run's name without its seed

Price = Callable[[TrainConfig], int]
"""Returns the FLOPs of a token; it needs the model, so that a command hands it in."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One training of a sweep.

    `group` names the settings without the seed, and `name` is the run's directory. `content` is a hash of what tells
    its data and tokenizer from others.
    """

    name: str
    group: str
    point: Point
    seed: int
    config: TrainConfig
    content: str
    price: Price = field(repr=False, compare=False)

    @property
    def toml(self) -> str:
        """The file with which the run is trained; its first line keeps the content."""
        return f"{_CONTENT}{self.content}\n{dump_toml(self.config)}"

    @property
    def flops_per_token(self) -> int:
        """The FLOPs of forward and backward pass of a token; the price is asked for them only now."""
        return self.price(self.config)

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step."""
        return self.config.training.batch_size * self.config.model.context_length

    @property
    def flops(self) -> int:
        """The FLOPs of the whole run; those of a run that time ends are not known."""
        return self.config.training.max_steps * self.tokens_per_step * self.flops_per_token


class Planner:
    """Makes runs of points, all from one base file.

    Raises:
        ConfigError: the base file, with the sweep's own settings, is not a configuration of transformerlm-train.
    """

    def __init__(self, config: SweepConfig, base: Path, price: Price) -> None:
        self._config, self._price = config, price
        self._layers = read_layers(TrainConfig, [base], {})[:-1]
        self._own = dict(map(parsed_setting, config.set))
        self._content, self._sum = cache(content_of), cache(recorded_sum)  # of a path
        self._groups = self._groups_in(config.dir)  # by the hash
        self._resolved({})

    def runs(self, points: Iterable[Point]) -> list[SweepRun]:
        """Return the runs of all points and seeds, each configuration once.

        Raises:
            ConfigError: some are not valid; there is a line for each problem.
        """
        runs: dict[str, SweepRun] = {}
        lines: list[str] = []
        for point in points:
            try:
                for run in self._runs_of(point):
                    runs.setdefault(run.name, run)
            except ConfigError as error:
                lines += [f"{_in_words(point)}: {line}" for line in error.lines]
            if len(lines) >= MAX_ERRORS:
                break
        if lines:
            raise ConfigError(list(dict.fromkeys(lines))[:MAX_ERRORS])
        return list(runs.values())

    def edge_runs(self, axes: Sequence[Axis]) -> list[SweepRun]:
        """Return runs that show that each option, and each end of a range, is valid with some options of the others.

        Raises:
            ConfigError: some are not; there is a line for each problem.
        """
        runs: dict[str, SweepRun] = {}
        lines: list[str] = []
        for place, option in edges(axes):
            found, problems = self._first_valid(points_with(axes, place, option))
            runs |= {run.name: run for run in found}
            lines += problems
            if not runs or len(lines) >= MAX_ERRORS:  # what is wrong with every point is said once
                break
        if lines:
            raise ConfigError(list(dict.fromkeys(lines))[:MAX_ERRORS])
        return list(runs.values())

    def _first_valid(self, points: Iterable[Point]) -> tuple[list[SweepRun], list[str]]:
        """Return the runs of the first valid point; without one, none, and what is wrong with the first point."""
        problems: list[str] = []
        for point in points:
            try:
                return self.runs([point]), []
            except ConfigError as error:
                problems = problems or error.lines
        return [], problems

    def _runs_of(self, point: Point) -> list[SweepRun]:
        config = self._matched(point.settings)
        self._check_comparable(config)
        key, content = self._hash(config), _digest(self._contents(config))
        group = self._groups.setdefault(key, f"{_label(point)}{key}")
        return [
            SweepRun(
                name=f"{group}-{seed}",
                group=group,
                point=point,
                seed=seed,
                config=_placed(config, self._config.dir, f"{group}-{seed}", seed),
                content=content,
                price=self._price,
            )
            for seed in self._config.seeds
        ]

    def _resolved(self, settings: Mapping[str, str], *layers: Layer) -> TrainConfig:
        options = options_layer(TrainConfig, overrides_of({**self._own, **settings}))
        return validate(TrainConfig, [*self._layers, options, *layers])

    def _matched(self, settings: Mapping[str, str]) -> TrainConfig:
        """Return the configuration of a point with its share of compute."""
        config = self._resolved(settings)
        if self._config.match is None:
            return config
        changes = _spending(config, self._config, self._price)
        return self._resolved(settings, Layer("match", {"training": changes}))

    def _check_comparable(self, config: TrainConfig) -> None:
        problems = []
        if config.data.valid is None:
            problems.append("data.valid: expected a token file, whose loss a sweep compares, found none")
        if self._config.match:
            problems += early_ends(config, is_timed=self._config.match == "seconds")
        rungs = self._config.halving.rungs if self._config.halving else []
        interval, last = config.training.eval_interval, config.training.max_steps
        problems += [
            f"halving.rungs: expected multiples of training.eval_interval ({interval}) below training.max_steps "
            f"({last}), found {rung}"
            for rung in rungs
            if not interval or rung % interval or rung >= last
        ]
        if problems:
            raise ConfigError(problems)

    def _hash(self, config: TrainConfig) -> str:
        """Return the hash of all settings that can change a loss, the seed excepted; data counts by its content."""
        tree: dict[str, Any] = config.model_dump(mode="json", exclude={"runs_dir", *_IDLE_SECTIONS})
        for section, keys in _IDLE_KEYS.items():
            for key in keys:
                del tree[section][key]
        tree["data"] |= self._contents(config)
        return _digest(tree)[:_HASH_DIGITS]

    def _contents(self, config: TrainConfig) -> dict[str, str]:
        """Return what tells the data and the tokenizer of a configuration from others, by the keys of [data]."""
        files = {name: getattr(config.data, name) for name in _RECORDED}
        return {name: self._content(path) for name, path in files.items() if path is not None}

    def _groups_in(self, directory: Path) -> dict[str, str]:
        """Return the names of the groups that have runs in a sweep's directory, by their hashes.

        A setting that was not there when a run began gives it another hash now; so its configuration is hashed anew.
        Runs of data that were made anew since are left out: they say nothing of the data of now.
        """
        found = (_GROUP.fullmatch(path.name) for path in sorted(directory.iterdir())) if directory.is_dir() else ()
        groups = {match["key"]: match["group"] for match in found if match}
        queued: dict[str, list[Path]] = {}
        for path in directory.glob("queue/*.toml"):
            if match := _GROUP.fullmatch(path.stem):
                queued.setdefault(match["group"], []).append(path)
        for group, paths in sorted(queued.items()):
            with suppress(ConfigError, OSError):
                config = load_config(TrainConfig, paths[0])
                if all(self._is_of_its_data(config, path) for path in paths):
                    groups.setdefault(self._hash(config), group)
        return groups

    def _is_of_its_data(self, config: TrainConfig, queued: Path) -> bool:
        """Return whether the run of a queued file is of the data and the tokenizer that its configuration names now.

        A file of an earlier version does not keep the content; then what the run recorded counts, if it did.
        """
        with queued.open(encoding="utf-8", errors="replace") as file:
            line = file.readline(200)
        if line.startswith(_CONTENT):
            return line.removeprefix(_CONTENT).strip() == _digest(self._contents(config))
        recorded = _environment_of(queued.parents[1] / queued.stem)
        known = {name: recorded[key] for name, key in _RECORDED.items() if key in recorded}
        return all(self._sum(getattr(config.data, name)) == value for name, value in known.items())


def _digest(tree: object) -> str:
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def content_of(path: Path) -> str:
    """Return what tells a token file or a tokenizer from others: a hash of its content, its path if that is not there.

    A token file's own description has the hash of its ids; where the text came from is nothing to a loss.
    """
    try:
        if path.suffix in _TOKEN_FILES:
            facts = read_json_object(_description(path), max_bytes=_MOST_BYTES)
            return json.dumps({key: facts[key] for key in facts if key not in _OF_THE_TEXT}, sort_keys=True)
        files = sorted(one for one in path.iterdir() if one.is_file())
        return ",".join(f"{one.name}:{file_sha256(one)}" for one in files)
    except (OSError, ValueError):  # what opens it later says more
        return str(path.absolute())


def recorded_sum(path: Path | None) -> object:
    """Return the sha256 by which a run records a token file or a tokenizer; None for what cannot be read."""
    from transformerlm.tokenizer.tokenizer import Tokenizer

    with suppress(OSError, ValueError):
        if path is None:
            return None
        if path.suffix in _TOKEN_FILES:
            return read_json_object(_description(path), max_bytes=_MOST_BYTES).get("sha256")
        return Tokenizer.from_directory(path).fingerprint()
    return None


def _description(path: Path) -> Path:
    return path / "index.json" if path.suffix == ".shards" else sidecar_path(path)


def _environment_of(directory: Path) -> Mapping[str, Any]:
    """Return what a run recorded of its surroundings when it began; empty where its lines do not say."""
    with suppress(OSError):
        for record in first_records(directory / METRICS):
            if record.get("event") == "environment":
                return record
    return {}


def _spending(config: TrainConfig, sweep: SweepConfig, price: Price) -> dict[str, Any]:
    """Return the keys of [training] with which a run spends the sweep's budget, to the nearest step."""
    assert sweep.budget is not None
    if sweep.match == "seconds":
        return {"max_time": f"{sweep.budget:.3f}".rstrip("0").rstrip(".") + "s", "max_steps": ENDLESS_STEPS}
    tokens = config.training.batch_size * config.model.context_length
    each = {"steps": 1, "tokens": tokens}.get(sweep.match or "steps") or tokens * price(config)
    steps = round(sweep.budget / each)
    if steps < 1:
        raise ConfigError([f"budget: expected at least one step, {each:.3g} {sweep.match}, found {sweep.budget:.3g}"])
    return {"max_steps": steps}


def early_ends(config: TrainConfig, *, is_timed: bool = False) -> list[str]:
    """Return the settings that can end a run before its last step, each as a problem; the time of a timed run is none.

    Runs that end so do not spend what they were planned to, and their schedules are cut.
    """
    time, patience, problems = config.training.max_time, config.training.early_stop_patience, []
    if time is not None and not is_timed:
        problems.append(
            f'training.max_time: expected none, so that each run makes all of its steps, found "{time}"; '
            'set = ["training.max_time=none"]'
        )
    if patience:
        also = ', "training.early_stop_min_delta=0"' if config.training.early_stop_min_delta else ""
        problems.append(
            f"training.early_stop_patience: expected 0, so that each run goes to its end, found {patience}; "
            f'set = ["training.early_stop_patience=0"{also}]'
        )
    return problems


def _placed(config: TrainConfig, runs_dir: Path, name: str, seed: int) -> TrainConfig:
    """Return the configuration of one seed, in its own directory; it has been checked before."""
    return config.model_copy(
        update={
            "runs_dir": runs_dir,
            "training": config.training.model_copy(update={"seed": seed}),
            "logging": config.logging.model_copy(update={"run_name": name}),
            "checkpoint": config.checkpoint.model_copy(update={"resume": "auto"}),
        }
    )


def _in_words(point: Point) -> str:
    return ", ".join(f"{name} = {label}" for name, label in point.labels.items()) or "base"


def _label(point: Point) -> str:
    """Return a point as the beginning of a directory's name, cut where it is too long: the hash says what it is."""
    parts = [label if name == "variant" else f"{name}={label}" for name, label in point.labels.items()]
    return f"{as_name('-'.join(parts))}-"


def as_name(text: str) -> str:
    """Return a text as the beginning of a run's name: short, and of the characters that a name may have."""
    return re.sub(r"[^A-Za-z0-9._+=@-]", "_", text)[:_MOST_NAME_CHARS].lstrip("._+=@-") or "base"


def group_runs(runs: Sequence[SweepRun]) -> dict[str, list[SweepRun]]:
    """Return the runs by their settings: those of a group differ in the seed alone."""
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups
