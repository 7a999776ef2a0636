"""LoRA: the formula, how it begins, what it trains, and the plain model that computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transformerlm.models.dropout import dropped, num_keys
from transformerlm.models.fine_tuning import FineTuning, is_lora
from transformerlm.models.lora import LoRALinear, fine_tune, num_lora_keys, plain_weights
from transformerlm.models.transformer import TransformerLM

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "context_length": 12,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 24,
}
NUM_LINEAR = 7  # in a block


def make_model(lora: dict[str, Any] | None = None, **changes: Any) -> TransformerLM:
    """Return a model with LoRA whose B is not zero any more."""
    torch.manual_seed(0)
    model = TransformerLM(**{**SIZES, **changes})
    fine_tune(model, FineTuning.of({"lora": {"rank": 3, "alpha": 6.0, "targets": ["layers.*"], **(lora or {})}}))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def some_ids(batch: int = 3) -> Tensor:
    return torch.randint(0, 40, (batch, 12), generator=torch.Generator().manual_seed(1))


def some_keys(count: int, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-(2**31), 2**31, (count, batch, 2), dtype=torch.int64, generator=generator).to(torch.int32)


def test_the_layer_is_the_formula() -> None:
    """`x W^T + scale (x A^T) B^T`, with gradients for A and B alone."""
    weight = torch.nn.Parameter(torch.randn(5, 4), requires_grad=False)
    layer = LoRALinear(weight, rank=2, scale=1.5)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 6, 4)
    found = layer(x)
    torch.testing.assert_close(found, x @ (weight + 1.5 * layer.lora_b @ layer.lora_a).T)
    torch.testing.assert_close(found, x @ layer.merged_weight().T)
    found.sum().backward()
    assert weight.grad is None
    assert layer.lora_a.grad is not None
    assert layer.lora_b.grad is not None


def test_a_is_drawn_and_b_is_zero() -> None:
    """So the model begins as the one that it was, and A's outputs are about as large as its inputs."""
    layer = LoRALinear(torch.nn.Parameter(torch.randn(50, 400)), rank=64, scale=2.0)
    assert not layer.lora_b.any()
    x = torch.randn(20, 400)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=0, atol=0)
    assert 0.8 < (x @ layer.lora_a.T).std() < 1.1
    assert layer.lora_a.abs().max() <= 3 / 20


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"qk_norm": True, "num_kv_heads": 1}, {"ffn": "silu", "norm_position": "post"}],
    ids=str,
)
def test_the_plain_model_computes_the_same(changes: dict[str, Any]) -> None:
    """Its weights have the names of a model without LoRA, and its logits are those of the layers, to rounding."""
    model = make_model(**changes)
    plain = TransformerLM(**{**SIZES, **changes})
    plain.load_state_dict(plain_weights(model))
    torch.testing.assert_close(plain(some_ids()), model(some_ids()), rtol=1e-4, atol=1e-5)
    untouched = TransformerLM(**{**SIZES, **changes})
    untouched.load_state_dict({name: one for name, one in model.state_dict().items() if not is_lora(name)})
    assert not torch.allclose(untouched(some_ids()), model(some_ids()), atol=1e-2)
    assert plain_weights(plain).keys() == plain.state_dict().keys()


def test_only_what_is_trained_has_a_gradient() -> None:
    """A, B and the weights that `train` names; the rest of the model has none."""
    model = make_model({"targets": ["layers.1.attn"], "train": ["lm_head"]})
    model(some_ids()).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {
        f"layers.1.attn.{name}_proj.{kind}" for name in ("q", "k", "v", "output") for kind in ("lora_a", "lora_b")
    }
    assert trained == expected | {"lm_head.weight"}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freezing_takes_gradients_away() -> None:
    """Weights that a pattern names get none, the others do."""
    model = TransformerLM(**SIZES)
    fine_tune(model, FineTuning(freeze=("token_embeddings", "layers.0")))
    model(some_ids()).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(("token_embeddings", "layers.0")), name


def test_a_seed_draws_the_weights_of_the_plain_model_first() -> None:
    """With the same seed, the weights beside A and B are those of a model without them."""
    torch.manual_seed(0)
    plain = TransformerLM(**SIZES).state_dict()
    model = make_model().state_dict()
    assert all(model[name].equal(plain[name]) for name in plain)


def test_what_a_reads_is_dropped_by_the_layers_own_key() -> None:
    """Each layer has a key after those of the model; without keys, as in evaluation, nothing is dropped."""
    model = make_model({"dropout": 0.4, "targets": ["layers.0.attn.q_proj", "layers.1.ffn.w2"]})
    assert num_lora_keys(model) == 2
    keys = some_keys(num_keys(2) + 2)
    seen: dict[str, Tensor] = {}
    layer = model.layers[0].attn.q_proj
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    layer.register_forward_hook(lambda module, args, output: seen.update(y=output))
    model(some_ids(), dropout_keys=keys)
    gone = dropped(keys[num_keys(2)], (12, 16), 0.4)
    x = torch.where(gone, 0.0, seen["x"] / 0.6)
    torch.testing.assert_close(seen["y"], seen["x"] @ layer.weight.T + 2.0 * x @ layer.lora_a.T @ layer.lora_b.T)
    others = keys.clone()
    others[-1] += 1
    assert not torch.equal(model(some_ids(), dropout_keys=others), model(some_ids(), dropout_keys=keys))
    model.eval()
    plain = TransformerLM(**SIZES).eval()
    plain.load_state_dict(plain_weights(model))
    torch.testing.assert_close(model(some_ids()), plain(some_ids()), rtol=1e-4, atol=1e-5)


def test_training_with_dropout_needs_keys() -> None:
    """A model in training that got none would silently drop nothing."""
    model = make_model({"dropout": 0.4})
    with pytest.raises(ValueError, match="expected dropout_keys, as LoRA has dropout and is in training"):
        model(some_ids())
    with torch.no_grad():
        model(some_ids())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(dropout: float) -> None:
    """`activation_checkpointing` changes no gradient, with frozen weights and with LoRA's dropout."""
    gradients = []
    for recompute in (False, True):
        model = make_model({"dropout": dropout}, activation_checkpointing=recompute)
        keys = some_keys(num_keys(2) + num_lora_keys(model)) if dropout else None
        model(some_ids(), dropout_keys=keys).square().mean().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    assert len(gradients[0]) == 2 * 2 * NUM_LINEAR
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_it_compiles(recompute: bool) -> None:
    """A compiled model gives the same logits and gradients, with dropout, step after step."""
    model = make_model({"dropout": 0.3}, activation_checkpointing=recompute)
    compiled = torch.compile(model)
    for seed in range(3):
        keys = some_keys(num_keys(2) + 2 * NUM_LINEAR) + seed
        results = []
        for one in (model, compiled):
            model.zero_grad()
            logits = one(some_ids(), dropout_keys=keys)
            logits.square().mean().backward()
            results.append([logits, *(weight.grad for weight in model.parameters() if weight.requires_grad)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
