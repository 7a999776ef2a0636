"""Parameters, FLOPs and memory of a model by arithmetic, from its settings, without building it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from transformerlm.models.attention import num_kept_probabilities
from transformerlm.models.layers import feed_forward
from transformerlm.models.settings import ModelSettings
from transformerlm.utils.row_blocks import logits_at_once

# Measured on Linux (docs/usage.md): the libraries' code and tables, the holes that activations leave in the C library's
# heap, and how many more times the size of the logits is taken.
_CPU_LIBRARIES = 200_000_000
_CPU_HOLES = 0.15
_CPU_LOGITS_AGAIN = {2: 1, 4: 2}  # by the bytes of a number


def count_parameters(model: ModelSettings) -> int:
    """Return the number of trainable numbers of `TransformerLM(model)`; a tied embedding counts once."""
    return sum(parameters_by_part(model).values())


def parameters_by_part(model: ModelSettings) -> dict[str, int]:
    """Return the numbers in the embeddings, attention, feed_forward, norms and head; a tied head has none."""
    d_model, num_layers = model.d_model, model.num_layers
    norm_position = model.norm_position
    qk_norms = 2 * model.d_head if model.qk_norm else 0
    norms = 2 * d_model if norm_position != "none" else 0
    final_norm = d_model if norm_position == "pre" else 0
    return {
        "embeddings": model.vocab_size * d_model,
        "attention": num_layers * _attention_matrices(model),
        "feed_forward": num_layers * _feed_forward_matrices(model),
        "norms": num_layers * (qk_norms + norms) + final_norm,
        "head": 0 if model.tie_embeddings else model.vocab_size * d_model,
    }


def flops_per_token(model: ModelSettings, seq_len: int) -> int:
    """Return the FLOPs of one forward and backward pass per token, `6 N + 12 num_layers d_model seq_len`.

    N counts the matrices a token is multiplied with: those of the layers, and the head (tied or not), but not the
    embedding, which is looked up, nor the norms. The second term is attention's two products; the half that a causal
    mask hides is counted, as usual (Chowdhery et al. 2022, appendix B). Recomputation is not counted.
    """
    matrices = model.num_layers * (_attention_matrices(model) + _feed_forward_matrices(model))
    matrices += model.vocab_size * model.d_model
    return int(6 * matrices + 12 * model.num_layers * model.d_model * seq_len)


def checkpoint_bytes(model: ModelSettings, *, optimizer: str = "adamw") -> int:
    """Return the bytes of a checkpoint's tensors, weights and optimizer states in fp32, for any number of ranks."""
    numbers = count_parameters(model) + _num_optimizer_states(model, optimizer, shard_size=1)
    return 4 * numbers


def estimate_training_memory(
    model: ModelSettings,
    *,
    micro_batch_size: int,
    precision: str = "fp32",
    optimizer: str = "adamw",
    device_type: str = "cpu",
    num_ranks: int = 1,
    shard_size: int = 1,
) -> dict[str, int]:
    """Return the bytes that training needs on one rank: weights, gradients, optimizer, ..., and their total.

    - Weights, gradients and optimizer states are fp32. `shard_size` of the ranks share one copy: of each tensor a rank
      holds its share of the rows, rounded up. With "bf16" and one rank, `weights` includes the bfloat16 copies that
      autocast keeps during a step.
    - `gathered` is what FSDP2 holds for a time besides a rank's share; 0 for one rank, which does without it.
    - `activations` are what the forward pass saves for the backward pass.
    - `logits` are those that the loss holds at a time.
    - `overhead` is what libraries and allocator take besides, on a CPU only.
    """
    tokens = micro_batch_size * model.context_length
    compute_bytes = 2 if precision == "bf16" else 4
    own = _num_own(_all_shapes(model), shard_size)
    has_copies = precision == "bf16" and num_ranks == 1
    copies = (count_parameters(model) - model.vocab_size * model.d_model) * 2 if has_copies else 0
    parts = {
        "weights": 4 * own + copies,
        "gradients": 4 * own,
        "optimizer": 4 * _num_optimizer_states(model, optimizer, shard_size=shard_size),
        "gathered": _gathered_bytes(model, compute_bytes, shard_size) if num_ranks > 1 else 0,
        "activations": tokens * _activation_bytes_per_token(model, compute_bytes, device_type),
        "logits": compute_bytes * min(tokens * model.vocab_size, logits_at_once(device_type)),
    }
    parts["overhead"] = 0
    if device_type == "cpu":
        again = _CPU_LOGITS_AGAIN[compute_bytes] * parts["logits"]
        parts["overhead"] = _CPU_LIBRARIES + int(_CPU_HOLES * parts["activations"]) + again
    return {**parts, "total": sum(parts.values())}


