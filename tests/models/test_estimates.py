"""Arithmetic about a model against the model itself."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from transformerlm.distributed.rows import own_rows
from transformerlm.models.dropout import num_keys
from transformerlm.models.estimates import (
    checkpoint_bytes,
    count_parameters,
    count_trained,
    estimate_training_memory,
    flops_per_token,
    parameter_shapes,
    parameters_by_part,
)
from transformerlm.models.fine_tuning import FineTuning
from transformerlm.models.lora import fine_tune
from transformerlm.models.settings import ModelSettings
from transformerlm.models.transformer import TransformerLM

MODEL = {"vocab_size": 300, "context_length": 64, "d_model": 128, "num_layers": 3, "num_heads": 4}


PARTS = {"norms": r"ln|_norm", "embeddings": "token_", "attention": "attn", "feed_forward": "ffn", "head": "lm_head"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"num_kv_heads": 2, "qk_norm": True},
        {"norm_position": "post", "ffn": "silu"},
        {"norm_position": "none", "d_ff": 100, "num_kv_heads": 1},
        {"num_kv_heads": 2, "d_head": 24},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(changes: dict[str, Any]) -> None:
    """The count equals that of the model, and needs no model."""
    model = TransformerLM(**MODEL, **changes, device="meta")
    expected = sum(p.numel() for p in model.parameters())
    assert count_parameters(ModelSettings(**MODEL, **changes)) == expected == model.num_parameters()
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        found[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += parameter.numel()
    assert parameters_by_part(ModelSettings(**MODEL, **changes)) == found


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "tie_embeddings": True}, {"ffn": "silu"}, {"d_head": 24}])
def test_flops_equal_those_torch_counts(changes: dict[str, Any]) -> None:
    """6 N + 12 num_layers d_query seq_len is what torch's own counter sees, to the last operation.

    The counter is given the written-out attention, which multiplies masked scores too, as the formula counts them.
    """
    model = TransformerLM(**MODEL, **changes, attention="reference")
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 300, (2, 64))).sum().backward()
    assert counter.get_total_flops() == model.num_flops_per_token() * 2 * 64


def saved_bytes(model: TransformerLM, ids: torch.Tensor, precision: str, *, more_keys: int = 0) -> int:
    """The bytes autograd keeps between the forward and the backward pass, weights omitted."""
    kept = {}
    weights = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.ndim == 2}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    enabled = precision == "bf16"
    keys = torch.randint(2**31, (num_keys(len(model.layers)) + more_keys, len(ids), 2), dtype=torch.int32)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled),
    ):
        logits = model(ids, dropout_keys=keys)
    assert logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "reference"},
        {"num_kv_heads": 1, "qk_norm": True},
        {"num_kv_heads": 2, "qk_norm": True, "d_head": 40},
        {"ffn": "silu"},
        {"dropout": {"embedding": 0.1, "residual": 0.1}},
        {"dropout": {"attention": 0.1}},
    ],
)
def test_activation_memory_is_near_what_autograd_saves(precision: str, changes: dict[str, Any]) -> None:
    """The estimate of activations is within 15 % of the tensors the forward pass keeps."""
    settings = ModelSettings(**MODEL, **changes)
    measured = saved_bytes(TransformerLM(settings).train(), torch.randint(0, 300, (4, 64)), precision)
    estimate = estimate_training_memory(settings, micro_batch_size=4, precision=precision)
    assert estimate["activations"] == pytest.approx(measured, rel=0.15)


def test_memory_parts_are_bytes_and_sum_to_the_total() -> None:
    """Weights and gradients take 4 bytes a parameter, AdamW 8, SGD 4, Muon 4 or 8; checkpointing saves activations."""
    model = ModelSettings(**MODEL)
    num_parameters = count_parameters(model)
    parts = estimate_training_memory(model, micro_batch_size=8)
    assert (parts["weights"], parts["gradients"]) == (4 * num_parameters, 4 * num_parameters)
    assert parts["optimizer"] == 8 * num_parameters
    assert estimate_training_memory(model, micro_batch_size=8, optimizer="sgd")["optimizer"] == 4 * num_parameters
    muon = estimate_training_memory(model, micro_batch_size=8, optimizer="muon")["optimizer"]
    hidden = sum(p.numel() for p in TransformerLM(**MODEL, device="meta").layers.parameters() if p.ndim == 2)
    assert muon == 8 * num_parameters - 4 * hidden
    assert parts["logits"] == 8 * 64 * 300 * 4
    assert estimate_training_memory(model, micro_batch_size=8000)["logits"] == 2**24 * 4  # no more at a time
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    assert parts["overhead"] == 200_000_000 + int(0.15 * parts["activations"]) + 2 * parts["logits"]
    assert estimate_training_memory(model, micro_batch_size=8, device_type="cuda")["overhead"] == 0
    bf16 = estimate_training_memory(model, micro_batch_size=8, precision="bf16")
    assert bf16["overhead"] == 200_000_000 + int(0.15 * bf16["activations"]) + bf16["logits"]
    saving = estimate_training_memory(replace(model, activation_checkpointing=True), micro_batch_size=8)
    assert saving["activations"] < parts["activations"] / 2


LORA = {"rank": 4, "alpha": 8.0, "targets": ["layers.*"]}
FINE_TUNINGS = {
    "embedding": {"freeze": ["token_embeddings"]},
    "all but the last block": {"freeze": ["token_embeddings", "lm_head", "layers.[01]"]},
    "LoRA": {"lora": LORA},
    "LoRA of attention, and the head": {"lora": {**LORA, "targets": ["layers.*.attn"], "train": ["lm_head"]}},
}
each_fine_tuning = pytest.mark.parametrize(
    "fine_tuning", list(map(FineTuning.of, FINE_TUNINGS.values())), ids=FINE_TUNINGS
)


def fine_tuned(fine_tuning: FineTuning, **changes: Any) -> TransformerLM:
    model = TransformerLM(**MODEL, **changes)
    fine_tune(model, fine_tuning)
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True, "qk_norm": True, "num_kv_heads": 2}, {"ffn": "silu"}, {"d_head": 24}]
)
@pytest.mark.parametrize("fine_tuning", [FineTuning(), FineTuning.of({"lora": LORA})], ids=["plain", "LoRA"])
def test_names_and_shapes_are_those_of_the_model(changes: dict[str, Any], fine_tuning: FineTuning) -> None:
    """They need no model, and are in its order."""
    model = fine_tuned(fine_tuning, **changes)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(ModelSettings(**MODEL, **changes), fine_tuning) == expected


@each_fine_tuning
def test_what_is_frozen_has_no_gradients_and_no_states(fine_tuning: FineTuning) -> None:
    """Gradients and states are those of the weights that are trained; all weights are there."""
    settings, model = ModelSettings(**MODEL), fine_tuned(fine_tuning)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    whole = sum(one.numel() for one in model.parameters())
    parts = estimate_training_memory(settings, micro_batch_size=2, fine_tuning=fine_tuning)
    assert count_trained(settings, fine_tuning) == trained < whole
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * whole, 4 * trained, 8 * trained)
    assert checkpoint_bytes(settings, fine_tuning=fine_tuning) == 4 * (whole + 2 * trained)
    shared: dict[str, Any] = {"micro_batch_size": 2, "num_ranks": 2, "shard_size": 2}
    with_less = estimate_training_memory(settings, **shared, fine_tuning=fine_tuning)["gathered"]
    assert with_less < estimate_training_memory(settings, **shared)["gathered"]


@each_fine_tuning
def test_flops_of_what_is_frozen_are_near_those_torch_counts(fine_tuning: FineTuning) -> None:
    """No gradient of frozen matrices, no backward pass below the first trained block; its first matrices differ."""
    model = fine_tuned(fine_tuning, attention="reference")
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 300, (2, 64))).sum().backward()
    found = flops_per_token(model.settings, 64, fine_tuning) * 2 * 64
    assert counter.get_total_flops() <= found <= 1.1 * counter.get_total_flops()
    assert found <= model.num_flops_per_token() * 2 * 64


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_lora_are_near_what_autograd_saves(precision: str, dropout: float) -> None:
    """Within 15 %, with what its dropout keeps."""
    fine_tuning = FineTuning.of({"lora": {**LORA, "rank": 16, "dropout": dropout}})
    model, settings = fine_tuned(fine_tuning).train(), ModelSettings(**MODEL)
    measured = saved_bytes(model, torch.randint(0, 300, (4, 64)), precision, more_keys=21 if dropout else 0)
    parts = estimate_training_memory(settings, micro_batch_size=4, precision=precision, fine_tuning=fine_tuning)
    assert parts["activations"] == pytest.approx(measured, rel=0.15)


CHOICES = [{}, {"tie_embeddings": True, "qk_norm": True, "num_kv_heads": 2}, {"norm_position": "post", "ffn": "silu"}]


@pytest.mark.parametrize("changes", CHOICES)
@pytest.mark.parametrize("shard_size", [2, 7, 256])
def test_a_rank_holds_its_rows_of_each_tensor(changes: dict[str, Any], shard_size: int) -> None:
    """Weights, gradients and states are those of the first rank's rows, also where others have no row left."""
    settings = ModelSettings(**MODEL, **changes)
    model = TransformerLM(settings, device="meta")
    rows = {name: len(own_rows(len(p), 0, shard_size)) * p[:1].numel() for name, p in model.named_parameters()}
    own, in_blocks = sum(rows.values()), {name for name, p in model.layers.named_parameters("layers") if p.ndim == 2}
    kept = own + sum(count for name, count in rows.items() if name not in in_blocks)
    for optimizer, states in {"adamw": 2 * own, "sgd": own, "muon": kept}.items():
        parts = estimate_training_memory(
            settings, micro_batch_size=1, optimizer=optimizer, num_ranks=256, shard_size=shard_size
        )
        assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * own, 4 * own, 4 * states)
    assert checkpoint_bytes(settings) == 4 * 3 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", CHOICES)
