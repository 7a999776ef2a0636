"""`transformerlm-train`: prepare a run, tell of it, and train."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.train")

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cli.checkpoints import described
from cli.entry import STOP_CODES, heard_signals, is_importing, leave
from cli.environment import log_environment
from cli.prepare_run import prepare_run
from cli.progress import Progress
from cli.same_run import held_directory, refuse_different_directories, refuse_different_settings, remembered
from cli.summary import Summary, draw_loss_curve, going_on, say_what_next
from cli.terminal import clock, framed, is_live, note, working
from cli.utils import EXIT_FAILED, Command, speaks_for_machine
from cli.utils import main as run_command
from config.io import dump_toml, read_toml
from config.paths import read_name, written_path
from config.schemas import duration_seconds
from config.train import TrainConfig

if TYPE_CHECKING:
    from logger import Logger
    from transformerlm.distributed.world import World
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.training.prepared_run import PreparedRun
    from transformerlm.training.runtime import Hook
    from transformerlm.training.trainer import Trainer

# torchrun passes a signal on to processes that may already have it from the terminal or from SLURM, after a while;
# `uv run` and `timeout` do so at once.
ECHO_SECONDS = 5.0
BRIEF_ECHO_SECONDS = 1.0
# After this time without a reader, stdout gets no more lines; `metrics.jsonl` has them all.
STDOUT_PATIENCE = 5.0
MAX_ERROR_CHARS = 500  # of the error that ended a run, in its log
# What --help shows.
SHORT = (
    "logging.run_name",
    "training.max_steps",
    "training.max_time",
    "training.batch_size",
    "training.device",
    "optimizer.learning_rate",
    "model.num_layers",
    "model.d_model",
    "model.context_length",
    "data.train",
)
EXAMPLES = (
    ("a small model, by the shipped settings", "--config train"),
    (
        "a tenth of its steps, as a run of another name",
        "--config train --training.max_steps=100 --logging.run_name=short",
    ),
    ("a run goes on for longer, by its own file", "--config runs/first/config.toml --training.max_steps=2000"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command("transformerlm-train", TrainConfig, train, place_of=place_of_run, short=SHORT, examples=EXAMPLES)
    run_command(command, argv)


def place_of_run(path: Path) -> dict[str, Any]:
    """Return the place of a run by its own `config.toml`, if the file names another place: runs can be moved."""
    run_dir = path.parent if path.parent.name not in ("", "..") else path.parent.resolve()
    if path.name != "config.toml" or not (run_dir / "checkpoints").is_dir():
        return {}
    tree = read_toml(path)
    logging = tree.get("logging")
    name = logging.get("run_name") if isinstance(logging, dict) else None  # what is no table is refused later
    said = Path(read_name(tree.get("runs_dir")), str(name or run_dir.name))  # a run without a name has that of its time
    if said.resolve() != run_dir.resolve():
        note(f"{path} names {said}; this run goes on where its file is, in {run_dir}")
    elif name:
        return {}
    return {"runs_dir": written_path(run_dir.parent), "logging": {"run_name": run_dir.name}}


def train(config: TrainConfig) -> int:
    """Train as the configuration says, and return the exit code.

    Nothing is written before everything that can be checked is checked.
    """
    with StopSignals() as signals, ExitStack() as stack:
        world, run_dir = _begin(config, stack)
        from transformerlm.distributed.world import is_main
        from transformerlm.utils.files import write_whole

        if world.is_distributed:
            signals.deferred = "stopping once all processes are ready"  # they leave together
        with working("preparing the run"), remembered(config, run_dir, world):
            run = prepare_run(config, run_dir, world=world)
            samples = _Samples(run) if run.config.samples.interval else None
        logger = _make_logger(run)
        stack.callback(logger.close)
        progress, summary = _make_progress(run), Summary(run_dir, config=run.config, data=run.data)
        callbacks = _callbacks(run_dir, progress, summary) if is_main(world) else {}
        hooks = [samples.hook(logger, doing=progress.doing, is_main=is_main(world))] if samples else []
        trainer = run.trainer(logger=logger, hooks=hooks, stop=lambda: signals.received, **callbacks)
        seconds = _measure(trainer)
        is_done = trainer.agenda().stop is not None
        if is_main(world):
            _announce(trainer, run, seconds=seconds, is_done=is_done)
            if not is_done:  # else nothing is trained with these settings
                settings = dump_toml(run.config)
                log_environment(trainer, settings)
                write_whole(run_dir / "config.toml", settings)
        if run.config.wandb.log_artifacts and run.config.data.tokenizer.is_dir():  # not for files with a prefix
            logger.log_artifact(run.config.data.tokenizer, name=f"{run_dir.name}-tokenizer", type="tokenizer")
        if run.state.step and not is_done:
            logger.log_event("resumed", step=run.state.step)
        signals.deferred = "saving after this step"
        world.arrive("the first step")
        if is_main(world):
            _train_and_tell(trainer, run_dir, progress, summary)
        else:
            trainer.train()
    return STOP_CODES.get(trainer.stopped_by or "", 0)


def _begin(config: TrainConfig, stack: ExitStack) -> tuple[World, Path]:
    """Join the other ranks, make sure that all mean the same run, and hold its directory until `stack` ends."""
    from transformerlm.distributed.launcher import end_with_launcher

    end_with_launcher(_end)
    with working("loading PyTorch"):
        from transformerlm.distributed.world import init_from_env, shutdown, without_tracebacks

    with working("waiting for the other processes"):
        timeout = duration_seconds(config.parallel.timeout)
        world = init_from_env(device=config.training.device, timeout=timeout, end=_end)
    stack.push(lambda kind, *_: shutdown(world, has_failed=kind is not None))
    stack.enter_context(without_tracebacks(world))
    refuse_different_settings(config, world)
    run_dir = held_directory(config, world, stack)
    refuse_different_directories(run_dir, world)
    return world, run_dir


def _end(line: str | None) -> None:
    """End the process at once, from a thread, because another one that it needs is missing."""
    if line is not None:
        leave(line, EXIT_FAILED)
    os._exit(EXIT_FAILED)


def _train_and_tell(trainer: Trainer, run_dir: Path, progress: Progress, summary: Summary) -> None:
    """Train, and say what ended the run and how it went; for a run that had ended before, say only what to do next."""
    was_done = trainer.agenda().stop is not None
    if was_done:
        trainer.train()
    else:
        summary.begin(trainer.state)
        try:
            with closing(progress):
                progress.begin("the first step")
                trainer.train()
        except Exception as error:  # the curve of a run that has failed says most of all
            _log_failure(trainer, error)
            draw_loss_curve(run_dir, seconds=trainer.state.elapsed_s)
            raise
        finally:
            if trainer.config.logging.report:
                _report(run_dir)
    _say_what_ended_it(trainer, was_done=was_done)
    if was_done:
        say_what_next([going_on(trainer, run_dir)])
    else:
        summary.show(trainer)


def _report(run_dir: Path) -> None:
    """Write the run's report; without it the run is as good, so an error is only told."""
    from transformerlm.experiments.history import read_history
    from transformerlm.experiments.report import write_report

    output = run_dir / "report.html"
    try:
        with working("writing the report"):
            write_report([read_history(run_dir)], output)
        note(f"{output}: curves, samples and settings; open it in a browser")
    except (OSError, ValueError) as error:
        note(f"no report: {error}")


