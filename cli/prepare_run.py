"""A training run before its first step: checked, built, and loaded from its checkpoint; nothing is written yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.terminal import note
from config.train import TrainConfig

if TYPE_CHECKING:
    from transformerlm.distributed.sharding import Shards
    from transformerlm.distributed.world import World
    from transformerlm.models.transformer import TransformerLM
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training.prepared_run import PreparedRun
    from transformerlm.training.run_data import RunData
    from transformerlm.training.runtime import Runtime
    from transformerlm.training.saved_run import SavedRun


def prepare_run(config: TrainConfig, run_dir: Path, *, world: World) -> PreparedRun:
    """Check the facts of the world, build model and optimizer, and load the checkpoint from which the run goes on.

    The order is: what is cheap to check, then what is expensive, so that a mistake is reported soon.

    Raises:
        ValueError, OSError: a check has failed.
    """
    from logger import NoopLogger, require_backends
    from transformerlm.distributed.world import together
    from transformerlm.tokenizer.tokenizer import Tokenizer
    from transformerlm.training.build import build_optimizer, num_accumulation_steps, sequences_per_pass
    from transformerlm.training.planning import micro_batch, preflight
    from transformerlm.training.prepared_run import PreparedRun
    from transformerlm.training.runtime import Runtime
    from transformerlm.training.state import TrainState
    from transformerlm.utils.allocator import keep_freed_memory
    from transformerlm.utils.device import resolve_device
    from transformerlm.utils.dtypes import resolve_precision

    tokenizer = Tokenizer.from_directory(config.data.tokenizer)
    preflight.check_vocab_size(tokenizer, config.model.vocab_size)
    preflight.check_fine_tuning(config)
    require_backends(config.logging.backend)
    data = _open_data(config, tokenizer, world=world)
    device = resolve_device(config.training.device)
    keep_freed_memory(device)
    place: dict[str, Any] = {"device": device, "precision": resolve_precision(config.training.precision, device)}
    newest = _find_checkpoint(config, run_dir / "checkpoints", world=world)
    ranks: dict[str, Any] = {"world": world, "shard_size": _shard_size(config, world=world, **place)}
    config = micro_batch.resolve(config, resumed=newest, **ranks, **place)
    # The configuration itself stays without a micro_batch_size if it has none: the run may go on with more processes.
    size = sequences_per_pass(config.training, world.world_size)
    num_accumulation_steps(config.training.batch_size, size, world.world_size)  # raises if a rank would get nothing
    with together(world):
        memory = preflight.check_memory(config, micro_batch_size=size, **ranks, **place)
        preflight.check_disk(run_dir, config)
    runtime = Runtime(micro_batch_size=size, logger=NoopLogger(), world=world, **place)
    saved = _read_checkpoint(config, newest, data=data, runtime=runtime) if newest else None
    draw = not saved and (config.checkpoint.init_from is None or config.fine_tuning.lora is not None)
    model, shards = _build(config, runtime=runtime, shard_size=ranks["shard_size"], draw=draw)
    optimizer = build_optimizer(model, config, precision=runtime.precision, shards=shards)
    initial = None if saved else _load_initial_weights(config, tokenizer, shards)
    if saved:
        saved.load_into(shards, optimizer)
    state, wandb_id = (saved.state(config, data), saved.wandb_id) if saved else (TrainState(), None)
    facts: dict[str, Any] = {"memory_bytes": memory["total"], "initial_weights": initial}
    return PreparedRun(config, run_dir, data, model, optimizer, shards, state, wandb_id, runtime, **facts)


def _shard_size(config: TrainConfig, *, world: World, **place: Any) -> int:
    """Return how many ranks share one copy of the model; "auto" goes by the rank with the least room."""
    from transformerlm.distributed.world import all_reduce_min, together
    from transformerlm.training.planning import sharding

    here = world.local_world_size
    machines_are_equal = all_reduce_min(here, world) == -all_reduce_min(-here, world)
    sizes: dict[str, Any] = {
        "world_size": world.world_size,
        "local_world_size": here if machines_are_equal else None,
    }
    fits = sharding.memory_check_here(config, world=world, **place)
    with together(world):
        chosen = sharding.choose_shard_size(config, fits=fits, **sizes)
    return -all_reduce_min(-chosen, world)


def _build(config: TrainConfig, *, runtime: Runtime, shard_size: int, draw: bool) -> tuple[TransformerLM, Shards]:
    """Return the model, with initial weights unless ranks share it and do not `draw` them, and how they share it."""
    from transformerlm.distributed.sharding import Shards
    from transformerlm.training.build import build_model, build_shards
    from transformerlm.utils.device import should_compile

    device, world, training = runtime.device, runtime.world, config.training
    if not world.is_distributed:
        model = build_model(config, device=device)
        return model, Shards.whole(model)
    compiled = should_compile(training.compile, device, training.max_steps)
    return build_shards(
        config,
        device=device,
        precision=runtime.precision,
        world=world,
        shard_size=shard_size,
        compiled=compiled,
        draw=draw,
    )


def _open_data(config: TrainConfig, tokenizer: Tokenizer, *, world: World) -> RunData:
    """Open the run's data and check it: first what is said of it, on each rank, then its ids, shared out."""
    from transformerlm.checkpoints.document_ids import ids_of_data
    from transformerlm.distributed.world import is_main, together
    from transformerlm.token_files.dataset import TokenDataset
    from transformerlm.training.planning import preflight
    from transformerlm.training.planning.token_check import check_tokens
    from transformerlm.training.run_data import RunData, check_documents

    with together(world):
        paths = {"data.train": config.data.train, "data.valid": config.data.valid}
        opened = {key: TokenDataset(path) for key, path in paths.items() if path}
        for key, dataset in opened.items():
            preflight.check_dataset(dataset, config=config, tokenizer=tokenizer, key=key)
        train, valid = opened["data.train"], opened.get("data.valid")
        if valid:
            preflight.check_separators(train, valid, tokenizer)
    check_tokens(opened, config=config, tokenizer=tokenizer, world=world)
    if valid and valid.sha256 == train.sha256 and is_main(world):
        note("warning: data.valid holds the same tokens as data.train: val_loss will be that of text it trains on")
    known = ids_of_data(train, tokenizer)
    data = RunData(tokenizer, train, valid, known.eos_token_id if known else None)
    with together(world):
        preflight.check_validation(data, config)
        check_documents(data, config)
    return data


