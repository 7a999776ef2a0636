"""`transformerlm-train`: parse, check, build, train."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.train")

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cli.checkpoints import described
from cli.entry import STOP_CODES, is_importing, leave
from cli.progress import Progress
from cli.summary import Summary, going_on, say_what_next
from cli.terminal import clock, framed, is_live, note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.io import dump_toml, read_toml
from config.train import TrainConfig

if TYPE_CHECKING:
    from logger import Logger
    from transformerlm.distributed import World
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.token_files.dataset import TokenDataset
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training.runtime import Hook
    from transformerlm.training.trainer import Trainer

# torchrun passes a signal on to processes that may have had it from the terminal or from SLURM already.
ECHO_SECONDS = 5.0
# A reader of stdout that takes nothing for so long is given up; `metrics.jsonl` has every line.
STDOUT_PATIENCE = 5.0
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
    """Return where the run is whose own `config.toml` this is, if not where the file says: it may have been moved."""
    run_dir = path.parent if path.parent.name not in ("", "..") else path.parent.resolve()
    if path.name != "config.toml" or not (run_dir / "checkpoints").is_dir():
        return {}
    tree = read_toml(path)
    said = Path(str(tree.get("runs_dir")), str(dict(tree.get("logging") or {}).get("run_name")))
    if said.resolve() == run_dir.resolve():
        return {}
    note(f"{path} names {said}; this run goes on where its file is, in {run_dir}")
    return {"runs_dir": str(run_dir.parent), "logging": {"run_name": run_dir.name}}


def train(config: TrainConfig) -> int:
    """Train as the configuration says, and return the exit code.

    Nothing is written before everything that can be checked is checked.
    """
    with StopSignals() as signals, ExitStack() as stack:
        with working("loading PyTorch"):
            from transformerlm.distributed import init_from_env, is_main, shutdown
        from transformerlm.utils.files import write_whole
        from transformerlm.utils.lock import DirectoryLock

        world = init_from_env()
        stack.callback(shutdown, world)
        run_dir = config.runs_dir / (config.logging.run_name or time.strftime("%Y%m%d-%H%M%S"))
        if is_main(world):
            stack.enter_context(DirectoryLock(run_dir))
        signals.deferred = world.is_distributed  # the ranks leave together
        with working("preparing the run"):
            trainer, memory = _prepare(config, run_dir, world=world)
            config, began_at = trainer.config, trainer.state.step
            hooks = _sample_hooks(trainer) if is_main(world) else []
        logger = trainer.runtime.logger = _make_logger(config, run_dir, trainer=trainer)
        stack.callback(logger.close)
        if is_main(world):
            _announce(trainer, run_dir, memory=memory)
            trainer.runtime.hooks = hooks
            write_whole(run_dir / "config.toml", dump_toml(config))
        if config.wandb.log_artifacts and config.data.tokenizer.is_dir():  # not for files with a prefix
            logger.log_artifact(config.data.tokenizer, name=f"{run_dir.name}-tokenizer", type="tokenizer")
        if began_at:
            logger.log_event("resumed", step=began_at)
        trainer.runtime.stop = lambda: signals.received
        signals.deferred = True
        _train_to_the_end(trainer, run_dir)
    return STOP_CODES.get(trainer.stopped_by or "", 0)


def _show_progress(trainer: Trainer) -> Progress:
    """Let the run show how far it is; JSON lines on a terminal leave no room for a live line."""
    from logger import is_terminal

    training, runtime = trainer.config.training, trainer.runtime
    has_room = not (trainer.config.logging.backend == "json" and is_terminal())
    progress = Progress(
        training.max_steps,
        start=trainer.state.step,
        limit=trainer.seconds_left(),
        work_left=trainer.work_left,
        live=is_live() and has_room,
    )
    runtime.progress, runtime.tick, runtime.doing = progress, progress.move, progress.doing
    progress.doing("the first step")
    return progress


def _train_to_the_end(trainer: Trainer, run_dir: Path) -> None:
    """Train, and say what ended the run and how it went; of a run that had ended before, only what to do next."""
    from transformerlm.distributed import is_main

    if not is_main(trainer.runtime.world):
        trainer.train()
        return
    is_done, summary = trainer.nothing_left() is not None, Summary(trainer, run_dir)
    if is_done:
        trainer.train()
    else:
        trainer.runtime.summary = summary
        with closing(_show_progress(trainer)):
            trainer.train()
    _say_what_ended_it(trainer, was_done=is_done)
    if is_done:
        say_what_next([going_on(trainer, run_dir)])
    else:
        summary.show()


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
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a request to stop; a second one ends the process at once.

    While `deferred` is False there is nothing to save yet, and the first one ends the process, too, by SystemExit.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferred = False
        self._since = 0.0

    def __enter__(self) -> StopSignals:
        numbers = [getattr(signal, name) for name in STOP_CODES if hasattr(signal, name)]  # Windows has no SIGUSR1
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # under torchrun only: elsewhere nothing is caught any more
            if time.monotonic() - self._since > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._since = signal.Signals(number).name, time.monotonic()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            for each in self._previous:
                signal.signal(each, signal.SIG_DFL)
        if not self.deferred:
            line, code = f"{self.received}: stopped before the first step", STOP_CODES[self.received]
            if is_importing(frame):
                leave(line, code)
            note(line)
            sys.exit(code)
        note(f"{self.received}: saving after this step; once more to stop at once without saving")


def _prepare(config: TrainConfig, run_dir: Path, *, world: World) -> tuple[Trainer, int]:
    """Check the facts of the world, build the trainer, and resume it where the run has a checkpoint.

    Returns the trainer, which has no logger yet, and the estimated bytes of a step.
    """
    from logger import NoopLogger, require_wandb
    from transformerlm.checkpoints.directory import resolve
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training.build import num_accumulation_steps
    from transformerlm.training.planning import micro_batch, preflight
    from transformerlm.training.runtime import Runtime
    from transformerlm.training.trainer import Trainer
    from transformerlm.utils.allocator import keep_freed_memory
    from transformerlm.utils.device import resolve_device
    from transformerlm.utils.dtypes import resolve_precision

    tokenizer = Tokenizer.from_directory(config.data.tokenizer)
    preflight.check_vocab_size(tokenizer, config.model.vocab_size)
    if config.logging.backend == "wandb":
        require_wandb()
    train_data, valid_data = _open_data(config, tokenizer, world=world)
    device = resolve_device(config.training.device)
    keep_freed_memory(device)
    precision = resolve_precision(config.training.precision, device)
    newest = _find_checkpoint(config, run_dir / "checkpoints", world=world)
    config = micro_batch.resolve(config, device=device, precision=precision, world=world, resumed=newest)
    per_pass = micro_batch.sequences_per_pass(config.training, world.world_size)
    num_accumulation_steps(config.training.batch_size, per_pass, world.world_size)
    memory = preflight.check_memory(config, device=device, precision=precision, world_size=world.world_size)
    preflight.check_disk(run_dir, config.model.model_dump())
    runtime = Runtime(device=device, precision=precision, logger=NoopLogger(), world=world)
    trainer = Trainer(
        config,
        run_dir=run_dir,
        tokenizer=tokenizer,
        train_data=train_data,
        valid_data=valid_data,
        runtime=runtime,
    )
    if newest:
        trainer.resume_from(newest)
        _compare_settings(config, newest, trainer.state.step)
    elif config.checkpoint.init_from:
        trainer.init_from(resolve(config.checkpoint.init_from))
    return trainer, memory["total"]


def _open_data(config: TrainConfig, tokenizer: Tokenizer, *, world: World) -> tuple[TokenDataset, TokenDataset | None]:
    from transformerlm.distributed import is_main
    from transformerlm.token_files.dataset import TokenDataset
    from transformerlm.training.planning import preflight

    train_data = TokenDataset(config.data.train)
    preflight.check_dataset(train_data, config=config, tokenizer=tokenizer, key="data.train")
    valid_data = TokenDataset(config.data.valid) if config.data.valid else None
    if valid_data:
        preflight.check_dataset(valid_data, config=config, tokenizer=tokenizer, key="data.valid")
        preflight.check_separators(train_data, valid_data, tokenizer)
    if valid_data and valid_data.sha256 == train_data.sha256 and is_main(world):
        note("warning: data.valid holds the same tokens as data.train: val_loss will be that of text it trains on")
    return train_data, valid_data


def _compare_settings(config: TrainConfig, directory: Path, step: int) -> None:
    """Say which settings differ from the checkpoint's, and refuse a run that should have ended before it.

    Raises:
        ValueError: training.max_steps is below the checkpoint's step.
    """
    from transformerlm.checkpoints.load import load_config_of

    if config.training.max_steps < step:
        raise ValueError(
            f"training.max_steps ({config.training.max_steps}) is below the step of {directory} ({step}); "
            "raise it, or choose another logging.run_name"
        )
    before, now = (settings.model_dump(mode="json") for settings in (load_config_of(directory), config))
    changed = [
        f"{section}.{key} was {_shown(before[section][key])}, now {_shown(value)}"
        for section in ("data", "training", "optimizer", "schedule")
        for key, value in now[section].items()
        if value != before[section][key]
    ]
    if changed:
        note(f"resuming with other settings: {'; '.join(changed)}")


def _shown(value: object) -> object:
    return "not set" if value is None else value


def _find_checkpoint(config: TrainConfig, root: Path, *, world: World) -> Path | None:
    from transformerlm.checkpoints.directory import newest_whole, remove_leftovers, restore_links
    from transformerlm.checkpoints.validation import CheckpointError
    from transformerlm.distributed import barrier, is_main

    newest, problem = None, None
    if is_main(world):
        try:
            remove_leftovers(root)
            restore_links(root)
            newest = newest_whole(root, warn=note)
        except CheckpointError as error:  # the others will meet it, too
            problem = error
    barrier(world)  # one rank sets damaged checkpoints aside, so that the others do not meet them
    if problem:
        raise problem
    if not is_main(world):
        newest = newest_whole(root)
    if newest and config.checkpoint.resume == "never":
        raise FileExistsError(
            f'{newest}: this run has a checkpoint already, but checkpoint.resume = "never"; '
            'choose another logging.run_name, or set checkpoint.resume = "auto" to go on'
        )
    if newest is None and config.checkpoint.resume == "required":
        raise FileNotFoundError(f'{root}: no checkpoint to resume, but checkpoint.resume = "required"')
    return newest


def _make_logger(config: TrainConfig, run_dir: Path, *, trainer: Trainer) -> Logger:
    """Return the run's logger; `metrics.jsonl` forgets the steps that a stopped run logged but did not save."""
    from logger import NoopLogger, create_logger, truncate_after_step

    if trainer.runtime.world.rank != 0:
        return NoopLogger()
    metrics = run_dir / "metrics.jsonl"
    trainer.runtime.rewind = partial(truncate_after_step, metrics)
    trainer.runtime.rewind(trainer.state.step)
    return create_logger(
        config.logging.backend,
        run_name=run_dir.name,
        jsonl_path=metrics,
        run_id=trainer.wandb_id,
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
        patience=STDOUT_PATIENCE,
    )