def _log_failure(trainer: Trainer, error: Exception) -> None:
    """Log what ended the run, so that nobody who reads its lines takes it for one that was killed."""
    text = f"{type(error).__name__}: {error}"
    trainer.runtime.logger.log_event("failed", step=trainer.state.step, error=text[:MAX_ERROR_CHARS])


def _say_what_ended_it(trainer: Trainer, *, was_done: bool) -> None:
    keys = {"max_steps": "max_steps", "max_time": "max_time", "early_stop": "early_stop_patience"}
    if trainer.stopped_by not in keys:
        return
    name, step = keys[trainer.stopped_by], trainer.state.step
    limit = f"training.{name} = {getattr(trainer.config.training, name)}"
    if was_done:
        note(f"nothing left to do: the run has ended at step {step:,} by {limit}; raise it to go on")
    elif name != "max_steps":
        note(f"stopped by {limit} at step {step:,}; raise it to go on")


class StopSignals:
    """Turns the first of `entry.STOP_CODES` into a request to stop; a second one ends the process at once.

    While `deferred` is empty there is nothing to save yet, so the first one ends the process, too, by SystemExit. Later
    it says what is done first. One Ctrl-C may arrive several times, from the terminal and from a program that passes it
    on (torchrun, srun, uv run): within a moment of the first, further signals are its echo.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferred = ""
        self._lock = threading.Lock()
        self._is_over = self._is_echo_over = False

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._receive) for number in heard_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._is_over = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if self._is_echo_over:  # who held Ctrl-C back for a moment has put this handler back
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.received = signal.Signals(number).name
        threading.Thread(target=self._end_the_echo, name="echo", daemon=True).start()
        if not self.deferred:
            line, code = f"{self.received}: stopped before the first step", STOP_CODES[self.received]
            if is_importing(frame):
                leave(line, code)
            note(line)
            sys.exit(code)
        if speaks_for_machine():
            note(f"{self.received}: {self.deferred}; once more to stop at once without saving")

    def _end_the_echo(self) -> None:
        """Let the next signal end the process, a while after the first; the body of a thread.

        `signal.signal` works in the main thread only, and that may be in a call from which it does not come back.
        """
        time.sleep(ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else BRIEF_ECHO_SECONDS)
        with self._lock:
            self._is_echo_over = True
            for number in self._previous if not self._is_over else ():
                ctypes.pythonapi.PyOS_setsig(number, signal.SIG_DFL.value)


# --- what a run is given -----------------------------------------------------------------------------------------


def _make_logger(run: PreparedRun) -> Logger:
    """Return the run's logger; first cut the steps that an earlier start did not save from `metrics.jsonl`."""
    from logger import NoopLogger, create_logger, truncate_after_step

    if run.runtime.world.rank != 0:
        return NoopLogger()
    metrics, config = run.run_dir / "metrics.jsonl", run.config
    truncate_after_step(metrics, run.state.step)
    return create_logger(
        config.logging.backend,
        run_name=run.run_dir.name,
        jsonl_path=metrics,
        run_id=run.wandb_id,
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
        patience=STDOUT_PATIENCE,
    )


