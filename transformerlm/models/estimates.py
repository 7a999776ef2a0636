"""Parameters, FLOPs and memory of a model by arithmetic, from its settings, without building it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from transformerlm.models.attention import num_kept_probabilities
from transformerlm.models.fine_tuning import FineTuning, Shape
from transformerlm.models.layers import feed_forward
from transformerlm.models.settings import ModelSettings
from transformerlm.utils.row_blocks import logits_at_once

# Measured on Linux (docs/usage.md): the libraries' code and tables, the holes that activations leave in the C library's
# heap, and how many more times the size of the logits is taken.
_CPU_LIBRARIES = 200_000_000
_CPU_HOLES = 0.15
_CPU_LOGITS_AGAIN = {2: 1, 4: 2}  # by the bytes of a number
_WHOLE = FineTuning()  # all weights are trained


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


def parameter_shapes(model: ModelSettings, fine_tuning: FineTuning = _WHOLE) -> dict[str, Shape]:
    """Return the shape of each weight of the model by its name, with the matrices of `fine_tuning`; no tied head.

    Raises:
        ValueError: `fine_tuning` means something that the model does not have.
    """
    d_model, d_query, d_kv, d_ff = model.d_model, model.d_query, model.d_kv, model.d_ff
    projections = {"q": (d_query, d_model), "k": (d_kv, d_model), "v": (d_kv, d_model), "output": (d_model, d_query)}
    block: dict[str, Shape] = {f"attn.{name}_proj": shape for name, shape in projections.items()}
    block |= {f"attn.{name}_norm": (model.d_head,) for name in "qk" if model.qk_norm}
    block |= {f"ffn.{name}": (d_ff, d_model) for name in feed_forward(model.ffn).UP} | {"ffn.w2": (d_model, d_ff)}
    block |= {name: (d_model,) for name in ("ln1", "ln2") if model.norm_position != "none"}
    shapes: dict[str, Shape] = {"token_embeddings.weight": (model.vocab_size, d_model)}
    for index in range(model.num_layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"ln_final.weight": (d_model,)} if model.norm_position == "pre" else {}
    shapes |= {} if model.tie_embeddings else {"lm_head.weight": (model.vocab_size, d_model)}
    return fine_tuning.extended(shapes)


def trained_shapes(model: ModelSettings, fine_tuning: FineTuning = _WHOLE) -> dict[str, Shape]:
    """Return the shape of each weight that is trained; raises as `parameter_shapes`, or where there is none."""
    shapes = parameter_shapes(model, fine_tuning)
    trained = fine_tuning.trained(shapes)
    return {name: shape for name, shape in shapes.items() if name in trained}


def count_trained(model: ModelSettings, fine_tuning: FineTuning = _WHOLE) -> int:
    """Return the number of numbers that are trained, those of LoRA's matrices too; raises as `trained_shapes`."""
    return _num_own(trained_shapes(model, fine_tuning).values(), 1)


def flops_per_token(model: ModelSettings, seq_len: int, fine_tuning: FineTuning = _WHOLE) -> int:
    """Return the FLOPs of one forward and backward pass per token, `6 N + 12 num_layers d_query seq_len`.

    N counts the matrices a token is multiplied with: those of the layers, and the head (tied or not), but not the
    embedding, which is looked up, nor the norms. The second term is attention's two products; the half that a causal
    mask hides is counted, as usual (Chowdhery et al. 2022, appendix B). Recomputation is not counted. A frozen matrix
    has no gradient of its own, 4 N in place of 6 N; below the first block that is trained there is no backward pass.
    """
    head = "token_embeddings.weight" if model.tie_embeddings else "lm_head.weight"
    shapes, trained = parameter_shapes(model, fine_tuning), trained_shapes(model, fine_tuning)
    blocks = [int(name.split(".")[1]) for name in trained if name.startswith("layers.")]
    first = 0 if "token_embeddings.weight" in trained else min(blocks, default=model.num_layers)
    flops = 0
    for name, shape in shapes.items():
        if name == head or (name.startswith("layers.") and len(shape) == 2):
            has_backward = name == head or int(name.split(".")[1]) >= first
            flops += (2 + 2 * has_backward + 2 * (name in trained)) * math.prod(shape)
    backward = model.num_layers - first
    return flops + (4 * model.num_layers + 8 * backward) * model.d_query * seq_len


def checkpoint_bytes(model: ModelSettings, *, optimizer: str = "adamw", fine_tuning: FineTuning = _WHOLE) -> int:
    """Return the bytes of a checkpoint's tensors, weights and optimizer states in fp32, for any number of ranks."""
    states = _num_optimizer_states(trained_shapes(model, fine_tuning), optimizer, shard_size=1)
    return 4 * (_num_own(parameter_shapes(model, fine_tuning).values(), 1) + states)


