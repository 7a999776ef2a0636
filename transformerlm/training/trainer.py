"""The training loop, with what makes it robust: checkpoints, refused steps, several processes, limits, signals.

The order of a step is: the next batch, `train_step`, a validation when it is due, one line to the loggers, a checkpoint
when it is due, and the hooks. A batch depends on the seed and the step only, so a run that resumes at step s sees what
an uninterrupted one would have seen. The plain twin of this loop, without any of that, is on one page:
docs/examples/minimal_train.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from config.train import TrainConfig
from profiling import memory, nvtx
from transformerlm.checkpoints.directory import point, prune, step_name
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.validation import verify
from transformerlm.distributed.sharding import Shards
from transformerlm.distributed.world import all_reduce_sum, gather_text, is_main, together
from transformerlm.models.lora import num_lora_keys
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.build import (
    num_accumulation_steps,
    num_validation_rows,
    sequences_per_pass,
    token_bytes,
)
from transformerlm.training.data import ORDERS, Batch, get_batch, rows_of_part, sequential_batches
from transformerlm.training.document_rows import DocumentRows
from transformerlm.training.dropout_keys import dropout_keys
from transformerlm.training.loop import EvalResult, StepResult, evaluate, train_step
from transformerlm.training.norm_metrics import NormRecorder
from transformerlm.training.prefetch import Prefetcher, made_ahead
from transformerlm.training.run_data import RunData, reading_of, rows_of
from transformerlm.training.runtime import Runtime
from transformerlm.training.saved_run import SavedRun, snapshot
from transformerlm.training.schedule import timed_learning_rate
from transformerlm.training.spike_guard import Trouble, write_batch
from transformerlm.training.state import TrainState
from transformerlm.training.timer import Timer
from transformerlm.training.timetable import STOP_SIGNALS, Agenda, Timetable
from transformerlm.utils.device import should_compile
from transformerlm.utils.dtypes import autocast, set_tf32


class Trainer:
    """Trains a model on a token file, from the step that its state is at.

    Args:
        config: the checked configuration.
        run_dir: the run's directory, which exists.
        data: the token files and their tokenizer, which goes into every checkpoint.
        model: the model to train, on the runtime's device.
        optimizer: an optimizer over the model's parameters, or over those of `shards`.
        runtime: device, precision, logger and callbacks.
        state: what the run remembers of earlier starts; None for a new run.
        shards: how the ranks share the model, compiled already where it should be; None in a world of one.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        run_dir: Path,
        data: RunData,
        model: TransformerLM,
        optimizer: Optimizer,
        runtime: Runtime,
        state: TrainState | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.config, self.runtime, self.data = config, runtime, data
        self.reading = reading_of(data, config=config)
        self.train_rows = rows_of(data.train, data, config=config, seed=config.training.seed)
        self._valid_rows = rows_of(data.valid, data, config=config) if data.valid else None
        self.checkpoints = run_dir / "checkpoints"
        self.state = state or TrainState()
        self.timetable = Timetable.of(config)
        self.stopped_by: str | None = None
        self._saved_step = self.state.step or None
        self._rollbacks = 0  # to the checkpoint of that step
        self._spike_factor = config.training.spike_factor if config.training.spike_guard != "off" else None
        self.raw_model, self.optimizer = model, optimizer
        self.shards = shards or Shards.whole(model)
        self._num_lora_keys = num_lora_keys(model)
        self.norms = NormRecorder(model, self.shards) if config.training.log_norms else None
        set_tf32(config.training.tf32, runtime.device)
        self.is_compiled = should_compile(config.training.compile, runtime.device, config.training.max_steps)
        compile_here = self.is_compiled and shards is None
        self._timer = self._new_timer()
        self.model: TransformerLM = torch.compile(model) if compile_here else model  # type: ignore[assignment]
        self.autocast = partial(autocast, runtime.device, runtime.precision)
        self._batches = Prefetcher(self._make_batches) if runtime.device.type == "cuda" else self._make_batches
        self._token_bytes = token_bytes(data.tokenizer, config.model.vocab_size, runtime.device)

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> TrainState:
        """Train until a limit or a signal, which `stopped_by` then names; return the state, which is saved.

        Raises:
            FloatingPointError: too many steps in a row had to be skipped, or the validation loss or a weight is not
                finite; the newest checkpoint is whole.
            OSError: a checkpoint could not be written; older ones are whole.
        """
        self._timer = self._new_timer()
        todo = self._agreed_agenda()
        while todo.stop is None:
            result = self.step()
            if result.trouble:
                self._report_trouble(result, result.trouble)
            self.runtime.tick(self.state.step, {} if result.trouble == "nothing_learnt" else {"loss": result.loss})
            if self._must_roll_back(result.trouble):
                self._roll_back(result)
                self._timer.restart(elapsed_s=self.state.elapsed_s)
                todo = self._agreed_agenda()
            else:
                todo = self._do_what_is_due(result)
        self._finish(todo.stop)
        return self.state

    def _new_timer(self) -> Timer:
        return Timer(self.runtime.device, before=self.state.time_used, elapsed_s=self.state.elapsed_s)

    def _do_what_is_due(self, result: StepResult) -> Agenda:
        """Validate, log, save and run the hooks, each if it is due after this step; return the agenda."""
        todo = self._agenda_by(result.flags or self._flags())
        metrics = self._metrics(result) | self._timer.rates(self.state.tokens) if todo.log else {}
        if todo.validate:
            with self._timer.paused():
                metrics |= self._validation_metrics()
            todo = self.agenda(stop=todo.stop)  # early stopping may have made this step the last
        if todo.log:
            elapsed_s, peak_bytes = round(self._timer.elapsed_s(), 3), memory.peak_bytes(self.runtime.device)
            self.runtime.logger.log_metrics(self.state.step, metrics, elapsed_s=elapsed_s, peak_bytes=peak_bytes)
            self.runtime.progress(self.state.step, metrics)
        if todo.save:
            with self._timer.paused():
                self.save(metrics.get("val_loss"))
        if todo.run_hooks and result.trouble != "not_finite":  # where the loss is no number, logits are none either
            self._run_hooks(is_last=todo.stop is not None)
        return todo

    def step(self) -> StepResult:
        """Make the next step and count it; a step with `trouble` leaves the weights as they are."""
        config, step, guard = self.config, self.state.step + 1, self.state.guard
        self.runtime.world.arrive(f"step {step}")
        with nvtx.range("data"):
            micro_batches = self.micro_batches(step)
        result = train_step(
            self.model,
            self.optimizer,
            micro_batches,
            learning_rate=self._learning_rate(step),
            max_grad_norm=config.optimizer.max_grad_norm,
            autocast=self.autocast,
            shards=self.shards,
            num_tokens=config.training.batch_size * config.model.context_length,
            z_loss=config.training.z_loss,
            dropout_keys=self.dropout_keys(step),
            reading=self.reading,
            max_loss=guard.max_loss(self._spike_factor),
            flags=self._flags,
        )
        self.state.step = step
        if result.made:
            self.state.tokens += result.tokens
            guard.made(result.loss)
        elif result.trouble != "nothing_learnt":
            guard.skipped()
        return result

    def agenda(self, *, signal: str | None = None, stop: str | None = None) -> Agenda:
        """Return what to do after the current step: `Timetable.agenda` with the numbers of the run's state."""
        state = self.state
        return self.timetable.agenda(
            state.step,
            seconds=state.time_used,
            validations_since_lowest=state.validations_since_lowest,
            signal=signal,
            stop=stop,
        )

    def _agreed_agenda(self) -> Agenda:
        """Return the agenda by the clocks and signals of all ranks, each of which must ask at the same step."""
        flags = torch.tensor(self._flags(), dtype=torch.float64)
        return self._agenda_by(all_reduce_sum(flags, self.runtime.world).tolist())

    def _flags(self) -> list[float]:
        """Return this rank's seconds, if time is limited, and for each of `STOP_SIGNALS` whether it has arrived here.

        They travel with the loss, so that no rank waits once more. Clocks and signals differ between ranks. Through
        the sums, all ranks leave the loop at one step, for one reason, and have the same learning rate until then.
        """
        signal = self.runtime.stop()
        seconds = self._timer.seconds() if self.timetable.max_seconds is not None else 0.0
        return [seconds, *(float(signal == name) for name in STOP_SIGNALS)]

    def _agenda_by(self, flags: Sequence[float]) -> Agenda:
        """Return the agenda by the sums of all ranks' flags."""
        seconds, *received = flags
        if self.timetable.max_seconds is not None:
            self.state.seconds = seconds / self.runtime.world.world_size
        elif self.state.seconds:  # there was a limit before, and there may be one again
            self.state.seconds = self._timer.seconds()
        signals = (name for name, total in zip(STOP_SIGNALS, received, strict=True) if total)
        return self.agenda(signal=next(signals, None))

    def _finish(self, reason: str) -> None:
        self.stopped_by = reason
        logger, step = self.runtime.logger, self.state.step
        if facts := self.runtime.summary(self.state):
            logger.log_event("summary", step=step, **facts)
        if reason == "SIGUSR1":
            logger.log_event("requeue", step=step)
        signal = {"signal": reason} if reason in STOP_SIGNALS else {}
        logger.log_event("finished", step=step, reason="signal" if signal else reason, **signal)

    def _run_hooks(self, *, is_last: bool) -> None:
        for hook in self.runtime.hooks:
            if is_last or self.timetable.is_due(self.state.step, hook.interval):
                with self._timer.paused(), self._for_hooks():
                    hook.call(self.state.step, self.raw_model)

    @contextmanager
    def _for_hooks(self) -> Iterator[None]:
        """Let the model generate outside of a step; several ranks do so together, in the precision of training."""
        if not self.runtime.world.is_distributed:
            yield
            return
        self.runtime.world.arrive(f"the samples of step {self.state.step}")
        with self.autocast(), self.shards.same_outputs():
            yield
        self.shards.settle()

    # --- what a step needs ---------------------------------------------------------------------------------------

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this process's batches for a step."""
        return self._batches(step + self.state.guard.data_offset)

    def dropout_keys(self, step: int) -> list[Tensor | None]:
        """Return the keys with which the model drops numbers, for each of `micro_batches(step)`."""
        training, settings = self.config.training, self.raw_model.settings
        data_step = step + self.state.guard.data_offset
        keys = partial(dropout_keys, settings, seed=training.seed, step=data_step, device=self.runtime.device)
        keys = partial(keys, num_more=self._num_lora_keys)
        place = self._place
        parts = (rows_of_part(training.batch_size, micro_batch=i, **place) for i in range(place["num_micro_batches"]))
        return [keys(rows or range(1)) for rows in parts]  # an empty part comes as one window

    @property
    def _place(self) -> dict[str, int]:
        """Which parts of each batch are this rank's."""
        training, world = self.config.training, self.runtime.world
        count = num_accumulation_steps(training.batch_size, self.runtime.micro_batch_size, world.world_size)
        return {"rank": world.rank, "world_size": world.world_size, "num_micro_batches": count}

    def _make_batches(self, data_step: int) -> list[Batch]:
        training, place = self.config.training, self._place
        batch = partial(
            get_batch,
            self.train_rows,
            batch_size=training.batch_size,
            context_length=self.config.model.context_length,
            seed=training.seed,
            step=data_step,
            order=self.config.data.order,
            device=self.runtime.device,
            **place,
        )
        return [batch(micro_batch=index) for index in range(place["num_micro_batches"])]

    def _learning_rate(self, step: int) -> float:
        schedule, limits = self.config.schedule, self.timetable
        return timed_learning_rate(
            step,
            time_share=min(1.0, self.state.time_used / limits.max_seconds) if limits.max_seconds else 0.0,
            warmup_is_share=isinstance(schedule.warmup_steps, str),
            max_steps=limits.max_steps,
            learning_rate=self.config.optimizer.learning_rate,
            **schedule.in_steps(limits.max_steps),
        )

    # --- steps that were not made --------------------------------------------------------------------------------

    def _report_trouble(self, result: StepResult, trouble: Trouble) -> None:
        """Log a step that was not made, keep its batch, and raise where there are too many such steps.

        One in whose batch nothing is learnt is told of, and no more: it has no loss that could be wrong.
        """
        step, guard, limit = self.state.step, self.state.guard, self.config.training.max_skipped_steps
        if trouble == "nothing_learnt":
            self.runtime.logger.log_event("step_skipped", step=step, reason=trouble)
            return
        numbers = {"loss": result.loss, "grad_l2_norm": result.grad_norm}
        if is_main(self.runtime.world):
            self._write_batch({"reason": trouble, **numbers})
        self.runtime.logger.log_event("step_skipped", step=step, reason=trouble, **numbers)
        if guard.skipped_in_a_row > limit or (self._must_roll_back(trouble) and self._rollbacks >= limit):
            what = {"not_finite": "not finite", "spike": f"far above the average {guard.loss_average:.3g}"}[trouble]
            found = f"loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}: {what}"
            raise FloatingPointError(self._advice(f"step {step}: {found}; training.max_skipped_steps is {limit}"))

    def _write_batch(self, facts: dict[str, object]) -> None:
        training, context_length, data = self.config.training, self.config.model.context_length, self.data.train
        data_step = self.state.step + self.state.guard.data_offset
        windows = {"batch_size": training.batch_size, "context_length": context_length, "seed": training.seed}
        if isinstance(self.train_rows, DocumentRows):
            places = self.train_rows.places(batch_size=training.batch_size, step=data_step)
            facts = {**facts, "rows": self.train_rows.read(places)[0].tolist()}
            starts: list[int] = []
        else:
            starts = ORDERS[self.config.data.order](len(data), step=data_step, **windows).tolist()
        folder = self.checkpoints.parent / "skipped"
        try:
            write_batch(folder, self.state.step, data=data, starts=starts, context_length=context_length, facts=facts)
        except OSError as error:
            warnings.warn(f"step {self.state.step}: its batch could not be written: {error}", stacklevel=2)

    def _must_roll_back(self, trouble: Trouble | None) -> bool:
        return trouble == "spike" and self.config.training.spike_guard == "rollback" and self._saved_step is not None

    def _roll_back(self, result: StepResult) -> None:
        """Go back to the last checkpoint; training goes on from there with the data after the refused step."""
        assert self._saved_step is not None
        step, data_offset = self.state.step, self.state.guard.data_offset
        directory = self.checkpoints / step_name(self._saved_step)
        verify(directory, world=self.runtime.world)
        saved = SavedRun.read(directory)
        saved.load_into(self.shards, self.optimizer)
        self.state = saved.state(self.config, self.data)
        self.state.guard.data_offset = data_offset + step - self.state.step
        self._rollbacks += 1
        self.runtime.rewind(self.state.step)
        self.runtime.logger.log_event("rolled_back", step=self.state.step, from_step=step, loss=result.loss)

    def _advice(self, problem: str) -> str:
        return (
            f"{problem}; the last checkpoint is step {self._saved_step or 'none'}; "
            "lower optimizer.learning_rate or raise schedule.warmup_steps"
        )

    # --- what is measured ----------------------------------------------------------------------------------------

    def _metrics(self, result: StepResult) -> dict[str, float]:
        metrics = {"loss": result.loss, "lr": result.learning_rate, "grad_l2_norm": result.grad_norm}
        if result.trouble == "nothing_learnt":  # there is no loss, and no mean should have one
            del metrics["loss"], metrics["grad_l2_norm"]
        metrics["tokens"] = self.state.tokens
        if self.config.data.order == "epoch":
            metrics["epoch"] = self.state.tokens / self.data.train.num_learnt
        if self.state.guard.skipped_steps:
            metrics["skipped_steps"] = self.state.guard.skipped_steps
        return metrics | (self.norms.norms() if self.norms else {})

    def _validation_metrics(self) -> dict[str, float]:
        """Validate, where there is a file for it, and count the validation for early stopping.

        Only validations at `eval_interval` count, so that a run in pieces counts the same ones as an uninterrupted run.
        The validation of the last step does not count for being the last: with more steps it would be one like others.
        """
        if self.data.valid is None:
            return {}
        step, interval, result = self.state.step, self.config.training.eval_interval, self.validate()
        if not math.isfinite(result.loss):
            raise FloatingPointError(self._advice(f"step {step}: validation loss {result.loss}: not finite"))
        if interval and step % interval == 0:
            self.state.count_validation(result.loss, min_delta=self.config.training.early_stop_min_delta)
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte, "val_perplexity": result.perplexity}

    def validate(self) -> EvalResult:
        """Evaluate on the first `eval_tokens` of the validation file, which the ranks share out in batches."""
        assert self.data.valid is not None
        assert self._valid_rows is not None
        world = self.runtime.world
        num_windows = num_validation_rows(self.config, self._valid_rows)
        share = math.ceil(num_windows / world.world_size)
        size = min(share, sequences_per_pass(self.config.training, 1))  # as in a run of one process
        batches = sequential_batches(
            self._valid_rows,
            batch_size=size,
            context_length=self.config.model.context_length,
            max_windows=num_windows,
            device=self.runtime.device,
            rank=world.rank,
            world_size=world.world_size,
        )
        if self.runtime.device.type == "cuda":
            batches = made_ahead(batches)
        batches = self._counted(batches, math.ceil(num_windows / (size * world.world_size)))
        how: dict[str, Any] = {"token_bytes": self._token_bytes, "autocast": self.autocast, "reading": self.reading}
        result = evaluate(self.raw_model, batches, world=world, **how)
        self.shards.settle()
        return result

    def _counted(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches, 1):
            self.runtime.world.arrive(f"the validation of step {self.state.step}")
            self.runtime.doing(f"validating {number}/{total}")
            yield batch

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, val_loss: float | None = None) -> None:
        """Save this step's checkpoint, announce it, and remove those that are neither new nor the best.

        `best` points to the checkpoint with the lowest validation loss among those that were saved.
        """
        self.runtime.doing("saving")
        self.runtime.world.arrive(f"saving step {self.state.step}")
        self._check_weights()
        is_best = self.state.count_saved(val_loss)
        self._write_checkpoint(val_loss, is_best=is_best)
        self._saved_step, self._rollbacks = self.state.step, 0

    def _write_checkpoint(self, val_loss: float | None, *, is_best: bool) -> None:
        config, step = self.config, self.state.step
        with together(self.runtime.world):
            self.runtime.logger.sync()  # a checkpoint never holds a step whose line is not on the disk
        self.state.elapsed_s = self._timer.elapsed_s()
        taken = snapshot(
            self.shards,
            self.optimizer,
            self.state,
            config=config,
            data=self.data,
            runtime=self.runtime,
            val_loss=val_loss,
        )
        directory = save_checkpoint(
            self.checkpoints,
            step,
            taken,
            world=self.runtime.world,
            shard_size=self.shards.shard_size,
            max_file_bytes=config.checkpoint.max_file_mb * 10**6,
        )
        with together(self.runtime.world):  # an error here must not leave the other ranks waiting
            if is_main(self.runtime.world):
                self._announce(directory, is_best=is_best)

    def _announce(self, directory: Path, *, is_best: bool) -> None:
        if is_best:
            point(self.checkpoints / "best", directory)
        self.runtime.logger.log_event("checkpoint_saved", step=self.state.step)
        if self.config.wandb.log_artifacts:
            self.runtime.logger.log_artifact(directory, name=f"{self.checkpoints.parent.name}-checkpoint", type="model")
        prune(self.checkpoints, self.config.checkpoint.keep)

    def _check_weights(self) -> None:
        """Refuse to save weights from which no run could go on."""
        bad = (name for name, rows in self.shards.parameters.items() if not rows.isfinite().all())
        for name in filter(None, gather_text(next(bad, ""), self.runtime.world)):
            raise FloatingPointError(self._advice(f"step {self.state.step}: {name} is not finite, not saved"))
