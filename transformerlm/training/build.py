"""What a run is built of, by its configuration: model, optimizer, the sizes of its batches, the bytes of its tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config.train import TrainConfig, TrainingConfig
from transformerlm.checkpoints.load import fine_tuning_of
from transformerlm.distributed.sharding import Shards, Unit, shard_model
from transformerlm.distributed.world import World
from transformerlm.models.layers import RMSNorm
from transformerlm.models.lora import fine_tune
from transformerlm.models.transformer import TransformerLM
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.training.data import TrainingRows
from transformerlm.training.document_rows import DocumentRows
from transformerlm.training.muon import Muon, muon_groups
from transformerlm.training.optim import SGD, AdamW, parameter_groups
from transformerlm.training.run_data import RunData
from transformerlm.training.sharded_muon import ShardedMuon
from transformerlm.utils.dtypes import Precision
from transformerlm.utils.seed import seed_everything


def build_model(config: TrainConfig, *, device: torch.device) -> TransformerLM:
    """Seed all random generators, and return the model with initial weights, ready for what [fine_tuning] says.

    Raises:
        ValueError: [fine_tuning] names what the model does not have.
    """
    seed_everything(config.training.seed)
    return _model(config).to(device)


def _model(config: TrainConfig, **place: Any) -> TransformerLM:
    model = TransformerLM(**config.model.model_dump(), **place)
    fine_tune(model, fine_tuning_of(config))
    return model


def build_shards(
    config: TrainConfig,
    *,
    device: torch.device,
    precision: Precision,
    world: World,
    shard_size: int,
    compiled: bool = False,
    draw: bool = True,
) -> tuple[TransformerLM, Shards]:
    """Return the model of a world of several ranks, cut among them; its initial weights are those of one process.

    Rank 0 draws them on the CPU, in the order in which one process does; without `draw`, weights have no values yet.
    With `compiled`, what FSDP2 gathers at once is compiled at once: its hooks would break up a larger graph.
    """
    seed_everything(config.training.seed)
    model = _model(config, device="meta")
    in_bf16 = precision == "bf16"
    units = [unit for layer in model.layers for unit in _units(layer, in_bf16=in_bf16)]
    exact = {one for unit in units if not unit.in_bf16 for module in unit.modules for one in module.modules()}
    for module in (module for unit in units for module in unit.modules if compiled):
        if not in_bf16 or exact.isdisjoint(module.modules()):
            module.compile()
    shards = shard_model(model, units, world=world, shard_size=shard_size, device=device)
    if draw:
        world.arrive("the initial weights")
        shards.fill_from_rank_zero(_model(config) if world.rank == 0 else None)
    return model, shards


def _units(layer: nn.Module, *, in_bf16: bool) -> list[Unit]:
    """Return what is gathered together of a block: all of it, or in bf16 its matrices; norms stay fp32, to be exact."""
    if not in_bf16:
        return [Unit([layer])]
    parts = dict(layer.named_children())
    norms = [module for module in parts["attn"].children() if isinstance(module, RMSNorm)]  # of queries and keys
    return [*([Unit(norms)] if norms else []), Unit([parts["attn"], parts["ffn"]], in_bf16=True)]


def build_optimizer(
    model: TransformerLM, config: TrainConfig, *, precision: Precision = "fp32", shards: Shards | None = None
) -> Optimizer:
    """Return the optimizer that the configuration names, over the model's parameters or the rows that are here."""
    settings = config.optimizer
    shards = shards or Shards.whole(model)
    decay, betas = settings.weight_decay, (settings.beta1, settings.beta2)
    if settings.name == "muon":
        groups = shards.groups(muon_groups(model, weight_decay=decay))
        keywords: dict[str, Any] = {
            "momentum": 0.95 if settings.momentum is None else settings.momentum,
            "betas": betas,
            "eps": settings.eps,
            "precision": precision,
        }
        if shards.shard_size > 1:
            return ShardedMuon(groups, settings.learning_rate, shards=shards, **keywords)
        return Muon(groups, settings.learning_rate, **keywords)
    groups = shards.groups(parameter_groups(model, weight_decay=decay))
    if settings.name == "sgd":
        return SGD(groups, settings.learning_rate, momentum=settings.momentum or 0.0)
    return AdamW(groups, settings.learning_rate, betas=betas, eps=settings.eps)


def largest_share(batch_size: int, num_ranks: int) -> int:
    """Return how many sequences of a batch the rank with the most of them has; the others have as many or one less."""
    return math.ceil(batch_size / num_ranks)


def sequences_per_pass(training: TrainingConfig, world_size: int) -> int:
    """Return how many sequences one process passes through the model at once.

    Raises:
        ValueError: it is "auto", which `planning.micro_batch.resolve` replaces by a number.
    """
    if training.micro_batch_size == "auto":
        raise ValueError(
            'training.micro_batch_size: expected a number, found "auto"; choose one with micro_batch.resolve'
        )
    share = largest_share(training.batch_size, world_size)
    return min(training.micro_batch_size or share, share)


def num_accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return how many micro-batches each rank passes through the model in one step, of `micro_batch_size` at most.

    A batch that does not divide evenly gives micro-batches whose sizes differ by one; some may be empty.

    Raises:
        ValueError: a rank would have no sequence.
    """
    if batch_size < world_size:
        raise ValueError(
            f"training.batch_size: expected a sequence for each of the {world_size} processes, found {batch_size}; "
            f"set it to {world_size} or more, or start fewer"
        )
    return math.ceil(batch_size / (micro_batch_size * world_size))


def measured_on(config: TrainConfig, data: RunData) -> dict[str, Any]:
    """Return what makes the losses of two runs comparable: tokenizer, validation text, the part of it that counts."""
    facts: dict[str, Any] = {"tokenizer_sha256": data.tokenizer.fingerprint()}
    if data.valid is not None:
        tokens = num_validation_windows(config, len(data.valid)) * config.model.context_length
        facts |= {"valid_sha256": data.valid.sha256, "valid_tokens": tokens}
        if config.data.packing == "documents":  # rows from all over the text, others for each length of a row
            facts |= {"valid_packing": "documents", "valid_context_length": config.model.context_length}
        facts |= {"valid_mask_sha256": data.valid.mask_sha256, "document_mask": config.model.document_mask}
    return facts


def num_validation_windows(config: TrainConfig, num_tokens: int) -> int:
    """Return how many windows a validation takes from a file of `num_tokens`: those of `eval_tokens`, at least one."""
    context_length = config.model.context_length
    return min(max(1, config.training.eval_tokens // context_length), (num_tokens - 1) // context_length)


def num_validation_rows(config: TrainConfig, rows: TrainingRows) -> int:
    """Return how many rows a validation takes: windows, as above, or rows of documents."""
    if isinstance(rows, DocumentRows):
        return min(max(1, config.training.eval_tokens // config.model.context_length), len(rows))
    return num_validation_windows(config, len(rows))


def token_bytes(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Tensor:
    """Return the number of UTF-8 bytes of each id `(vocab_size,)`: 0 for special tokens and for ids without a token."""
    lengths = tokenizer.token_byte_lengths()
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)), device=device)
