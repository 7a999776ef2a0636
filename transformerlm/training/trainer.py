"""The training run: what changes from step to step, and the loop that changes it.

The order of a step is: the next batch, `train_step`, evaluation when it is due, one line to the loggers, hooks, and a
checkpoint when it is due. A batch depends on the seed and the step only, so a run that resumes at step s sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config.io import dump_toml
from config.schemas import duration_seconds
from config.train import TrainConfig
from logger import Logger
from profiling import nvtx
from transformerlm.distributed import World, all_reduce_sum, barrier, broadcast_parameters, is_main
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training import checkpoint
from transformerlm.training.data import TokenDataset, get_batch, sequential_batches
from transformerlm.training.loop import EvalResult, StepResult, evaluate, train_step
from transformerlm.training.loss import cross_entropy
from transformerlm.training.norms import NormRecorder
from transformerlm.training.optim import SGD, AdamW, parameter_groups
from transformerlm.training.schedule import learning_rate
from transformerlm.utils.device import synchronize
from transformerlm.utils.dtypes import Precision, autocast
from transformerlm.utils.seed import rng_state, seed_everything, set_rng_state


@dataclass
class TrainState:
    """What a run remembers besides weights and optimizer; all of it is in a checkpoint's `state.json`."""

    step: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Hook:
    """Something to do every `interval` steps and after the last, given the step and the model: samples, for one."""

    interval: int
    call: Callable[[int, TransformerLM], None]


@dataclass
class Runtime:
    """Where and how a run computes, and whom it tells; `stop` says whether to save and end early."""

    device: torch.device
    precision: Precision
    logger: Logger
    world: World = field(default_factory=World)
    hooks: Sequence[Hook] = ()
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None


