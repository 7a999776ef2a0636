"""What files, memory and disk must allow before a run starts; each refusal names both numbers.

The schema has checked what the file says; here the file meets the data, the tokenizer, the memory and the disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from config.train import TrainConfig
from transformerlm.checkpoints.document_ids import ids_of_data
from transformerlm.checkpoints.load import fine_tuning_of
from transformerlm.distributed.world import World
from transformerlm.models.estimates import checkpoint_bytes, trained_shapes
from transformerlm.models.settings import ModelSettings
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.build import num_validation_rows
from transformerlm.training.data import sequential_batches
from transformerlm.training.planning.micro_batch import memory_by_part, memory_of_a_rank
from transformerlm.training.reading import IGNORED
from transformerlm.training.resume_checks import check_tokenizer_of_data
from transformerlm.training.run_data import RunData, rows_of
from transformerlm.utils.device import device_memory_bytes
from transformerlm.utils.dtypes import Precision

# A checkpoint is written beside the one before it: there must be room for two, and some to spare.
_CHECKPOINTS_ON_DISK = 2.2


def check_dataset(dataset: TokenDataset, *, config: TrainConfig, tokenizer: Tokenizer, key: str) -> None:
    """Refuse data that this model and tokenizer cannot be trained on, by what is said of it; `check_tokens` reads it.

    `key` is its name in the TOML.

    Raises:
        ValueError: too short for one window, made by another tokenizer, with a separator that is none of its special
            tokens, or with nothing that is learnt.
    """
    context_length = config.model.context_length
    if dataset.num_tokens < context_length + 1 and config.data.packing == "windows":
        raise ValueError(
            f"{key}: {dataset.path} holds {dataset.num_tokens} tokens, fewer than model.context_length + 1 = "
            f"{context_length + 1}; use more text or a smaller context_length"
        )
    check_tokenizer_of_data(dataset, tokenizer, key=key, config=config)
    ids_of_data(dataset, tokenizer)
    if dataset.has_mask and not dataset.num_learnt:
        raise ValueError(
            f"{key}: {dataset.path}: expected some tokens that are learnt, found none of {dataset.num_tokens:,}; "
            "conversations need messages of the assistant"
        )


def check_validation(data: RunData, config: TrainConfig) -> None:
    """Refuse a validation whose rows hold nothing that is learnt: it would have no loss.

    Raises:
        ValueError: they do not.
    """
    if data.valid is None or not data.valid.has_mask:
        return
    rows, context_length = rows_of(data.valid, data, config=config), config.model.context_length
    num_windows = num_validation_rows(config, rows)
    batches = sequential_batches(rows, batch_size=1, context_length=context_length, max_windows=num_windows)
    if all(bool((targets == IGNORED).all()) for _, targets in batches):
        raise ValueError(
            f"data.valid: {data.valid.path}: expected something that is learnt in its first {num_windows} rows of "
            f"{context_length} tokens, found nothing; raise training.eval_tokens ({config.training.eval_tokens})"
        )


def check_separators(train: TokenDataset, valid: TokenDataset, tokenizer: Tokenizer) -> None:
    """Refuse a validation file whose documents end with another separator; the sidecars of old files do not name one.

    Raises:
        ValueError: the separators differ.
    """
    ends = [ids_of_data(dataset, tokenizer) for dataset in (train, valid)]
    if None not in ends and ends[0] != ends[1]:
        found = [dataset.metadata["separator"] for dataset in (train, valid)]
        raise ValueError(
            f"data.valid: expected documents that end with {found[0]!r}, as in data.train, found {found[1]!r}; "
            "run transformerlm-make-data with one separator for both"
        )


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model whose vocabulary is smaller than its tokenizer's.

    Raises:
        ValueError: it is.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.vocab_size ({vocab_size}) is smaller than the tokenizer's ({tokenizer.vocab_size}); "
            f"set model.vocab_size = {tokenizer.vocab_size}"
        )


def check_fine_tuning(config: TrainConfig) -> None:
    """Refuse names in [fine_tuning] that the model does not have, and a run that would train nothing.

    Raises:
        ValueError: there is such a name; the message has those that are most like it.
    """
    trained_shapes(ModelSettings(**config.model.model_dump()), fine_tuning_of(config))


def check_memory(
    config: TrainConfig,
    *,
    micro_batch_size: int,
    device: torch.device,
    precision: Precision,
    world: World | None = None,
    shard_size: int = 1,
) -> dict[str, int]:
    """Return the estimated bytes of a training step on one rank by part; a machine's ranks share the memory of its CPU.

    Raises:
        ValueError: they exceed the memory of a rank.
    """
    world = world or World()
    ranks = {"num_ranks": world.world_size, "shard_size": shard_size}
    place: Any = {"device": device, "precision": precision, **ranks}
    parts = memory_by_part(config, micro_batch_size=micro_batch_size, **place)
    available = memory_of_a_rank(device_memory_bytes(device), device, world)
    if parts["total"] > available:
        largest = max((name for name in parts if name != "total"), key=lambda name: parts[name])
        advice = _memory_advice(config, micro_batch_size, available, **place)
        each = " for each process" if device.type != "cuda" and world.is_distributed else ""
        raise ValueError(
            f"training needs about {gigabytes(parts['total'])}, but {device} has {gigabytes(available)}{each}; "
            f"most of it is {largest} ({gigabytes(parts[largest])}): {advice}"
        )
    return parts


def _memory_advice(config: TrainConfig, micro_batch_size: int, available: int, **place: Any) -> str:
    """Say what would help: nothing that is in use already, nor smaller passes where the weights alone are too much."""
    checkpointed = config.model.model_copy(update={"activation_checkpointing": True})
    thrifty = config.model_copy(update={"model": checkpointed})
    least = memory_by_part(thrifty, micro_batch_size=1, **place)["total"]
    smaller = "use a smaller model"
    if least > available:
        more = "; more GPUs can share them: see docs/distributed.md" if place["device"].type == "cuda" else ""
        return (
            f"{smaller} or vocabulary; weights, gradients and optimizer alone are too much, and with one sequence at a "
            f"time and model.activation_checkpointing it is still {gigabytes(least)}{more}"
        )
    remedies = [f"lower training.micro_batch_size ({micro_batch_size})"] if micro_batch_size > 1 else []
    if not config.model.activation_checkpointing:
        remedies.append("set model.activation_checkpointing = true")
    return ", ".join([*remedies, f"or {smaller}"])


def check_disk(run_dir: Path, config: TrainConfig) -> None:
    """Refuse a disk without room for two checkpoints, which are as large on many ranks as on one.

    Raises:
        OSError: there is too little free space where `run_dir` is, or will be.
    """
    model = ModelSettings(**config.model.model_dump())
    size = checkpoint_bytes(model, optimizer=config.optimizer.name, fine_tuning=fine_tuning_of(config))
    needed = int(_CHECKPOINTS_ON_DISK * size)
    free = shutil.disk_usage(existing_parent(run_dir)).free
    if free < needed:
        raise OSError(
            f"{run_dir}: {gigabytes(free)} free, but two checkpoints need {gigabytes(needed)}; "
            "free some space or set runs_dir to another disk"
        )


def existing_parent(path: Path) -> Path:
    """Return the path itself, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def gigabytes(num_bytes: float) -> str:
    """Return a number of bytes in words: `1.5 GB`, `300 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