def _make_progress(run: PreparedRun) -> Progress:
    """Return the run's progress display; JSON lines on a terminal leave no room for its live line."""
    from logger import is_terminal
    from transformerlm.training.eta import work_left
    from transformerlm.training.timetable import Timetable

    has_room = not ("json" in run.config.logging.backend and is_terminal())
    valid_tokens = len(run.data.valid) if run.data.valid else 0
    return Progress(
        run.config.training.max_steps,
        start=run.state.step,
        limit=Timetable.of(run.config).seconds_left(run.state.time_used),
        work_left=partial(work_left, run.config, valid_tokens=valid_tokens, world_size=run.runtime.world.world_size),
        live=is_live() and has_room,
    )


def _callbacks(run_dir: Path, progress: Progress, summary: Summary) -> dict[str, Any]:
    """Return the fields of `Runtime` through which the main process follows the run."""
    from logger import truncate_after_step

    return {
        "rewind": partial(truncate_after_step, run_dir / "metrics.jsonl"),
        "progress": progress,
        "tick": progress.move,
        "doing": progress.doing,
        "summary": summary,
    }


def _measure(trainer: Trainer) -> tuple[float, float]:
    """Return about how long the run takes, and how long compiling took, in seconds; all ranks measure together."""
    from transformerlm.training.planning.calibration import estimate_seconds

    if trainer.agenda().stop:
        return 0.0, 0.0
    with working("compiling the model" if trainer.is_compiled else "timing a step"):
        return estimate_seconds(trainer)


def _announce(trainer: Trainer, run: PreparedRun, *, seconds: tuple[float, float], is_done: bool) -> None:
    """Log what begins, and say it: its size, its place, its speed; `seconds` are those of `_measure`."""
    from transformerlm.training.build import measured_on
    from transformerlm.training.planning.preflight import gigabytes

    model, training, runtime = trainer.raw_model, trainer.config.training, trainer.runtime
    sizes, per_pass = _sizes(trainer), runtime.micro_batch_size
    tokens_per_step = training.batch_size * model.context_length
    steps = 0 if is_done else training.max_steps - trainer.state.step
    eta, compile_seconds = seconds
    compiled = {"compile_seconds": compile_seconds} if trainer.is_compiled else {}
    if not is_done:
        runtime.logger.log_event(
            "started",
            step=trainer.state.step,
            **sizes,
            tokens_per_step=tokens_per_step,
            micro_batch_size=per_pass,
            memory_estimate_bytes=run.memory_bytes,
            max_steps=training.max_steps,
            eta_seconds=eta,
            **compiled,
            device=str(runtime.device),
            precision=runtime.precision,
            **measured_on(trainer.config, trainer.data),
            **_packing_facts(trainer),
        )
    if trainer.state.step:
        note(f"resumed at step {trainer.state.step:,}")
    elif run.initial_weights and run.config.checkpoint.init_from:
        note(f"begins with the weights of {described(run.config.checkpoint.init_from, run.initial_weights)}")
    _note_packing(trainer)
    size = f"{sizes['parameters']:,} parameters, {sizes['flops_per_token'] / 1e6:,.1f} MFLOPs per token"
    note(f"{run.run_dir}: {size}, about {gigabytes(run.memory_bytes)} of memory")
    _note_trained(trainer.config, sizes)
    passes = f", {per_pass} of {training.batch_size} sequences at a time" if per_pass < training.batch_size else ""
    where = f"on {runtime.device} in {runtime.precision}"
    if compiled and steps:
        note(f"compiled in {compile_seconds:.0f} s")
    if steps:
        until = f", or training.max_time = {training.max_time}" if training.max_time else ""
        note(f"{steps:,} steps of {tokens_per_step:,} tokens{passes}{until} {where}, ETA {clock(eta)}")