def estimate_training_memory(
    model: ModelSettings,
    *,
    micro_batch_size: int,
    precision: str = "fp32",
    optimizer: str = "adamw",
    device_type: str = "cpu",
    num_ranks: int = 1,
    shard_size: int = 1,
    fine_tuning: FineTuning = _WHOLE,
) -> dict[str, int]:
    """Return the bytes that training needs on one rank: weights, gradients, optimizer, ..., and their total.

    - Weights, gradients and optimizer states are fp32. Only weights that are trained have the last two. `shard_size`
      of the ranks share one copy: of each tensor a rank holds its share of the rows, rounded up. With "bf16" and one
      rank, `weights` includes the bfloat16 copies that autocast keeps during a step.
    - `gathered` is what FSDP2 holds for a time besides a rank's share; 0 for one rank, which does without it.
    - `activations` are what the forward pass saves for the backward pass.
    - `logits` are those that the loss holds at a time.
    - `overhead` is what libraries and allocator take besides, on a CPU only.
    """
    tokens = micro_batch_size * model.context_length
    compute_bytes = 2 if precision == "bf16" else 4
    shapes, trained = parameter_shapes(model, fine_tuning), trained_shapes(model, fine_tuning)
    has_copies = precision == "bf16" and num_ranks == 1
    copies = (_num_own(shapes.values(), 1) - model.vocab_size * model.d_model) * 2 if has_copies else 0
    kept = _activation_bytes_per_token(model, compute_bytes, device_type)
    kept += _lora_activation_bytes_per_token(model, fine_tuning, compute_bytes)
    parts = {
        "weights": 4 * _num_own(shapes.values(), shard_size) + copies,
        "gradients": 4 * _num_own(trained.values(), shard_size),
        "optimizer": 4 * _num_optimizer_states(trained, optimizer, shard_size=shard_size),
        "gathered": _gathered_bytes(shapes, trained, compute_bytes, shard_size) if num_ranks > 1 else 0,
        "activations": tokens * kept,
        "logits": compute_bytes * min(tokens * model.vocab_size, logits_at_once(device_type)),
    }
    parts["overhead"] = 0
    if device_type == "cpu":
        again = _CPU_LOGITS_AGAIN[compute_bytes] * parts["logits"]
        parts["overhead"] = _CPU_LIBRARIES + int(_CPU_HOLES * parts["activations"]) + again
    return {**parts, "total": sum(parts.values())}


def _gathered_bytes(
    shapes: Mapping[str, Shape], trained: Mapping[str, Shape], compute_bytes: int, shard_size: int
) -> int:
    """Count what FSDP2 gathers on a rank: the root for the whole step, and blocks one after the other.

    Backward holds the weights of a block and of the next one, which it fetches ahead, the block's gradients, and once
    more in fp32 the gradients that are being summed over the ranks. The weights fetched and the gradients summed are in
    one buffer of equal shares. At the end of backward the root's gradients are summed in the same way. In bf16 the
    norms of the blocks belong to the root, which stays fp32.
    """
    parts: dict[str, list[str]] = {}
    for name in shapes:
        is_norm = name.endswith((".ln1.weight", ".ln2.weight"))
        in_block = name.startswith("layers.") and not (is_norm and compute_bytes == 2)
        parts.setdefault(name.split(".")[1] if in_block else "root", []).append(name)
    root = parts.pop("root")
    weights = {key: [shapes[name] for name in names] for key, names in parts.items()}
    grads = {key: [trained[name] for name in names if name in trained] for key, names in parts.items()}
    root_grads = [trained[name] for name in root if name in trained]
    blocks = max(
        (_num_own(weights[key], 1) + _num_own(grads[key], 1)) * compute_bytes
        + shard_size * (_num_own(weights[key], shard_size) * compute_bytes + _num_own(grads[key], shard_size) * 4)
        for key in parts
    )
    summed = shard_size * _num_own(root_grads, shard_size) * 4
    return 4 * (_num_own((shapes[name] for name in root), 1) + _num_own(root_grads, 1)) + max(blocks, summed)


def _num_own(shapes: Iterable[Shape], shard_size: int) -> int:
    """Count the numbers of tensors on the first of `shard_size` ranks, which never has fewer rows than the others."""
    return sum(math.ceil(shape[0] / shard_size) * math.prod(shape[1:]) for shape in shapes)


def _num_optimizer_states(trained: Mapping[str, Shape], optimizer: str, *, shard_size: int) -> int:
    """Count AdamW's two numbers a parameter, and SGD's momentum; Muon has one number for the blocks' matrices."""
    own = _num_own(trained.values(), shard_size)
    matrices = (shape for name, shape in trained.items() if name.startswith("layers.") and len(shape) == 2)
    with_one = {"adamw": 0, "muon": _num_own(matrices, shard_size), "sgd": own}
    return 2 * own - with_one[optimizer]


def _lora_activation_bytes_per_token(model: ModelSettings, fine_tuning: FineTuning, compute_bytes: int) -> int:
    """Count what LoRA's layers save besides: what B reads; with dropout, what A reads, and what of it is dropped.

    What frozen matrices read is kept only because A reads it, too. With dropout A reads something else.
    """
    lora = fine_tuning.lora
    if lora is None:
        return 0
    shapes = parameter_shapes(model)
    widths = [shapes[f"{name}.weight"][1] if lora.dropout else 0 for name in lora.layers(shapes)]
    kept = sum(lora.rank * compute_bytes + width * (compute_bytes + 1) for width in widths)
    if lora.dropout and not lora.train:
        kept -= model.num_layers * (2 * model.d_model + model.d_ff) * compute_bytes
    return kept // model.num_layers if model.activation_checkpointing else kept


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
    d_model, d_ff, d_query, d_kv = model.d_model, model.d_ff, model.d_query, model.d_kv
    cast = compute_bytes if compute_bytes == 2 else 0
    norms = 0 if model.norm_position == "none" else 2 * d_model * 4  # what is normed
    inputs = 2 * d_model * (compute_bytes if cast else 4)  # of attention and of the feed-forward layer
    heads = (2 * d_query + 2 * d_kv) * compute_bytes  # query, key, value, and the attention's result
    qk_norms = (d_query + d_kv) * compute_bytes if model.qk_norm else 0
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
    return int(2 * model.d_model * (model.d_query + model.d_kv))


def _feed_forward_matrices(model: ModelSettings) -> int:
    num_matrices = len(feed_forward(model.ffn).UP) + 1
    return int(num_matrices * model.d_model * model.d_ff)
