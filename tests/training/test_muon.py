"""Muon against its formulas, the singular values of its update, and AdamW for everything else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformerlm.models.transformer import TransformerLM
from transformerlm.training import muon, optim
from transformerlm.training.muon import Muon, muon_groups, orthogonalize
from transformerlm.training.optim import AdamW
from transformerlm.utils.plain_forms import plain_forms

MODEL = {"vocab_size": 40, "context_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 40}
SETTINGS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "betas": (0.8, 0.95), "eps": 1e-7}
DECAY = 0.3


def make_model(**changes: Any) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(**MODEL, **changes)


def make_muon(model: TransformerLM, **changes: Any) -> Muon:
    return Muon(muon_groups(model, weight_decay=DECAY), **{**SETTINGS, **changes})


def set_gradients(model: nn.Module, step: int) -> None:
    """Set gradients that depend on the weights, so that an error would grow."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = p.detach() * 0.3 + torch.randn(p.shape, generator=generator)


def plain_muon(weight: Tensor, grad: Tensor, momentum: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """The formulas of the papers for one matrix, one line each; the new weight and momentum."""
    momentum = SETTINGS["momentum"] * momentum + grad
    x = grad + SETTINGS["momentum"] * momentum
    x = x / (1.02 * x.norm())
    for a, b, c in muon._COEFFICIENTS:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    scale = 0.2 * max(weight.shape) ** 0.5
    return weight - lr * (scale * x + DECAY * weight), momentum


def test_equals_the_plain_formulas_and_adamw_over_20_steps() -> None:
    """The blocks' matrices, wide, tall and square, follow the formulas; every other weight is AdamW's, exactly."""
    model, other = make_model(qk_norm=True), make_model(qk_norm=True)
    hidden = [name for name, p in model.layers.named_parameters(prefix="layers") if p.ndim == 2]
    expected = {name: model.get_parameter(name).detach().double() for name in hidden}
    momenta = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    optimizer = make_muon(model)
    groups = optim.parameter_groups(other, weight_decay=DECAY)
    adamw = AdamW(groups, betas=SETTINGS["betas"], eps=SETTINGS["eps"])
    for step in range(20):
        set_gradients(model, step)
        for name, p in other.named_parameters():
            p.grad = model.get_parameter(name).grad.clone()
        for name in hidden:
            gradient = model.get_parameter(name).grad.double()
            expected[name], momenta[name] = plain_muon(expected[name], gradient, momenta[name], 0.01 * (1 + step))
        for group in (*optimizer.param_groups, *adamw.param_groups):
            group["lr"] = 0.01 * (1 + step)
        optimizer.step()
        adamw.step()
    assert len(hidden) == 2 * 7
    for name, p in model.named_parameters():
        if name in hidden:
            torch.testing.assert_close(p.detach(), expected[name].float(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(p, other.get_parameter(name)), name


def test_fp64_matrices_are_updated_in_fp64() -> None:
    """They follow the formulas to 12 digits, also beside a matrix of the same shape in fp32."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 6, dtype=torch.float64, generator=generator)) for _ in range(2)]
    weights.append(nn.Parameter(weights[0].detach().float()))
    expected, momenta = [p.detach().clone() for p in weights], [torch.zeros_like(p) for p in weights]
    optimizer = Muon([{"params": weights, "orthogonal": True, "weight_decay": DECAY}], **SETTINGS)
    for _ in range(5):
        for index, p in enumerate(weights):
            p.grad = torch.randn(4, 6, dtype=torch.float64, generator=generator).to(p.dtype)
            expected[index], momenta[index] = plain_muon(expected[index], p.grad, momenta[index], SETTINGS["lr"])
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in weights[:2]], expected[:2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights[2].detach(), expected[2], rtol=1e-4, atol=1e-5)


def test_a_group_updated_at_once_equals_one_parameter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is how a GPU does it: matrices of one shape go through the products as one batch."""
    one_by_one, at_once = make_model(), make_model()
    optimizers = make_muon(one_by_one), make_muon(at_once)
    for step in range(5):
        set_gradients(one_by_one, step)
        set_gradients(at_once, step)
        optimizers[0].step()
        with monkeypatch.context() as patch:
            patch.setattr(optim, "_buckets", lambda params: [params])
            optimizers[1].step()
    torch.testing.assert_close(one_by_one.state_dict(), at_once.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_plain_forms_each_matrix_makes_a_plain_step(precision: str) -> None:
    """The weights are those of the form for many matrices at a time."""
    fast, plain = make_model(), make_model()
    optimizers = make_muon(fast, precision=precision), make_muon(plain, precision=precision)
    for step in range(5):
        set_gradients(fast, step)
        set_gradients(plain, step)
        optimizers[0].step()
        with plain_forms():
            optimizers[1].step()
    tolerance = 1e-5 if precision == "fp32" else 1e-3
    torch.testing.assert_close(plain.state_dict(), fast.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (24, 64), (64, 24), (1, 9)], ids=str)
def test_an_orthogonalized_matrix_keeps_its_singular_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Singular values from 1 down to 1/300 of the largest all come near 1, each between its own two vectors."""
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2.5, len(v)) if len(v) > 1 else torch.ones(1)
    matrix = 37.0 * (u * values) @ v
    found = orthogonalize(matrix[None].to(dtype))[0].float()
    between = u.T @ found @ v.T
    assert between.diagonal().min() > 0.8
    assert between.diagonal().max() < 1.2
    torch.testing.assert_close(between, between.diagonal().diag(), rtol=0, atol=0.02 if dtype == torch.float32 else 0.3)


def test_the_coefficients_bring_what_they_promise() -> None:
    """The iteration, as a function of one number, takes [0.001, 1] into [0.84, 1.15]."""
    values = torch.logspace(-3, 0, 10_001, dtype=torch.float64) / muon._MARGIN
    for a, b, c in muon._COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.84
    assert values.max() < 1.15


def test_a_zero_gradient_leaves_only_the_decay() -> None:
    """Nothing is divided by a norm of zero."""
    model = make_model(zero_init_outputs=True)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make_muon(model).step()
    name = "layers.0.attn.q_proj.weight"
    torch.testing.assert_close(model.state_dict()[name], before[name] * (1 - SETTINGS["lr"] * DECAY))
    assert not model.layers[0].ffn.w2.weight.any()


def test_an_update_has_the_root_mean_square_of_adamw() -> None:
    """With random gradients, matrices of any shape move by about 0.2 lr a step, so AdamW's rates carry over."""
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    set_gradients(model, 0)
    Muon(muon_groups(model, weight_decay=0.0), lr=0.01).step()
    for name, p in model.layers.named_parameters(prefix="layers"):
        if p.ndim == 2:
            change = (p - before[name]).square().mean().sqrt().item()
            assert change == pytest.approx(0.2 * 0.01, rel=0.2), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_and_loaded_equals_uninterrupted(precision: str) -> None:
    """One state dict holds both rules' states, in fp32; a fresh optimizer goes on from it bit for bit."""
    straight, resumed = make_model(), make_model()
    first, second = make_muon(straight, precision=precision), make_muon(resumed, precision=precision)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(second.state_dict())
            second = make_muon(resumed, precision=precision)
            second.load_state_dict(saved)
        for model, optimizer in ((straight, first), (resumed, second)):
            set_gradients(model, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    tensors = [value for state in second.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert len(tensors) == 2 * 7 + 2 * (2 + 5)  # momentum of the matrices; two moments of embedding, head and norms


def test_each_weight_stands_in_one_group() -> None:
    """Embedding and head decay and are not made orthogonal; vectors do not decay; frozen weights are in no group."""
    model = make_model(tie_embeddings=True)
    model.layers[0].ffn.w1.weight.requires_grad_(False)
    hidden, embeddings, vectors = muon_groups(model, weight_decay=DECAY)
    assert [group["orthogonal"] for group in (hidden, embeddings, vectors)] == [True, False, False]
    assert [group["weight_decay"] for group in (hidden, embeddings, vectors)] == [DECAY, DECAY, 0.0]
    assert len(hidden["params"]) == 2 * 7 - 1
    assert embeddings["params"] == [model.token_embeddings.weight]
    assert all(p.ndim == 1 for p in vectors["params"])


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ([(2, 2)], {"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ([(2, 2)], {"lr": -1.0}, "lr must be at least 0"),
        ([(3,)], {}, r"takes matrices only, got shape \(3,\)"),
    ],
)
def test_what_makes_no_sense_is_refused(params: list[tuple[int, ...]], settings: dict[str, Any], message: str) -> None:
    """Muon refuses a momentum of 1, a negative rate, and a vector to make orthogonal."""
    group = {"params": [nn.Parameter(torch.zeros(shape)) for shape in params], "orthogonal": True}
    with pytest.raises(ValueError, match=message):
        Muon([group], **settings)