def _gathered_bytes(model: ModelSettings, compute_bytes: int, shard_size: int) -> int:
    """Count what FSDP2 gathers on a rank: the root for the whole step, and blocks one after the other.

    Backward holds the weights of a block and of the next one, which it fetches ahead, the block's gradients, and once
    more in fp32 the gradients that are being summed over the ranks. The weights fetched and the gradients summed are in
    one buffer of equal shares. At the end of backward the root's gradients are summed in the same way. In bf16 the
    norms of the blocks belong to the root, which stays fp32.
    """
    block, root = _block_shapes(model), _root_shapes(model)
    norms = _norm_shapes(model)
    if compute_bytes == 4:
        block = block + norms
    else:
        root = root + norms * model.num_layers
    blocks = _num_own(block, 1) * 2 * compute_bytes
    blocks += shard_size * _num_own(block, shard_size) * (compute_bytes + 4)
    summed = shard_size * _num_own(root, shard_size) * 4
    return _num_own(root, 1) * (4 + 4) + max(blocks, summed)


def _num_own(shapes: Iterable[tuple[int, int]], shard_size: int) -> int:
    """Count the numbers of matrices `(rows, columns)` on the first of `shard_size` ranks, which never has fewer."""
    return sum(math.ceil(rows / shard_size) * columns for rows, columns in shapes)


def _num_optimizer_states(model: ModelSettings, optimizer: str, *, shard_size: int) -> int:
    """Count AdamW's two numbers a parameter, and SGD's momentum; Muon has one number for the blocks' matrices."""
    own = _num_own(_all_shapes(model), shard_size)
    blocks = _num_own((shape for shape in _block_shapes(model) if shape[1] > 1), shard_size) * model.num_layers
    with_one = {"adamw": 0, "muon": blocks, "sgd": own}
    return 2 * own - with_one[optimizer]


def _block_shapes(model: ModelSettings) -> list[tuple[int, int]]:
    """Return the rows and columns of a block's attention and feed-forward layer; a vector has one column."""
    d_model, d_kv, d_ff = model.d_model, model.d_kv, model.d_ff
    attention = [(d_model, d_model), (d_kv, d_model), (d_kv, d_model), (d_model, d_model)]
    attention += [(model.d_head, 1)] * (2 if model.qk_norm else 0)
    return [*attention, *[(d_ff, d_model)] * len(feed_forward(model.ffn).UP), (d_model, d_ff)]


def _norm_shapes(model: ModelSettings) -> list[tuple[int, int]]:
    """Return the shapes of a block's norms before or after its two halves."""
    return [] if model.norm_position == "none" else [(model.d_model, 1)] * 2


def _root_shapes(model: ModelSettings) -> list[tuple[int, int]]:
    """Return the shapes of what is in no block: embedding, head and the last norm."""
    matrices = [(model.vocab_size, model.d_model)] * (1 if model.tie_embeddings else 2)
    return matrices + [(model.d_model, 1)] * (model.norm_position == "pre")


def _all_shapes(model: ModelSettings) -> list[tuple[int, int]]:
    return [*_root_shapes(model), *(_block_shapes(model) + _norm_shapes(model)) * model.num_layers]


def _activation_bytes_per_token(model: ModelSettings, compute_bytes: int, device_type: str) -> int:
    num_layers: int = model.num_layers
    d_model: int = model.d_model
    layer = _layer_activation_bytes_per_token(model, compute_bytes, device_type)
    if model.activation_checkpointing:
        # One layer's activations are alive at a time, and of every other layer its input alone.
        return layer + num_layers * d_model * 4
    return num_layers * layer + 2 * d_model * 4


def _layer_activation_bytes_per_token(model: ModelSettings, compute_bytes: int, device_type: str) -> int:
    """Count what one layer saves, tensor by tensor, as the code of `layers` and `attention` computes it."""
    d_model, d_ff, d_kv = model.d_model, model.d_ff, model.d_kv
    cast = compute_bytes if compute_bytes == 2 else 0
    norms = 0 if model.norm_position == "none" else 2 * d_model * 4  # what is normed
    inputs = 2 * d_model * (compute_bytes if cast else 4)  # of attention and of the feed-forward layer
    heads = (2 * d_model + 2 * d_kv) * compute_bytes  # query, key, value, and the attention's result
    qk_norms = (d_model + d_kv) * compute_bytes if model.qk_norm else 0
    hidden = feed_forward(model.ffn).NUM_KEPT * d_ff * compute_bytes
    masks = 2 * d_model if model.dropout_at("residual") else 0  # what is dropped, a byte a number
    scores = 0
    if model.dropout_at("attention"):
        # As below, with what is dropped, and the rest scaled, which is multiplied with the values.
        scores = model.num_heads * model.context_length * (8 + compute_bytes + 1)
    elif model.attention == "reference":
        # The exponentials, the probabilities in fp32, and in the compute dtype when that is another; plus the mask.
        scores = model.num_heads * model.context_length * (8 + cast)
    elif model.document_mask and device_type != "cuda":
        # The mask as numbers of the compute dtype, which the kernel keeps for each layer.
        scores = model.context_length * compute_bytes
    elif device_type == "cpu" and cast:
        kept = num_kept_probabilities(model.context_length, model.d_head)
        scores = model.num_heads * kept * compute_bytes // model.context_length
    return int(norms + inputs + heads + qk_norms + hidden + masks + scores)


def _attention_matrices(model: ModelSettings) -> int:
    return int(2 * model.d_model * (model.d_model + model.d_kv))


def _feed_forward_matrices(model: ModelSettings) -> int:
    num_matrices = len(feed_forward(model.ffn).UP) + 1
    return int(num_matrices * model.d_model * model.d_ff)