@pytest.mark.parametrize(("precision", "number"), [("fp32", 4), ("bf16", 2)])
def test_what_a_rank_gathers_is_the_root_and_two_blocks(changes: dict[str, Any], precision: str, number: int) -> None:
    """The root is whole, with gradients; of a block there are weights and gradients, of the next one weights.

    In bf16 the norms of the blocks are in the root. One copy on each rank is gathered, too, and one rank alone is not.
    """
    settings = ModelSettings(**MODEL, **changes)
    model = TransformerLM(settings, device="meta")
    parts = [model.layers[0].attn, model.layers[0].ffn] if precision == "bf16" else [model.layers[0]]
    block = sum(p.numel() for part in parts for p in part.parameters())
    root = sum(p.numel() for p in model.parameters()) - len(model.layers) * block
    for shard_size in (1, 2):
        parts = estimate_training_memory(
            settings, micro_batch_size=1, precision=precision, num_ranks=2, shard_size=shard_size
        )
        assert parts["gathered"] == 8 * root + block * (3 * number + 4)
    assert estimate_training_memory(settings, micro_batch_size=1, precision=precision)["gathered"] == 0


def test_several_ranks_keep_no_copies_in_bf16() -> None:
    """The blocks' weights are gathered in bf16, one after the other, so autocast has nothing to copy."""

    def weights(precision: str, num_ranks: int) -> int:
        settings = ModelSettings(**MODEL)
        parts = estimate_training_memory(settings, micro_batch_size=1, precision=precision, num_ranks=num_ranks)
        return parts["weights"]

    assert weights("bf16", 2) == weights("fp32", 2)
    assert weights("bf16", 1) > weights("fp32", 1)


def test_the_root_is_summed_once_the_blocks_are_gone() -> None:
    """With a large vocabulary the end of backward is what takes most: the root's gradients in fp32 once more."""
    settings = ModelSettings(**MODEL | {"vocab_size": 20_000, "num_layers": 1})
    root = 2 * 20_000 * 128 + 128
    parts = estimate_training_memory(settings, micro_batch_size=1, num_ranks=2, shard_size=2)
    assert parts["gathered"] == (8 + 4) * root
