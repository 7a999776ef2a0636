"""The training run: what changes from step to step, and the loop that changes it.

The order of a step is: the next batch, `train_step`, evaluation when it is due, one line to the loggers, hooks, and a
checkpoint when it is due. A batch depends on the seed and the step only, so a run that resumes at step s sees what an
uninterrupted one would have seen. To read the loop bare, begin with docs/examples/minimal_train.py.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from config.io import dump_toml
from config.schemas import duration_seconds
from config.train import TrainConfig
from profiling import nvtx
from transformerlm.checkpoints import document_ids
from transformerlm.checkpoints.directory import point, prune, step_name
from transformerlm.checkpoints.load import load_optimizer, load_weights
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.checkpoints.validation import CheckpointError, read_state, verify
from transformerlm.distributed import all_reduce_sum, barrier, broadcast_parameters, is_main
from transformerlm.models.transformer import TransformerLM
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training import resume_checks
from transformerlm.training.build import (
    build_optimizer,
    num_accumulation_steps,
    num_validation_windows,
    token_bytes,
)
from transformerlm.training.data import Prefetcher, get_batch, sample_starts, sequential_batches
from transformerlm.training.eta import work_left
from transformerlm.training.loop import Batch, EvalResult, StepResult, batch_loss, evaluate, train_step
from transformerlm.training.norm_metrics import NormRecorder
from transformerlm.training.planning.micro_batch import sequences_per_pass
from transformerlm.training.runtime import Runtime
from transformerlm.training.schedule import timed_learning_rate
from transformerlm.training.spike_guard import GuardState, Trouble, write_batch
from transformerlm.training.timer import Timer
from transformerlm.utils.device import should_compile, synchronize
from transformerlm.utils.dtypes import autocast, set_tf32
from transformerlm.utils.seed import rng_state, seed_everything, set_rng_state

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


@dataclass
class TrainState:
    """What a run remembers besides weights and optimizer; all of it is in a checkpoint's `state.json`."""

    step: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    lowest_val_loss: float | None = None  # of all validations at eval_interval, saved or not
    validations_since_lowest: int = 0
    seconds: float = 0.0  # of training.max_time, over all starts, the same on every rank
    guard: GuardState = field(default_factory=GuardState)


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
        self.stopped_by: str | None = None
        self._saved_step: int | None = None
        self._rollbacks = 0  # to this checkpoint
        set_tf32(config.training.tf32, runtime.device)
        self._batches = Prefetcher(self._make_batches) if runtime.device.type == "cuda" else self._make_batches
        seed_everything(config.training.seed)
        self.raw_model = TransformerLM(**config.model.model_dump()).to(runtime.device)
        broadcast_parameters(self.raw_model, runtime.world)
        self.optimizer = build_optimizer(self.raw_model, config, precision=runtime.precision)
        self.norms = NormRecorder(self.raw_model) if config.training.log_norms else None
        self.is_compiled = should_compile(config.training.compile, runtime.device, config.training.max_steps)
        self.model: TransformerLM = torch.compile(self.raw_model) if self.is_compiled else self.raw_model  # type: ignore[assignment]
        self.autocast = partial(autocast, runtime.device, runtime.precision)
        self._max_seconds = duration_seconds(config.training.max_time) if config.training.max_time else None
        self._token_bytes = token_bytes(tokenizer, config.model.vocab_size, runtime.device)

    def train(self) -> TrainState:
        """Train to `max_steps`, `max_time` or a signal, which `stopped_by` names; the state that is returned is saved.

        Raises:
            FloatingPointError: too many steps in a row had to be skipped, or the validation loss or a weight is not
                finite; the newest checkpoint is whole.
            OSError: a checkpoint could not be written; older ones are whole.
        """
        timer = Timer(self.runtime.device, before=self.state.seconds)
        reason = self._reason_to_stop(timer)
        while reason is None:
            result, rate, trouble = self._step()
            if trouble and self._must_roll_back(trouble):
                self._roll_back(result)
                timer.restart()
                reason = self._reason_to_stop(timer)
                continue
            reason = self._reason_to_stop(timer)
            signalled = reason in STOP_SIGNALS
            saving = reason is not None or self._due(self.config.checkpoint.interval)
            due = self._due(self.config.checkpoint.interval) or self._due(self.config.training.eval_interval)
            validating = due or (saving and not signalled)  # what a stop adds to it changes nothing that is counted
            metrics = {}
            if validating or self._due(self.config.training.log_interval):
                metrics = self._metrics(result, rate) | timer.rates(self.state.tokens)
            if validating:
                metrics |= self._evaluate(timer)
                self._count_validation(metrics)
                reason = reason or self.nothing_left()
                saving = saving or reason is not None
            self._log(metrics)
            if saving:
                with timer.paused():
                    self.save(metrics.get("val_loss"))
            if not signalled:
                self._run_hooks(timer)
        self._finish(reason)
        return self.state

    def _finish(self, reason: str) -> None:
        self.stopped_by = reason
        if facts := self.runtime.summary():
            self.runtime.logger.log_event("summary", step=self.state.step, **facts)
        signal = {"signal": reason} if reason in STOP_SIGNALS else {}
        if reason == "SIGUSR1":
            self.runtime.logger.log_event("requeue", step=self.state.step)
        self.runtime.logger.log_event("finished", step=self.state.step, reason="signal" if signal else reason, **signal)

    def _step(self) -> tuple[StepResult, float, Trouble | None]:
        training, step, guard = self.config.training, self.state.step + 1, self.state.guard
        spike_factor = training.spike_factor if training.spike_guard != "off" else None
        rate = self._learning_rate(step)
        with nvtx.range("data"):
            micro_batches = self._micro_batches(step)

        def trouble_with(result: StepResult) -> Trouble | None:
            return guard.trouble_with(result.loss, result.grad_norm, spike_factor=spike_factor)

        result = train_step(
            self.model,
            self.optimizer,
            micro_batches,
            learning_rate=rate,
            max_grad_norm=self.config.optimizer.max_grad_norm,
            autocast=self.autocast,
            world=self.runtime.world,
            z_loss=training.z_loss,
            accept=lambda result: trouble_with(result) is None,
        )
        trouble = trouble_with(result)
        self.state.step = step
        if trouble is None:
            self.state.tokens += result.tokens
            guard.made(result.loss)
        else:
            self._skip(result, trouble)
        self.runtime.tick(step, {"loss": result.loss})
        return result, rate, trouble

    def _learning_rate(self, step: int) -> float:
        schedule, max_steps, max_seconds = self.config.schedule, self.config.training.max_steps, self._max_seconds
        return timed_learning_rate(
            step,
            time_share=min(1.0, self.state.seconds / max_seconds) if max_seconds else 0.0,
            warmup_is_share=isinstance(schedule.warmup_steps, str),
            max_steps=max_steps,
            learning_rate=self.config.optimizer.learning_rate,
            **schedule.in_steps(max_steps),
        )

    def _skip(self, result: StepResult, trouble: Trouble) -> None:
        """Count a step that was not made, tell of it, keep its batch, and stop where there are too many of them."""
        step, guard, limit = self.state.step, self.state.guard, self.config.training.max_skipped_steps
        numbers = {"loss": result.loss, "grad_l2_norm": result.grad_norm}
        guard.skipped()
        if is_main(self.runtime.world):
            self._write_batch({"reason": trouble, **numbers})
        self.runtime.logger.log_event("step_skipped", step=step, reason=trouble, **numbers)
        if guard.skipped_in_a_row > limit or (self._must_roll_back(trouble) and self._rollbacks >= limit):
            what = {"not_finite": "not finite", "spike": f"far above the average {guard.loss_average:.3g}"}[trouble]
            found = f"loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}: {what}"
            raise FloatingPointError(self._advice(f"step {step}: {found}; training.max_skipped_steps is {limit}"))

    def _write_batch(self, facts: dict[str, Any]) -> None:
        training, context_length = self.config.training, self.config.model.context_length
        starts = sample_starts(
            len(self.train_data),
            batch_size=training.batch_size,
            context_length=context_length,
            seed=training.seed,
            step=self.state.step + self.state.guard.data_offset,
        )
        try:
            write_batch(
                self.checkpoints.parent / "skipped",
                self.state.step,
                data=self.train_data,
                starts=starts.tolist(),
                context_length=context_length,
                facts=facts,
            )
        except OSError as error:
            warnings.warn(f"step {self.state.step}: its batch could not be written: {error}", stacklevel=2)

    def _must_roll_back(self, trouble: Trouble) -> bool:
        return trouble == "spike" and self.config.training.spike_guard == "rollback" and self._saved_step is not None

    def _roll_back(self, result: StepResult) -> None:
        """Take up the last checkpoint again, with the data after that of the step which was not made."""
        assert self._saved_step is not None
        step, guard = self.state.step, self.state.guard
        directory = self.checkpoints / step_name(self._saved_step)
        verify(directory)
        self.resume_from(directory)
        self.state.guard.data_offset = guard.data_offset + step - self.state.step
        self._rollbacks += 1
        self.runtime.rewind(self.state.step)
        self.runtime.logger.log_event("rolled_back", step=self.state.step, from_step=step, loss=result.loss)

    def _micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        return self._batches(step + self.state.guard.data_offset)

    def _make_batches(self, data_step: int) -> list[tuple[Tensor, Tensor]]:
        training, world = self.config.training, self.runtime.world
        per_pass = sequences_per_pass(training, world.world_size)
        num_micro_batches = num_accumulation_steps(training.batch_size, per_pass, world.world_size)
        batch = partial(
            get_batch,
            self.train_data.tokens,
            batch_size=training.batch_size,
            context_length=self.config.model.context_length,
            seed=training.seed,
            step=data_step,
            device=self.runtime.device,
            rank=world.rank,
            world_size=world.world_size,
            num_micro_batches=num_micro_batches,
        )
        return [batch(micro_batch=index) for index in range(num_micro_batches)]

    def estimate_seconds(self) -> tuple[float, float]:
        """Return about how long the rest of the run takes, and how long compiling has taken, if anything was.

        Measured on two forward and backward passes; weights, optimizer and data order are untouched. Samples and saves
        are not counted, `max_time` is.
        """
        micro_batches, times = self._micro_batches(self.state.step + 1), []
        for _ in range(2):
            start = time.perf_counter()
            inputs, targets = micro_batches[0]
            with self.autocast():
                _, loss = batch_loss(self.model, inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad(set_to_none=True)
            synchronize(self.runtime.device)
            times.append(time.perf_counter() - start)
        seconds = times[1] * self.work_left(self.state.step) / len(inputs)
        left = self.seconds_left()
        return seconds if left is None else min(seconds, left), max(0.0, times[0] - times[1])

    def work_left(self, step: int) -> float:
        """Return the work that is left after `step`, in windows that are trained on: what an ETA goes by."""
        valid_tokens = len(self.valid_data) if self.valid_data is not None else 0
        return work_left(self.config, step, valid_tokens=valid_tokens, world_size=self.runtime.world.world_size)

    def seconds_left(self) -> float | None:
        """Return what is left of `max_time`; None: there is no such limit."""
        return None if self._max_seconds is None else max(0.0, self._max_seconds - self.state.seconds)

    def measured_on(self) -> dict[str, Any]:
        """Return what the losses depend on that a comparison of runs must know: tokenizer, text and how much of it."""
        facts: dict[str, Any] = {"tokenizer_sha256": self.tokenizer.fingerprint()}
        if self.valid_data is not None:
            num_windows = num_validation_windows(self.config, len(self.valid_data))
            tokens = num_windows * self.config.model.context_length
            facts |= {"valid_sha256": self.valid_data.sha256, "valid_tokens": tokens}
        return facts

    def _metrics(self, result: StepResult, rate: float) -> dict[str, float]:
        metrics = {"loss": result.loss, "lr": rate, "grad_l2_norm": result.grad_norm, "tokens": self.state.tokens}
        if self.state.guard.skipped_steps:
            metrics["skipped_steps"] = self.state.guard.skipped_steps
        return metrics | (self.norms.norms() if self.norms else {})

    def _evaluate(self, timer: Timer) -> dict[str, float]:
        if self.valid_data is None:
            return {}
        with timer.paused():
            result = self.validate()
        if not math.isfinite(result.loss):
            raise FloatingPointError(self._advice(f"step {self.state.step}: validation loss {result.loss}: not finite"))
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte, "val_perplexity": result.perplexity}

    def _count_validation(self, metrics: dict[str, float]) -> None:
        """Count a validation at `eval_interval`, and no other: a resumed run counts what an uninterrupted one does.

        The last step's is not counted for being the last: with more steps it would be one like any other.
        """
        interval = self.config.training.eval_interval
        if "val_loss" not in metrics or not interval or self.state.step % interval:
            return
        lowest = self.state.lowest_val_loss
        if lowest is None or metrics["val_loss"] < lowest:
            self.state.lowest_val_loss, self.state.validations_since_lowest = metrics["val_loss"], 0
        else:
            self.state.validations_since_lowest += 1

    def validated_tokens(self) -> npt.NDArray[Any]:
        """Return the tokens that a validation predicts."""
        assert self.valid_data is not None
        num_tokens = num_validation_windows(self.config, len(self.valid_data)) * self.config.model.context_length
        return self.valid_data.tokens[1 : num_tokens + 1]

    def validate(self) -> EvalResult:
        """Evaluate on the first `eval_tokens` of the validation file; every rank computes the same."""
        assert self.valid_data is not None
        size = sequences_per_pass(self.config.training, 1)
        num_windows = num_validation_windows(self.config, len(self.valid_data))
        batches = sequential_batches(
            self.valid_data.tokens,
            batch_size=size,
            context_length=self.config.model.context_length,
            max_windows=num_windows,
            device=self.runtime.device,
        )
        batches = self._naming(batches, math.ceil(num_windows / size))
        return evaluate(self.raw_model, batches, token_bytes=self._token_bytes, autocast=self.autocast)

    def _naming(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches, 1):
            self.runtime.doing(f"validating {number}/{total}")
            yield batch

    def _log(self, metrics: dict[str, float]) -> None:
        if metrics:
            self.runtime.logger.log_metrics(self.state.step, metrics)
            self.runtime.progress(self.state.step, metrics)

    def _run_hooks(self, timer: Timer) -> None:
        for hook in self.runtime.hooks:
            if self._due(hook.interval):
                with timer.paused():
                    hook.call(self.state.step, self.raw_model)

    def _due(self, interval: int) -> bool:
        step = self.state.step
        return step == self.config.training.max_steps or (interval > 0 and step % interval == 0)

    def nothing_left(self) -> str | None:
        """Return why no step is left to make, by what the run remembers, or None: there is one."""
        training, state = self.config.training, self.state
        if state.step >= training.max_steps:
            return "max_steps"
        if 0 < training.early_stop_patience <= state.validations_since_lowest:
            return "early_stop"
        return "max_time" if self._max_seconds and state.seconds >= self._max_seconds else None

    def _reason_to_stop(self, timer: Timer) -> str | None:
        # The ranks' clocks and signals differ; they must leave the loop at the same step, for the same reason, and have
        # the same learning rate until then.
        world, signal = self.runtime.world, self.runtime.stop()
        seconds = timer.seconds() if self._max_seconds else 0.0
        flags = torch.tensor([seconds, *(float(signal == name) for name in STOP_SIGNALS)], dtype=torch.float64)
        seconds, *received = all_reduce_sum(flags, world).tolist()
        if self._max_seconds:
            self.state.seconds = seconds / world.world_size
        signals = (name for name, total in zip(STOP_SIGNALS, received, strict=True) if total)
        return self.nothing_left() or next(signals, None)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save(self, val_loss: float | None = None) -> None:
        """Save this step's checkpoint, announce it, and remove those that are neither new nor the best.

        `best` points to the checkpoint with the lowest validation loss among those that were saved.
        """
        self.runtime.doing("saving")
        self._check_weights()
        is_best = val_loss is not None and (self.state.best_val_loss is None or val_loss < self.state.best_val_loss)
        if is_best:
            self.state.best_val_loss, self.state.best_step = val_loss, self.state.step
        if is_main(self.runtime.world):
            self.runtime.logger.sync()
            directory = save_checkpoint(self.checkpoints, self.state.step, self._snapshot(val_loss))
            if is_best:
                point(self.checkpoints / "best", directory)
            self.runtime.logger.log_event("checkpoint_saved", step=self.state.step)
            if self.config.wandb.log_artifacts:
                name = f"{self.checkpoints.parent.name}-checkpoint"
                self.runtime.logger.log_artifact(directory, name=name, type="model")
            prune(self.checkpoints, self.config.checkpoint.keep)
        self._saved_step, self._rollbacks = self.state.step, 0
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

    def _snapshot(self, val_loss: float | None) -> Snapshot:
        state = {
            **asdict(self.state),
            "val_loss": val_loss,
            "rng": rng_state(),
            "data": self._fingerprints(),
            "wandb_id": self.runtime.logger.run_id,
            "computed_with": self._computed_with(),
        } | document_ids.state_of_data(self.train_data, self.tokenizer)
        return Snapshot(self.raw_model, self.optimizer, self.tokenizer, dump_toml(self.config), state)

    def _fingerprints(self) -> dict[str, str]:
        return {"train_sha256": self.train_data.sha256, "tokenizer_sha256": self.tokenizer.fingerprint()}

    def _computed_with(self) -> dict[str, Any]:
        runtime = self.runtime
        return resume_checks.computed_with(runtime.device, runtime.precision, world_size=runtime.world.world_size)

    def init_from(self, directory: Path) -> None:
        """Begin with a checkpoint's weights; optimizer, step, data order and random numbers are a new run's.

        Raises:
            ValueError: it is damaged, or of another architecture or tokenizer.
        """
        verify(directory)
        resume_checks.check_same_architecture(directory, self.raw_model)
        resume_checks.check_same_tokenizer(directory, self.tokenizer)
        load_weights(self.raw_model, directory)

    def resume_from(self, directory: Path) -> None:
        """Take over a checkpoint's weights, optimizer and state; warn where its last bits were made by other means.

        Raises:
            ValueError: its model, data or tokenizer is not this run's.
        """
        # What the first version's checkpoints did not have.
        later = ("guard", "lowest_val_loss", "validations_since_lowest", "seconds")
        state = {name: asdict(TrainState())[name] for name in later} | read_state(directory)
        missing = {*asdict(self.state), "data", "optimizer", "rng", "wandb_id"} - state.keys()
        if missing:
            hint = "; an imported model: choose another logging.run_name, and name it in checkpoint.init_from"
            raise CheckpointError(
                f"{directory}: state.json does not hold {', '.join(sorted(missing))}"
                f"{hint if 'imported_from' in state else ''}"
            )
        resume_checks.check_same_model(directory, self.config, self.raw_model)
        resume_checks.check_same_data(directory, state["data"], self._fingerprints())
        changes = resume_checks.changed_bits(state.get("computed_with"), self._computed_with())
        if changes and is_main(self.runtime.world):
            warnings.warn(changes, stacklevel=2)
        load_weights(self.raw_model, directory)
        load_optimizer(self.optimizer, directory, state)
        self.state = TrainState(**{name: state[name] for name in asdict(self.state)})
        self.state.guard = GuardState(**state["guard"])
        self.wandb_id = state["wandb_id"]
        set_rng_state(state["rng"])
        self._saved_step = self.state.step
        if self.state.best_step == self.state.step and is_main(self.runtime.world):
            point(self.checkpoints / "best", directory)  # a kill may have come before this