def _announce(trainer: Trainer, run_dir: Path, *, memory: int) -> None:
    from transformerlm.checkpoints.directory import resolve
    from transformerlm.training.planning.micro_batch import sequences_per_pass
    from transformerlm.training.planning.preflight import gigabytes

    model, training, runtime = trainer.raw_model, trainer.config.training, trainer.runtime
    parameters, flops = model.num_parameters(), model.num_flops_per_token()
    tokens_per_step = training.batch_size * model.context_length
    per_pass = sequences_per_pass(training, runtime.world.world_size)
    steps = 0 if trainer.nothing_left() else training.max_steps - trainer.state.step
    with working("compiling the model" if trainer.is_compiled else "timing a step"):
        eta, compile_seconds = trainer.estimate_seconds() if steps else (0.0, 0.0)
    compiled = {"compile_seconds": compile_seconds} if trainer.is_compiled else {}
    runtime.logger.log_event(
        "started",
        step=trainer.state.step,
        parameters=parameters,
        tokens_per_step=tokens_per_step,
        micro_batch_size=per_pass,
        flops_per_token=flops,
        memory_estimate_bytes=memory,
        max_steps=training.max_steps,
        eta_seconds=eta,
        **compiled,
        device=str(runtime.device),
        precision=runtime.precision,
        **trainer.measured_on(),
    )
    if trainer.state.step:
        note(f"resumed at step {trainer.state.step:,}")
    elif path := trainer.config.checkpoint.init_from:
        note(f"begins with the weights of {described(path, resolve(path))}")
    size = f"{parameters:,} parameters, {flops / 1e6:,.1f} MFLOPs per token"
    note(f"{run_dir}: {size}, about {gigabytes(memory)} of memory")
    passes = f", {per_pass} of {training.batch_size} sequences at a time" if per_pass < training.batch_size else ""
    where = f"on {runtime.device} in {runtime.precision}"
    if compiled and steps:
        note(f"compiled in {compile_seconds:.0f} s")
    if steps:
        until = f", or training.max_time = {training.max_time}" if training.max_time else ""
        note(f"{steps:,} steps of {tokens_per_step:,} tokens{passes}{until} {where}, ETA {clock(eta)}")


