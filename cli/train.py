"""`transformerlm-train`: parse, check, build, train."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cli.utils import EXIT_SIGINT, Command, Progress, clock, note
from cli.utils import main as run_command
from config.io import dump_toml
from config.train import TrainConfig

if TYPE_CHECKING:
    from logger import Logger
    from transformerlm.distributed import World
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training.trainer import Hook, Trainer

EXIT_SIGTERM = 143


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(Command("transformerlm-train", TrainConfig, train), argv)


def train(config: TrainConfig) -> int:
    """Train as the configuration says, and return the exit code.

    Nothing is written before everything that can be checked is checked.
    """
    from transformerlm.distributed import init_from_env, is_main, shutdown
    from transformerlm.utils.lock import DirectoryLock

    signals = StopSignals()
    with ExitStack() as stack:
        world = init_from_env()
        stack.callback(shutdown, world)
        run_dir = config.runs_dir / (config.logging.run_name or time.strftime("%Y%m%d-%H%M%S"))
        if is_main(world):
            stack.enter_context(DirectoryLock(run_dir))
        trainer, memory = _prepare(config, run_dir, world=world, stop=lambda: signals.received is not None)
        logger = trainer.runtime.logger = _make_logger(config, run_dir, trainer=trainer)
        stack.callback(logger.close)
        if is_main(world):
            _announce(trainer, run_dir, memory=memory)
            trainer.runtime.progress = Progress(config.training.max_steps, start=trainer.state.step)
            trainer.runtime.hooks = _sample_hooks(config, trainer.tokenizer, logger)
            (run_dir / "config.toml").write_text(dump_toml(config), encoding="utf-8")
        if config.wandb.log_artifacts:
            logger.log_artifact(config.data.tokenizer, name=f"{run_dir.name}-tokenizer", type="tokenizer")
        if trainer.state.step:
            logger.log_event("resumed", step=trainer.state.step)
        stack.enter_context(signals)  # before this there is nothing to save: an interrupt ends at once
        state = trainer.train()
        if state.step < config.training.max_steps and signals.received is None:
            limit = config.training.max_time
            note(f"stopped by training.max_time = {limit} at step {state.step}; the same command goes on")
    return signals.exit_code


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to save and stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """Return 0, 130 after SIGINT or 143 after SIGTERM."""
        return {None: 0, signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}[self.received]

    def __enter__(self) -> StopSignals:
        self._previous = {name: signal.signal(name, self._receive) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        note(f"{self.received.name}: saving after this step; once more to stop at once without saving")
        for name in self._previous:
            signal.signal(name, signal.SIG_DFL)


def _prepare(config: TrainConfig, run_dir: Path, *, world: World, stop: Callable[[], bool]) -> tuple[Trainer, int]:
    """Check the facts of the world, build the trainer, and resume it where the run has a checkpoint.

    Returns the trainer, which has no logger yet, and the estimated bytes of a step.
    """
    from logger import NoopLogger
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training import preflight
    from transformerlm.training.data import TokenDataset
    from transformerlm.training.trainer import Runtime, Trainer
    from transformerlm.utils.device import resolve_device
    from transformerlm.utils.dtypes import resolve_precision

    tokenizer = Tokenizer.from_directory(config.data.tokenizer)
    preflight.check_vocab_size(tokenizer, config.model.vocab_size)
    train_data = TokenDataset(config.data.train)
    preflight.check_dataset(train_data, config=config, tokenizer=tokenizer, key="data.train")
    valid_data = TokenDataset(config.data.valid) if config.data.valid else None
    if valid_data:
        preflight.check_dataset(valid_data, config=config, tokenizer=tokenizer, key="data.valid")
    device = resolve_device(config.training.device)
    precision = resolve_precision(config.training.precision, device)
    memory = preflight.check_memory(config, device=device, precision=precision, world_size=world.world_size)
    preflight.check_disk(run_dir, config.model.model_dump())
    newest = _find_checkpoint(config, run_dir / "checkpoints", world=world)
    runtime = Runtime(device=device, precision=precision, logger=NoopLogger(), world=world, stop=stop)
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
    return trainer, memory["total"]


def _compare_settings(config: TrainConfig, directory: Path, step: int) -> None:
    """Say which settings differ from the checkpoint's, and refuse a run that should have ended before it.

    Raises:
        ValueError: training.max_steps is below the checkpoint's step.
    """
    from transformerlm.training.checkpoint import load_config_of

    if config.training.max_steps < step:
        raise ValueError(
            f"training.max_steps ({config.training.max_steps}) is below the step of {directory} ({step}); "
            "raise it, or choose another logging.run_name"
        )
    before, now = (settings.model_dump(mode="json") for settings in (load_config_of(directory), config))
    changed = [
        f"{section}.{key} was {before[section][key]}, now {value}"
        for section in ("data", "training", "optimizer", "schedule")
        for key, value in now[section].items()
        if value != before[section][key]
    ]
    if changed:
        note(f"resuming with other settings: {'; '.join(changed)}")


def _find_checkpoint(config: TrainConfig, root: Path, *, world: World) -> Path | None:
    from transformerlm.distributed import barrier, is_main
    from transformerlm.training import checkpoint

    newest = None
    if is_main(world):
        checkpoint.remove_leftovers(root)
        newest = checkpoint.newest_whole(root, warn=note)
    barrier(world)  # one rank sets damaged checkpoints aside, so that the others do not meet them
    if not is_main(world):
        newest = checkpoint.newest_whole(root)
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
    truncate_after_step(metrics, trainer.state.step)
    return create_logger(
        config.logging.backend,
        run_name=run_dir.name,
        jsonl_path=metrics,
        run_id=trainer.wandb_id,
        wandb_entity=config.wandb.entity,
        wandb_project=config.wandb.project,
        config=config.model_dump(mode="json"),
    )


def _announce(trainer: Trainer, run_dir: Path, *, memory: int) -> None:
    from transformerlm.training.preflight import gigabytes

    model, training, runtime = trainer.raw_model, trainer.config.training, trainer.runtime
    parameters, flops = model.num_parameters(), model.num_flops_per_token()
    tokens_per_step = training.batch_size * model.context_length
    steps = training.max_steps - trainer.state.step
    eta = steps * trainer.measure_step_seconds() if steps else 0.0
    runtime.logger.log_event(
        "started",
        step=trainer.state.step,
        parameters=parameters,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops,
        memory_estimate_bytes=memory,
        max_steps=training.max_steps,
        eta_seconds=eta,
        device=str(runtime.device),
        precision=runtime.precision,
    )
    if trainer.state.step:
        note(f"resumed at step {trainer.state.step:,}")
    note(f"{run_dir}: {parameters:,} parameters, {flops / 1e6:,.1f} MFLOPs per token, about {gigabytes(memory)}")
    note(f"{steps:,} steps of {tokens_per_step:,} tokens on {runtime.device} in {runtime.precision}, ETA {clock(eta)}")


def _sample_hooks(config: TrainConfig, tokenizer: Tokenizer, logger: Logger) -> list[Hook]:
    """Return a hook that generates text from each prompt, when samples are asked for."""
    from transformerlm.training.trainer import Hook

    if not config.samples.interval:
        return []
    from transformerlm.inference.predictor import Predictor

    settings = config.samples.sampling.model_dump()

    def sample(step: int, model: TransformerLM) -> None:
        predictor = Predictor(model, tokenizer)
        for prompt in config.samples.prompts:
            text = "".join(predictor.stream(prompt, seed=step, **settings))
            logger.log_record({"event": "sample", "step": step, "text.prompt": prompt, "text.output": text})
            note(f"step {step} sample: {prompt + text!r}")

    return [Hook(config.samples.interval, sample)]


if __name__ == "__main__":
    main(sys.argv[1:])