def _sizes(trainer: Trainer) -> dict[str, int]:
    """Return the numbers in the model, those that are trained if not all of them, and the FLOPs of a token."""
    from transformerlm.checkpoints.load import fine_tuning_of
    from transformerlm.models.estimates import count_trained, flops_per_token

    model, fine_tuning = trainer.raw_model, fine_tuning_of(trainer.config)
    trained = {"trained_parameters": count_trained(model.settings, fine_tuning)} if fine_tuning else {}
    flops = flops_per_token(model.settings, model.context_length, fine_tuning)
    return {"parameters": model.num_parameters(), **trained, "flops_per_token": flops}


def _note_trained(config: TrainConfig, sizes: dict[str, int]) -> None:
    if "trained_parameters" not in sizes:
        return
    lora = config.fine_tuning.lora
    how = "of them" if lora is None else f"numbers by LoRA of rank {lora.rank}"
    note(f"trains {sizes['trained_parameters']:,} {how}; all others are frozen")


def _packing_facts(trainer: Trainer) -> dict[str, int]:
    """Return what packing made of the documents; nothing for windows."""
    from transformerlm.training.document_rows import DocumentRows

    rows = trainer.train_rows
    if not isinstance(rows, DocumentRows):
        return {}
    counts = {"rows": len(rows), "documents": rows.num_documents, "cut": rows.num_cut, "padding": rows.num_padding}
    return {f"packing.{name}": count for name, count in counts.items()}


def _note_packing(trainer: Trainer) -> None:
    if facts := _packing_facts(trainer):
        length = trainer.config.model.context_length
        padding = facts["packing.padding"] / (facts["packing.rows"] * length)
        cut = f" ({facts['packing.cut']:,} of them cut)" if facts["packing.cut"] else ""
        note(
            f"{facts['packing.documents']:,} documents{cut} in {facts['packing.rows']:,} rows of {length:,} tokens, "
            f"of which {padding:.2%} is padding"
        )


class _Samples:
    """Generates texts from the prompts of [samples] while a run trains.

    Raises:
        ValueError: nothing can be generated from a prompt.
    """

    def __init__(self, run: PreparedRun) -> None:
        from transformerlm.checkpoints.document_ids import guess_ids, ids_of_data

        samples, tokenizer = run.config.samples, run.data.tokenizer
        self._interval, self._prompts, self._tokenizer = samples.interval, samples.prompts, tokenizer
        self._settings = {**samples.sampling.model_dump(), "allow_special": samples.allow_special}
        self._document_ids = ids_of_data(run.data.train, tokenizer) or guess_ids(tokenizer)
        for prompt in samples.prompts:  # checks them alone: nothing is generated before a token is asked for
            self._texts_after(run.model, prompt, seed=0)

    def _texts_after(self, model: TransformerLM, prompt: str, *, seed: int) -> Iterator[str]:
        from transformerlm.inference.predictor import Predictor

        return Predictor(model, self._tokenizer, self._document_ids).stream(prompt, seed=seed, **self._settings)

    def hook(self, logger: Logger, *, doing: Callable[[str], None], is_main: bool) -> Hook:
        """Return the hook that generates a text from each prompt; the main process logs it and shows it."""
        from transformerlm.training.runtime import Hook

        def sample(step: int, model: TransformerLM) -> None:
            doing("sampling")
            for prompt in self._prompts:
                text = "".join(self._texts_after(model, prompt, seed=step))
                if not is_main:
                    continue
                logger.log_record({"event": "sample", "step": step, "text.prompt": prompt, "text.output": text})
                note(framed(f"step {step:,}", prompt + text))

        return Hook(self._interval, sample)