class Trainer:
    """Builds a run from its configuration, resumes it where it has checkpoints, and trains it.

    Args:
        config: the checked configuration.
        run_dir: the run's directory, which exists.
        tokenizer: the data's tokenizer, which goes into every checkpoint.
        train_data: the token file to train on.
        valid_data: the token file for validation, or None.
        runtime: device, precision, logger and callbacks.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        run_dir: Path,
        tokenizer: Tokenizer,
        train_data: TokenDataset,
        valid_data: TokenDataset | None,
        runtime: Runtime,
    ) -> None:
        self.config, self.runtime, self.tokenizer = config, runtime, tokenizer
        self.train_data, self.valid_data = train_data, valid_data
        self.checkpoints = run_dir / "checkpoints"
        self.state = TrainState()
        self.wandb_id: str | None = None
        self._saved_step: int | None = None
        seed_everything(config.training.seed)
        self.raw_model = TransformerLM(**config.model.model_dump()).to(runtime.device)
        broadcast_parameters(self.raw_model, runtime.world)
        self.optimizer = build_optimizer(self.raw_model, config)
        self.norms = NormRecorder(self.raw_model) if config.training.log_norms else None
        self.model: nn.Module = torch.compile(self.raw_model) if config.training.compile else self.raw_model  # type: ignore[assignment]
        self.autocast = partial(autocast, runtime.device, runtime.precision)
        self._token_bytes = token_bytes(tokenizer, config.model.vocab_size, runtime.device)

    def train(self) -> TrainState:
        """Train to `max_steps`, `max_time` or a reason to stop; the state that is returned is saved.

        Raises:
            FloatingPointError: a step's loss or gradient was not finite; the newest checkpoint is whole.
            OSError: a checkpoint could not be written; older ones are whole.
        """
        timer = _Timer(self.config, self.runtime.device)
        reason = self._reason_to_stop(timer)
        while reason is None:
            result, rate = self._step()
            reason = self._reason_to_stop(timer)
            saving = reason is not None or self._due(self.config.checkpoint.interval)
            validating = (saving and reason != "signal") or self._due(self.config.training.eval_interval)
            metrics = {}
            if validating or self._due(self.config.training.log_interval):
                metrics = self._metrics(result, rate) | timer.rates(self.state.tokens)
            if validating:
                metrics |= self._evaluate(timer)
            self._log(metrics)
            if saving:
                with timer.paused():
                    self.save(metrics.get("val_loss"))
            self._run_hooks(timer)
        self.runtime.logger.log_event("finished", step=self.state.step, reason=reason)
        return self.state

    def _step(self) -> tuple[StepResult, float]:
        training, step = self.config.training, self.state.step + 1
        rate = learning_rate(
            step,
            max_steps=training.max_steps,
            learning_rate=self.config.optimizer.learning_rate,
            **self.config.schedule.model_dump(),
        )
        with nvtx.range("data"):
            micro_batches = self._micro_batches(step)
        try:
            result = train_step(
                self.model,
                self.optimizer,
                micro_batches,
                learning_rate=rate,
                max_grad_norm=self.config.optimizer.max_grad_norm,
                autocast=self.autocast,
                world=self.runtime.world,
            )
        except FloatingPointError as error:
            problem = f"step {step}: {error}: not finite, stopped before the weights changed"
            raise FloatingPointError(self._advice(problem)) from None
        self.state.step, self.state.tokens = step, self.state.tokens + result.tokens
        return result, rate

    def _micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        training, world = self.config.training, self.runtime.world
        num_micro_batches = num_accumulation_steps(training.batch_size, training.micro_batch_size, world.world_size)
        batch = partial(
            get_batch,
            self.train_data.tokens,
            batch_size=training.batch_size,
            context_length=self.config.model.context_length,
            seed=training.seed,
            step=step,
            device=self.runtime.device,
            rank=world.rank,
            world_size=world.world_size,
            num_micro_batches=num_micro_batches,
        )
        return [batch(micro_batch=index) for index in range(num_micro_batches)]

    def measure_step_seconds(self) -> float:
        """Return about how long a step takes, from one forward and backward pass after another to warm up.

        Weights, optimizer and data order are untouched.
        """
        micro_batches = self._micro_batches(self.state.step + 1)
        for _ in range(2):
            start = time.perf_counter()
            inputs, targets = micro_batches[0]
            with self.autocast():
                loss = cross_entropy(self.model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad(set_to_none=True)
            synchronize(self.runtime.device)
        return (time.perf_counter() - start) * len(micro_batches)

    def _metrics(self, result: StepResult, rate: float) -> dict[str, float]:
        metrics = {"loss": result.loss, "lr": rate, "grad_l2_norm": result.grad_norm, "tokens": self.state.tokens}
        return metrics | (self.norms.norms() if self.norms else {})

    def _evaluate(self, timer: _Timer) -> dict[str, float]:
        if self.valid_data is None:
            return {}
        with timer.paused():
            result = self.validate()
        if not math.isfinite(result.loss):
            raise FloatingPointError(self._advice(f"step {self.state.step}: validation loss {result.loss}: not finite"))
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte, "val_perplexity": result.perplexity}

    def validate(self) -> EvalResult:
        """Evaluate on the first `eval_batches` batches of the validation file; every rank computes the same."""
        assert self.valid_data is not None
        training = self.config.training
        batches = sequential_batches(
            self.valid_data.tokens,
            batch_size=training.micro_batch_size or training.batch_size,
            context_length=self.config.model.context_length,
            max_batches=training.eval_batches,
            device=self.runtime.device,
        )
        return evaluate(self.raw_model, batches, token_bytes=self._token_bytes, autocast=self.autocast)

    def _log(self, metrics: dict[str, float]) -> None:
        if metrics:
            self.runtime.logger.log_metrics(self.state.step, metrics)
            self.runtime.progress(self.state.step, metrics)

    def _run_hooks(self, timer: _Timer) -> None:
        for hook in self.runtime.hooks:
            if self._due(hook.interval):
                with timer.paused():
                    hook.call(self.state.step, self.raw_model)

    def _due(self, interval: int) -> bool:
        step = self.state.step
        return step == self.config.training.max_steps or (interval > 0 and step % interval == 0)

    def _reason_to_stop(self, timer: _Timer) -> str | None:
        if self.state.step >= self.config.training.max_steps:
            return "max_steps"
        # The ranks' clocks and signals differ; they must leave the loop at the same step.
        world = self.runtime.world
        device = self.runtime.device if world.is_distributed else "cpu"
        flags = torch.tensor([timer.is_over(), self.runtime.stop()], dtype=torch.int32, device=device)
        over, signalled = all_reduce_sum(flags, world).tolist()
        if signalled:
            return "signal"
        return "max_time" if over else None

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save(self, val_loss: float | None = None) -> None:
        """Save this step's checkpoint, announce it, and remove those that are neither new nor the best.

        `best` points to the checkpoint with the lowest validation loss among those that were saved.
        """
        self._check_weights()
        is_best = val_loss is not None and (self.state.best_val_loss is None or val_loss < self.state.best_val_loss)
        if is_best:
            self.state.best_val_loss, self.state.best_step = val_loss, self.state.step
        if is_main(self.runtime.world):
            directory = checkpoint.save_checkpoint(self.checkpoints, self.state.step, self._snapshot())
            if is_best:
                checkpoint.point(self.checkpoints / "best", directory)
            self.runtime.logger.log_event("checkpoint_saved", step=self.state.step)
            if self.config.wandb.log_artifacts:
                name = f"{self.checkpoints.parent.name}-checkpoint"
                self.runtime.logger.log_artifact(directory, name=name, type="model")
            checkpoint.prune(self.checkpoints, self.config.checkpoint.keep)
        self._saved_step = self.state.step
        barrier(self.runtime.world)

    def _check_weights(self) -> None:
        """Refuse to save what no run could go on from."""
        for name, parameter in self.raw_model.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(self._advice(f"step {self.state.step}: {name} is not finite, not saved"))

    def _advice(self, problem: str) -> str:
        return (
            f"{problem}; the last checkpoint is step {self._saved_step or 'none'}; "
            "lower optimizer.learning_rate or raise schedule.warmup_steps"
        )

    def _snapshot(self) -> checkpoint.Snapshot:
        state = {
            **asdict(self.state),
            "rng": rng_state(),
            "data": self._fingerprints(),
            "wandb_id": self.runtime.logger.run_id,
            "torch": torch.__version__,
        }
        return checkpoint.Snapshot(self.raw_model, self.optimizer, self.tokenizer, dump_toml(self.config), state)

    def _fingerprints(self) -> dict[str, str]:
        return {"train_sha256": self.train_data.sha256, "tokenizer_sha256": self.tokenizer.fingerprint()}

    def resume_from(self, directory: Path) -> None:
        """Take over a checkpoint's weights, optimizer and state.

        Raises:
            ValueError: its model, data or tokenizer is not this run's.
        """
        state = checkpoint.read_state(directory)
        missing = {*asdict(self.state), "data", "optimizer", "rng", "wandb_id"} - state.keys()
        if missing:
            raise checkpoint.CheckpointError(f"{directory}: state.json does not hold {', '.join(sorted(missing))}")
        self._check_same_model(directory)
        for name, ours in self._fingerprints().items():
            theirs = state["data"][name]
            if theirs != ours:
                raise ValueError(
                    f"{directory}: {name.removesuffix('_sha256')} has changed since this checkpoint: it was "
                    f"{theirs[:12]}..., now it is {ours[:12]}...; restore it, or start a new run with another "
                    "logging.run_name"
                )
        checkpoint.load_weights(self.raw_model, directory)
        checkpoint.load_optimizer(self.optimizer, directory, state)
        self.state = TrainState(**{name: state[name] for name in asdict(self.state)})
        self.wandb_id = state["wandb_id"]
        set_rng_state(state["rng"])
        self._saved_step = self.state.step
        if self.state.best_step == self.state.step and is_main(self.runtime.world):
            checkpoint.point(self.checkpoints / "best", directory)  # a kill may have come before this

    def _check_same_model(self, directory: Path) -> None:
        saved = checkpoint.load_config_of(directory)
        theirs, ours = TransformerLM(**saved.model.model_dump(), device="meta").hparams(), self.raw_model.hparams()
        runtime_only = ("attention", "activation_checkpointing")  # these change how it computes, not what
        changed = [
            f"model.{name} was {theirs[name]}, now {value}"
            for name, value in ours.items()
            if value != theirs[name] and name not in runtime_only
        ]
        if saved.optimizer.name != self.config.optimizer.name:
            changed.append(f"optimizer.name was {saved.optimizer.name}, now {self.config.optimizer.name}")
        if changed:
            raise ValueError(
                f"{directory}: this run was started with another model or optimizer ({'; '.join(changed)}); "
                "use its settings, or start a new run with another logging.run_name"
            )


class _Timer:
    """Tokens per second over the window since the last reading, and the end of `max_time`; pauses do not count."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._max_seconds = duration_seconds(config.training.max_time) if config.training.max_time else None
        self._device = device
        self._start = self._mark = time.perf_counter()
        self._tokens: int | None = None

    def rates(self, tokens: int) -> dict[str, float]:
        """Return tokens per second since the last call, and start a new window; nothing for the first window."""
        synchronize(self._device)
        now = time.perf_counter()
        seconds, before = now - self._mark, self._tokens
        self._mark, self._tokens = now, tokens
        return {} if before is None or seconds <= 0 else {"tokens_per_second": (tokens - before) / seconds}

    def is_over(self) -> bool:
        """Tell whether `max_time` has passed."""
        return self._max_seconds is not None and time.perf_counter() - self._start >= self._max_seconds

    def paused(self) -> _Pause:
        """Return a context whose time does not count into the rates."""
        return _Pause(self)


class _Pause:
    def __init__(self, timer: _Timer) -> None:
        self._timer = timer

    def __enter__(self) -> None:
        synchronize(self._timer._device)
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._timer._mark += time.perf_counter() - self._began


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the optimizer that the configuration names, over the model's parameters."""
    settings = config.optimizer
    groups: Any = parameter_groups(model, weight_decay=settings.weight_decay)
    if settings.name == "sgd":
        return SGD(groups, settings.learning_rate, momentum=settings.momentum)
    return AdamW(groups, settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def num_accumulation_steps(batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """Return how many micro-batches each rank runs through for one step.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    per_round = (micro_batch_size or batch_size // world_size) * world_size
    if per_round == 0 or batch_size % per_round:
        raise ValueError(
            f"training.batch_size ({batch_size}) is not divisible by micro_batch_size x processes "
            f"({micro_batch_size or 'any'} x {world_size})"
        )
    return batch_size // per_round


def token_bytes(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Tensor:
    """Return the UTF-8 bytes behind each id `(vocab_size,)`: 0 for special tokens and for ids that no token has."""
    lengths = tokenizer.token_byte_lengths()
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)), device=device)
