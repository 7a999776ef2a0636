"""Schema of `transformerlm-train`."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from config.schemas import (
    Count,
    Device,
    Duration,
    FilePath,
    ModelConfig,
    OptimizerConfig,
    PositiveInt,
    Precision,
    Prompt,
    SamplingConfig,
    ScheduleConfig,
    Section,
    TrainLoggingConfig,
    WandbConfig,
    WeightNames,
)

PLAN_KEYS = {"calibration_steps", "machine"}


class DataConfig(Section):
    """Files made by transformerlm-make-data, and the tokenizer that encoded them."""

    train: FilePath = Field(description="token file to train on (.npy), or a folder of them (.shards)")
    valid: FilePath | None = Field(None, description="the same for the validation loss; none: no validation")
    order: Literal["draw", "epoch"] = Field(
        "draw",
        description="draw: each window of context_length begins anywhere, by chance; epoch: the file is cut into "
        "windows, and each comes once before any comes again",
    )
    packing: Literal["windows", "documents"] = Field(
        "windows",
        description="windows: rows of context_length are cut from the stream of ids; documents: each row is whole "
        'documents, packed by best fit, and order = "epoch"; only one longer than a row is cut',
    )
    tokenizer: FilePath = Field(description="directory of the tokenizer; copied into every checkpoint")

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.packing == "documents" and self.order != "epoch":
            raise ValueError(f'packing = "documents" needs order = "epoch", found order = "{self.order}"')
        return self


class TrainingConfig(Section):
    """The loop: how many steps, how large, where, and how precise."""

    max_steps: PositiveInt = Field(description="optimizer steps")
    batch_size: PositiveInt = Field(description="sequences per step, over all micro-batches and processes")
    micro_batch_size: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="sequences per forward pass and process; auto: the most that fit into memory, chosen at the first "
        "start and kept; none: the whole batch at once",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the initial weights and of the data order")
    device: Device = "auto"
    precision: Precision = Field(
        "auto", description="fp32, or bf16 autocast over fp32 weights; auto: bf16 if the hardware has it"
    )
    tf32: bool = Field(False, description="CUDA: let products of fp32 matrices use TF32; no effect elsewhere")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the model: slower to start, faster to run; auto: from 1,000 steps on CUDA",
    )
    max_time: Duration | None = Field(
        None,
        description='time for the whole run, over all its starts, e.g. "2m"; if time runs out before the steps do, the '
        "schedule follows the time, and the run saves and stops; none: run to max_steps",
    )
    log_interval: PositiveInt = Field(1, description="steps between log lines")
    log_norms: bool = Field(False, description="also log the L2 norms of each block's weights and activations")
    eval_interval: Count = Field(
        100, description="steps between validations, besides those before a checkpoint; 0: those only"
    )
    eval_tokens: PositiveInt = Field(
        2**16,
        description="tokens of a validation, from the file's start, in windows of context_length (eval_batches of "
        "earlier versions still counts batches of micro_batch_size windows)",
    )
    early_stop_patience: Count = Field(
        0,
        description="stop after this many validations at eval_interval in a row without a new lowest loss; 0: never",
    )
    early_stop_min_delta: float = Field(
        0.0,
        ge=0,
        le=1e3,
        description="a loss is a new lowest one for early_stop_patience if it is lower by more than this, in nats",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        le=1e3,
        description="weight of log(Z)^2 in the minimised loss, as in PaLM (1e-4 there); logged losses exclude it",
    )
    max_skipped_steps: Count = Field(
        10,
        description="steps in a row that may be skipped because of their loss or gradient, and rollbacks to one "
        "checkpoint; one more stops the run",
    )
    spike_guard: Literal["off", "skip", "rollback"] = Field(
        "off",
        description="what to do with a step whose loss jumps: nothing, skip it, or go back to the last checkpoint and "
        "continue with later data",
    )
    spike_factor: float = Field(
        2.0,
        gt=1,
        le=1e6,
        description="a loss has jumped if it is above this many times the average of about the last 50",
    )

    @model_validator(mode="after")
    def _check_early_stop(self) -> Self:
        if self.early_stop_patience and not self.eval_interval:
            raise ValueError(f"early_stop_patience = {self.early_stop_patience} needs eval_interval >= 1, found 0")
        if self.early_stop_min_delta and not self.early_stop_patience:
            raise ValueError(
                f"early_stop_min_delta = {self.early_stop_min_delta} does nothing: early_stop_patience is 0"
            )
        return self


class CheckpointConfig(Section):
    """When to save and what to keep; a checkpoint is also saved at the end and on a signal to stop."""

    interval: Count = Field(500, description="steps between checkpoints; 0: save only at the end")
    keep: int = Field(2, ge=2, le=10**6, description="newest checkpoints to keep, besides the best")
    max_file_mb: int = Field(
        4096,
        ge=1,
        le=10**6,
        description="weights, or optimizer state, of more megabytes than this are split into files of this size at "
        "most and an index; processes write them side by side",
    )
    resume: Literal["auto", "never", "required"] = Field(
        "auto",
        description="auto: continue if the run has a checkpoint; never: refuse if it has; required: refuse if not",
    )
    init_from: FilePath | None = Field(
        None,
        description="start a new run with the weights of this run, RUN/best or checkpoint; it needs the same "
        "architecture, but for the context, and the same tokenizer; none: random weights",
    )


class LoRAConfig(Section):
    """Small matrices A and B that are trained beside frozen ones: W + alpha / rank B A (Hu et al. 2021)."""

    rank: int = Field(8, ge=1, le=2**16, description="rows of A and columns of B: the most that an update can do")
    alpha: float = Field(16.0, gt=0, le=1e6, description="the update is multiplied by alpha / rank")
    targets: WeightNames = Field(
        ["layers.*"], min_length=1, description="matrices of the blocks that get A and B: attn, w1, layers.0 and so on"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of each number that A reads to be dropped")
    train: WeightNames = Field(
        [],
        description="weights that are trained as they are, besides A and B, such as token_embeddings; all others are "
        "frozen",
    )


class FineTuningConfig(Section):
    """Which weights a run trains; without these keys, all of them.

    A name may have * for any text and ? for one character, and a layer's name stands for all weights in it.
    """

    freeze: WeightNames = Field([], description="weights that stay as they are, such as token_embeddings or layers.0")
    lora: LoRAConfig | None = None

    @model_validator(mode="after")
    def _check_freeze(self) -> Self:
        if self.lora is not None and self.freeze:
            raise ValueError(
                "freeze is not for LoRA, which trains its matrices and lora.train alone, "
                f"found freeze = {self.freeze}; remove freeze"
            )
        return self


class ParallelConfig(Section):
    """Several processes that train one model, started by torchrun or srun; nothing here matters to one process."""

    shard: PositiveInt | Literal["auto", "node", "all"] = Field(
        "auto",
        description="processes that share one copy of weights, gradients and optimizer: a number that divides the "
        "processes, those of a machine (node), or all; auto: 1 where that fits, else the fewest whole machines",
    )
    timeout: Duration = Field(
        "10m", description="a start, or a wait for another process, that takes longer ends the run and names it"
    )


class SamplesSamplingConfig(SamplingConfig):
    """How the text of a sample is generated."""

    max_new_tokens: int = Field(64, ge=1, le=2**31 - 1, description="most tokens to generate")


class SamplesConfig(Section):
    """Text to generate while training, to see how the model gets on."""

    interval: Count = Field(0, description="steps between samples; 0: none")
    prompts: list[Prompt] = Field([""], min_length=1, max_length=100, description='prompts; "" starts a new document')
    allow_special: bool = Field(False, description="read special tokens spelled out in a prompt as tokens, not as text")
    sampling: SamplesSamplingConfig = SamplesSamplingConfig()


def _table(tree: Any, name: str) -> dict[str, Any]:
    section = tree.get(name) if isinstance(tree, dict) else None
    return section if isinstance(section, dict) else {}


class TrainConfig(Section):
    """Train a Transformer language model. The same command starts and resumes."""

    runs_dir: FilePath = Field("runs", validate_default=True, description="the run's files go to runs_dir/run_name")
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fine_tuning: FineTuningConfig = FineTuningConfig()
    parallel: ParallelConfig = ParallelConfig()
    samples: SamplesConfig = SamplesConfig()
    logging: TrainLoggingConfig = TrainLoggingConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="before")
    @classmethod
    def _read_eval_batches(cls, tree: Any) -> Any:
        """Read the `eval_batches` of earlier versions as the `eval_tokens` that it stood for.

        It counted batches of `micro_batch_size` windows. With "auto" their size is unknown, and the default applies.
        """
        training, model = (dict(_table(tree, name)) for name in ("training", "model"))
        if "eval_batches" not in training:
            return tree
        if "eval_tokens" in training:  # that of one source, and this of another
            del training["eval_batches"]
            warnings.warn("training.eval_batches is of earlier versions: training.eval_tokens counts", stacklevel=2)
            return {**tree, "training": training}
        sizes = [training.get("micro_batch_size") or training.get("batch_size"), model.get("context_length")]
        factors = [training["eval_batches"], *sizes]
        if sizes[0] == "auto" and type(factors[0]) is int:
            del training["eval_batches"]
        elif all(type(factor) is int and factor > 0 for factor in factors):
            del training["eval_batches"]
            training["eval_tokens"] = math.prod(factors)
        return {**tree, "training": training}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_plan(cls, tree: Any) -> Any:
        """Accept a file for transformerlm-plan, whose schema has two keys more, without those keys."""
        if cls is not TrainConfig or not isinstance(tree, dict) or not (keys := PLAN_KEYS & tree.keys()):
            return tree
        warnings.warn(f"training leaves {', '.join(sorted(keys))} to transformerlm-plan", stacklevel=2)
        return {name: value for name, value in tree.items() if name not in keys}

    @model_validator(mode="after")
    def _check_early_stop(self) -> Self:
        if self.training.early_stop_patience and self.data.valid is None:
            patience = self.training.early_stop_patience
            raise ValueError(f"training.early_stop_patience = {patience} needs a token file in data.valid, found none")
        return self

    @model_validator(mode="after")
    def _check_fine_tuning(self) -> Self:
        if self.fine_tuning.lora is not None and self.checkpoint.init_from is None:
            raise ValueError(
                "fine_tuning.lora needs trained weights: expected a run in checkpoint.init_from, found none"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        steps, schedule, peak = self.training.max_steps, self.schedule, self.optimizer.learning_rate
        in_steps = schedule.in_steps(steps)
        planned = in_steps["warmup_steps"] + in_steps["decay_steps"]
        problems = []
        if planned > steps:
            parts = "schedule.warmup_steps" + (" + schedule.decay_steps" if schedule.decay_steps else "")
            problems.append(
                f"{parts} ({planned}) exceeds training.max_steps ({steps}); lower it, or give a share of the run, "
                'such as schedule.warmup_steps = "5%"'
            )
        if schedule.min_learning_rate > peak:
            problems.append(
                f"schedule.min_learning_rate ({schedule.min_learning_rate}) exceeds optimizer.learning_rate ({peak})"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
