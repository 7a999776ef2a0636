"""Schema of `transformerlm-scaling`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from config.schemas import Count, Duration, FilePath, InputName, PositiveInt, Section
from config.sweep import RecordsConfig, Setting, parsed_setting, setting_problem

_OURS = ("model.d_model", "model.num_layers", "model.num_heads", "training.max_steps")
_ABOUT_RUNS = ("sizes", "tokens", "budgets", "holdout", "set")

Flops = Annotated[float, Field(gt=0, le=1e40)]
Number = Annotated[float, Field(gt=0, le=1e20)]


class SizeConfig(Section):
    """The shape of one model; all else is as in base."""

    d_model: int = Field(ge=1, le=2**20, description="width of the residual stream")
    num_layers: int = Field(ge=1, le=4096, description="number of Transformer blocks")
    num_heads: int = Field(ge=1, le=2**16, description="number of query heads; divides d_model, unless d_head is set")
    learning_rate: float | None = Field(None, gt=0, le=1e3, description="peak learning rate for it; none: base's")

    @property
    def settings(self) -> dict[str, str]:
        """The settings of transformerlm-train that make the size."""
        keys = ("d_model", "num_layers", "num_heads")
        found = {f"model.{key}": str(getattr(self, key)) for key in keys}
        return found | ({"optimizer.learning_rate": repr(self.learning_rate)} if self.learning_rate else {})

    @property
    def label(self) -> str:
        """The size as part of a name: d64-l2-h4."""
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        return f"d{self.d_model}-l{self.num_layers}-h{self.num_heads}{rate}"


class HoldoutConfig(SizeConfig):
    """A larger run to foretell: its loss is predicted and written down, then it is made, then the two are compared."""

    tokens: PositiveInt = Field(description="tokens that it is trained on")


class FitConfig(Section):
    """Which law is fitted, and how its intervals are made."""

    law: Literal["auto", "both", "tokens", "parameters"] = Field(
        "auto",
        description="both: E + A/N^alpha + B/D^beta; tokens: E + B/D^beta; parameters: E + A/N^alpha; auto: both, or "
        "the one that the runs can bear",
    )
    parameters: Literal["all", "without_embeddings"] = Field(
        "all",
        description="what N counts: all parameters, or those without embedding and head; the other fit is "
        "reported, too",
    )
    resamples: int = Field(
        1000, ge=0, le=100_000, description="resamples of the runs for the intervals; 0: no intervals"
    )
    resample_seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the resampling")
    drop_highest: Count = Field(0, description="leave out this many runs with the highest losses")


class OptimumConfig(Section):
    """Budgets whose best size is wanted."""

    flops: list[Flops] = Field([], max_length=100, description="budgets in FLOPs")
    time: list[Duration] = Field(
        [], max_length=100, description='budgets in time on the machine that made the runs, such as "2h"'
    )
    tokens: list[PositiveInt] = Field(
        [], max_length=100, description="numbers of tokens, each with the size and the budget that it is best for"
    )


class PredictConfig(Section):
    """A run whose loss is predicted."""

    parameters: Number | None = Field(None, description="its parameters, counted as fit.parameters says")
    tokens: Number | None = Field(None, description="tokens that it is trained on")


class ScalingConfig(Section):
    """Fit a scaling law: train small models of several sizes, and foretell the loss of larger ones and the best size.

    The runs are made from base, or read from runs, or come as points.
    """

    base: FilePath | None = Field(
        None, description="TOML file of transformerlm-train, or the name of a shipped one; none: make no runs"
    )
    dir: FilePath | None = Field(
        None,
        description="directory of the runs and of the result; none: runs/scaling with base, else no files are written",
    )
    set: list[Setting] = Field(
        [], max_length=100, description='settings of transformerlm-train for all runs, such as "data.train=a.npy"'
    )
    tokens: list[PositiveInt] = Field(
        [], max_length=100, description="numbers of tokens: each size is trained on each, in a run of its own"
    )
    budgets: list[Flops] = Field(
        [], max_length=100, description="instead of tokens: FLOPs that each size is trained with"
    )
    seeds: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] = Field(
        [0], min_length=1, max_length=100, description="seeds that each run is made with (training.seed)"
    )
    parallel: int = Field(1, ge=1, le=1024, description="runs at the same time, which share the cores equally")
    retries: int = Field(
        1, ge=0, le=1000, description="times that a crashed run is started again, if it gets no further than before"
    )
    runs: list[InputName] = Field(
        [], max_length=10_000, description="directories of runs that were made before, or globs of them"
    )
    points: FilePath | None = Field(
        None,
        description="CSV file with the columns parameters, loss, and tokens or flops, instead of runs; see "
        "docs/scaling.md",
    )
    sizes: list[SizeConfig] = Field([], max_length=1000, description="sizes of the models")
    holdout: list[HoldoutConfig] = Field([], max_length=100, description="larger runs to foretell")
    fit: FitConfig = FitConfig()
    optimum: OptimumConfig = OptimumConfig()
    predict: PredictConfig = PredictConfig()
    output: RecordsConfig = RecordsConfig()
    dry_run: bool = Field(
        False, description="say what would run and how long it takes, only", json_schema_extra={"short": "dry-run"}
    )

    @field_validator("set")
    @classmethod
    def _check_settings(cls, settings: list[str]) -> list[str]:
        pairs = list(map(parsed_setting, settings))
        problems = [
            f"{key} cannot be set: it follows from sizes, tokens and budgets" for key, _ in pairs if key in _OURS
        ]
        problems += [problem for problem in (setting_problem(*pair) for pair in pairs) if problem]
        times = Counter(key for key, _ in pairs)
        problems += [f"{key} is set twice" for key in times if times[key] > 1]
        if problems:
            raise ValueError("; ".join(problems[:3]))
        return settings

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.points is not None and (self.base or self.runs):
            raise ValueError("expected points, or base and runs, found both")
        if self.points is None and not self.base and not self.runs:
            raise ValueError("expected base (runs to make), runs or points, found none of them")
        if not self.base:
            idle = [name for name in (*_ABOUT_RUNS, "dry_run") if getattr(self, name)]
            if idle:
                raise ValueError(f"{idle[0]} does nothing without base")
            return self
        if not self.sizes or not (self.tokens or self.budgets):
            raise ValueError("base needs sizes, and tokens or budgets")
        if self.tokens and self.budgets:
            raise ValueError("expected tokens or budgets, found both")
        if self.holdout and self.fit.law in ("tokens", "parameters"):
            raise ValueError(f'holdout needs a law of sizes and tokens, found fit.law = "{self.fit.law}"')
        return self

    @model_validator(mode="after")
    def _check_twice(self) -> Self:
        for name in ("tokens", "budgets", "seeds"):
            times = Counter(getattr(self, name))
            if twice := next((one for one in times if times[one] > 1), None):
                raise ValueError(f"{name}: expected each number once, found {twice:g} twice")
        labels = Counter(size.label for size in self.sizes)
        if twice_made := next((label for label in labels if labels[label] > 1), None):
            raise ValueError(f"sizes: expected each size once, found {twice_made} twice")
        return self

    @model_validator(mode="after")
    def _check_prediction(self) -> Self:
        given = {name for name in ("parameters", "tokens") if getattr(self.predict, name) is not None}
        needed = {"parameters", "tokens"} if self.fit.law in ("auto", "both") else {self.fit.law}
        if given and not needed <= given:
            wanted = " and ".join(sorted(needed))
            raise ValueError(f"predict: expected {wanted}, found no {' and '.join(sorted(needed - given))}")
        return self