def _find_checkpoint(config: TrainConfig, root: Path, *, world: World) -> Path | None:
    """Return the newest whole checkpoint, as `checkpoint.resume` allows it; None for a new run.

    Raises:
        CheckpointError: there are checkpoints, but each of them is damaged.
        FileExistsError, FileNotFoundError: `checkpoint.resume` forbids a checkpoint that is there, or misses one.
    """
    from transformerlm.checkpoints.directory import newest_whole, remove_leftovers, restore_links
    from transformerlm.distributed.world import is_main, together

    with together(world):
        if is_main(world):
            remove_leftovers(root)
            restore_links(root)
    newest = newest_whole(root, warn=note, world=world)
    if newest and config.checkpoint.resume == "never":
        raise FileExistsError(
            f'{newest}: this run has a checkpoint already, but checkpoint.resume = "never"; '
            'choose another logging.run_name, or set checkpoint.resume = "auto" to go on'
        )
    if newest is None and config.checkpoint.resume == "required":
        raise FileNotFoundError(f'{root}: no checkpoint to resume, but checkpoint.resume = "required"')
    return newest


def _read_checkpoint(config: TrainConfig, directory: Path, *, data: RunData, runtime: Runtime) -> SavedRun:
    """Read the state of a checkpoint, check that it is this run's, and say which settings have changed.

    Raises:
        ValueError: it belongs to another run, or training.max_steps is below its step.
    """
    from transformerlm.checkpoints.directory import point, step_name
    from transformerlm.distributed.world import is_main
    from transformerlm.training.saved_run import SavedRun

    saved = SavedRun.read(directory)
    saved.check(config, data, runtime=runtime)
    _compare_settings(config, directory, saved.values["step"], say=note if is_main(runtime.world) else str)
    if is_main(runtime.world):  # a kill may have come before a link, and what a link names may be gone
        point(directory.parent / "latest", directory)
        if saved.best is not None:
            point(directory.parent / "best", directory.with_name(step_name(saved.best[0])))
        else:
            (directory.parent / "best").unlink(missing_ok=True)
    return saved


_SAID = {"model", "data", "training", "optimizer", "schedule", "fine_tuning"}


def _compare_settings(config: TrainConfig, directory: Path, step: int, *, say: Callable[[str], object]) -> None:
    """Say which settings differ from the checkpoint's, and refuse a run that should have ended before it.

    Raises:
        ValueError: training.max_steps is below the checkpoint's step.
    """
    from transformerlm.checkpoints.load import load_config_of
    from transformerlm.experiments.run_directories import flat_settings

    if config.training.max_steps < step:
        raise ValueError(
            f"training.max_steps ({config.training.max_steps}) is below the step of {directory} ({step}); "
            "raise it, or choose another logging.run_name"
        )
    before, now = (
        flat_settings(settings.model_dump(mode="json", include=_SAID, exclude_none=True))
        for settings in (load_config_of(directory), config)
    )
    changed = [
        f"{key} was {_shown(before.get(key))}, now {_shown(now.get(key))}"
        for key in dict.fromkeys((*now, *before))
        if now.get(key) != before.get(key)
    ]
    if changed:
        say(f"resuming with other settings: {'; '.join(changed)}")


def _shown(value: object) -> object:
    return "not set" if value is None else value


def _load_initial_weights(config: TrainConfig, tokenizer: Tokenizer, shards: Shards) -> Path | None:
    """Load the weights of `checkpoint.init_from` and return where they are; the rest is that of a new run.

    Those of a run with LoRA are merged; LoRA's matrices of this run begin anew.

    Raises:
        ValueError: the checkpoint is damaged, or of another architecture or tokenizer.
    """
    from transformerlm.checkpoints.directory import resolve
    from transformerlm.checkpoints.load import load_plain_weights
    from transformerlm.checkpoints.validation import verify
    from transformerlm.distributed.world import together
    from transformerlm.models.fine_tuning import is_lora
    from transformerlm.training import resume_checks

    if config.checkpoint.init_from is None:
        return None
    directory = resolve(config.checkpoint.init_from, world=shards.world)
    verify(directory, world=shards.world)
    resume_checks.check_same_architecture(directory, config)
    resume_checks.check_tokenizer_of_checkpoint(directory, tokenizer)
    with together(shards.world):
        load_plain_weights({name: rows for name, rows in shards.rows.items() if not is_lora(name)}, directory)
    return directory