def _sample_hooks(trainer: Trainer) -> list[Hook]:
    """Return a hook that generates text from each prompt, when samples are asked for.

    Raises:
        ValueError: a prompt from which nothing can be generated.
    """
    from transformerlm.training.runtime import Hook

    samples = trainer.config.samples
    if not samples.interval:
        return []
    from transformerlm.checkpoints.document_ids import guess_ids, ids_of_data
    from transformerlm.inference.predictor import Predictor

    document_ids = ids_of_data(trainer.train_data, trainer.tokenizer) or guess_ids(trainer.tokenizer)
    settings = {**samples.sampling.model_dump(), "allow_special": samples.allow_special}
    for prompt in samples.prompts:  # nothing is generated before the first token is asked for
        Predictor(trainer.raw_model, trainer.tokenizer, document_ids).stream(prompt, seed=0, **settings)

    def sample(step: int, model: TransformerLM) -> None:
        predictor = Predictor(model, trainer.tokenizer, document_ids)
        trainer.runtime.doing("sampling")
        for prompt in samples.prompts:
            text = "".join(predictor.stream(prompt, seed=step, **settings))
            record = {"event": "sample", "step": step, "text.prompt": prompt, "text.output": text}
            trainer.runtime.logger.log_record(record)
            note(framed(f"step {step:,}", prompt + text))

    return [Hook(samples.interval, sample)]
