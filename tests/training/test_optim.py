"""The optimizers against torch's, element by element over 100 steps; clipping; the choice of what decays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from transformerlm.models.transformer import TransformerLM
from transformerlm.training import optim
from transformerlm.training.muon import Muon
from transformerlm.training.optim import (
    SGD,
    AdamW,
    adamw_step,
    clip_grad_norm,
    foreach_adamw_step,
    parameter_groups,
)
from transformerlm.utils.plain_forms import plain_forms

ADAMW = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}
SGD_OPTIONS = {"lr": 3e-2, "momentum": 0.9, "weight_decay": 0.01}


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    shapes = [(4, 3), (5,), (2, 2, 2), ()]
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Set gradients that depend on the weights, so that an error would grow; the last is sometimes missing."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = p.detach() * 0.3 + torch.randn(p.shape, generator=generator).to(p.dtype)
    if step % 3 == 0:
        parameters[-1].grad = None


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (AdamW, torch.optim.AdamW, ADAMW),
        (AdamW, torch.optim.AdamW, {**ADAMW, "weight_decay": 0.0}),
        (SGD, torch.optim.SGD, SGD_OPTIONS),
        (SGD, torch.optim.SGD, {"lr": 1e-2}),
    ],
)
def test_equals_torch_over_100_steps(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """Every element agrees after every step, with changing learning rates and sometimes without a gradient."""
    mine, reference = make_parameters(), make_parameters()
    optimizers = ours(mine, **options), theirs(reference, **options)
    for step in range(100):
        for parameters, optimizer in zip((mine, reference), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 + step) / 100
            optimizer.step()
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [(AdamW, torch.optim.AdamW, ADAMW), (SGD, torch.optim.SGD, SGD_OPTIONS)],
)
def test_fp64_parameters_are_updated_in_fp64(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """Every element agrees with torch's to 12 digits over 50 steps, also after loading; so does the clipping."""
    mine, reference = make_parameters(torch.float64), make_parameters(torch.float64)
    optimizers = [ours(mine, **options), theirs(reference, **options)]
    for step in range(50):
        if step == 25:
            state = copy.deepcopy(optimizers[0].state_dict())
            optimizers[0] = ours(mine, **options)
            optimizers[0].load_state_dict(state)
        norms = []
        for parameters, optimizer, clip in zip(
            (mine, reference), optimizers, (clip_grad_norm, torch.nn.utils.clip_grad_norm_), strict=True
        ):
            set_gradients(parameters, step)
            norms.append(clip(parameters, 0.5))
            optimizer.step()
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [AdamW, SGD, lambda p, lr: Muon([{"params": p, "orthogonal": True}], lr)])
def test_a_learning_rate_of_zero_leaves_fp64_as_it_is(make: Callable[..., torch.optim.Optimizer]) -> None:
    """An update loses no digit of a weight."""
    weight = nn.Parameter(torch.full((2, 3), 1 + 1e-12, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    make([weight], lr=0.0).step()
    assert weight.tolist() == [[1 + 1e-12] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_foreach_form_is_the_plain_step(dtype: torch.dtype) -> None:
    """Weights and both moments agree over 20 steps, for one parameter at a time and for all in a list."""
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    plain, foreach = ([[p.detach().clone() for p in make_parameters(dtype)] for _ in range(3)] for _ in range(2))
    for tensors in (plain, foreach):
        for moment in (*tensors[1], *tensors[2]):
            moment.zero_()
    for step in range(1, 21):
        grads = [0.3 * p + torch.randn_like(p) for p in plain[0]]
        for weight, grad, mean, square in zip(plain[0], grads, *plain[1:], strict=True):
            adamw_step(weight, grad, mean, square, step=step, **ADAMW)
        foreach_adamw_step(foreach[0], grads, *foreach[1:], steps=[step] * len(grads), **ADAMW)
        torch.testing.assert_close(foreach, plain, **tolerance)


def test_in_plain_forms_the_optimizer_makes_plain_steps() -> None:
    """The weights are the same, also where a missing gradient leaves a parameter with fewer steps."""
    fast, plain = make_parameters(), make_parameters()
    optimizers = AdamW(fast, **ADAMW), AdamW(plain, **ADAMW)
    for step in range(10):
        set_gradients(fast, step)
        set_gradients(plain, step)
        optimizers[0].step()
        with plain_forms():
            optimizers[1].step()
    torch.testing.assert_close(plain, fast, rtol=1e-5, atol=1e-7)
    assert not all(torch.equal(a, b) for a, b in zip(plain, fast, strict=True))  # the last bits tell the two forms


def test_adamw_decay_is_decoupled_from_the_gradient() -> None:
    """With a zero gradient a weight shrinks by exactly lr * weight_decay a step, whatever the moments."""
    weight = nn.Parameter(torch.tensor([2.0, -4.0]))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1.9, -3.8]))


def test_adamw_first_step_has_the_size_of_the_learning_rate() -> None:
    """Bias correction makes the first step lr times the gradient's sign, for gradients of any size."""
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1e-4, -1.0, 1e4])
    AdamW([weight], lr=0.01, weight_decay=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.01, 0.01, -0.01]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, **ADAMW), lambda p: SGD(p, **SGD_OPTIONS)])
def test_saved_and_loaded_equals_uninterrupted(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Loading the state after 5 of 10 steps into a fresh optimizer ends bit for bit where ten steps in a row do."""
    straight, resumed = make_parameters(), make_parameters()
    first, second = make(straight), make(resumed)
    for step in range(5):
        for parameters, optimizer in ((straight, first), (resumed, second)):
            set_gradients(parameters, step)
            optimizer.step()
    third = make(resumed)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for step in range(5, 10):
        for parameters, optimizer in ((straight, first), (resumed, third)):
            set_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_states_of_bf16_weights_are_fp32_and_stay_so_when_loaded() -> None:
    """Moments are not rounded to the weights' bfloat16, neither in use nor by load_state_dict."""
    parameters = make_parameters(torch.bfloat16)
    optimizer = AdamW(parameters, **ADAMW)
    set_gradients(parameters, 1)
    optimizer.step()
    other = AdamW(parameters, **ADAMW)
    other.load_state_dict(optimizer.state_dict())
    for p in parameters:
        assert p.dtype == torch.bfloat16
        assert other.state[p]["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(other.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


def test_loaded_state_is_a_copy() -> None:
    """A step after loading does not change the state dict that was loaded."""
    parameters = make_parameters()
    optimizer = AdamW(parameters)
    set_gradients(parameters, 1)
    optimizer.step()
    saved = optimizer.state_dict()
    before = saved["state"][0]["exp_avg"].clone()
    other = AdamW(make_parameters())
    other.load_state_dict(saved)
    set_gradients(other.param_groups[0]["params"], 2)
    other.step()
    assert torch.equal(saved["state"][0]["exp_avg"], before)


def test_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    """step(closure) follows torch's protocol: compute, differentiate, update."""
    weight = nn.Parameter(torch.tensor(3.0))
    optimizer = SGD([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert weight.item() == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW(p, lr=-1.0), "lr must be at least 0, got -1.0"),
        (lambda p: AdamW(p, betas=(0.9, 1.0)), r"betas must lie in \[0, 1\)"),
        (lambda p: AdamW(p, eps=float("nan")), "eps must be at least 0, got nan"),
        (lambda p: SGD(p, momentum=-0.1), "momentum must be at least 0, got -0.1"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[..., torch.optim.Optimizer], message: str) -> None:
    """Negative rates, betas of 1 and NaN are errors at construction."""
    with pytest.raises(ValueError, match=message):
        make(make_parameters())


def with_gradients(*gradients: list[float] | None) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(g) if g else 1)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = None if g is None else torch.tensor(g)
    return parameters


def test_clipping_scales_all_gradients_to_the_norm() -> None:
    """(3, 4) and (12) have norm 13; clipped to 1 each is divided by 13, and 13 is returned."""
    parameters = with_gradients([3.0, 4.0], None, [12.0])
    norm = clip_grad_norm((p for p in parameters), 1.0)
    assert norm.item() == pytest.approx(13.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3 / 13, 4 / 13]))
    torch.testing.assert_close(parameters[2].grad, torch.tensor([12 / 13]))
    assert parameters[1].grad is None


def test_clipping_equals_torch() -> None:
    """The factor is that of torch.nn.utils.clip_grad_norm_, element by element."""
    ours, theirs = make_parameters(), make_parameters()
    set_gradients(ours, 1)
    set_gradients(theirs, 1)
    norms = clip_grad_norm(ours, 0.5), torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


@pytest.mark.parametrize("max_norm", [13.5, 1e9, float("inf")])
def test_clipping_never_scales_up(max_norm: float) -> None:
    """Gradients below the limit are left exactly as they are."""
    parameters = with_gradients([3.0, 4.0], [12.0])
    clip_grad_norm(parameters, max_norm)
    assert parameters[0].grad.tolist() == [3.0, 4.0]


def test_clipping_nothing_returns_zero() -> None:
    """Without parameters, or without a gradient, the norm is 0."""
    assert clip_grad_norm([], 1.0).item() == 0.0
    assert clip_grad_norm(with_gradients(None), 1.0).item() == 0.0


def test_clipping_reports_a_norm_that_is_not_finite() -> None:
    """A NaN in one gradient shows in the norm that is returned, so that the caller can skip the step."""
    assert torch.isnan(clip_grad_norm(with_gradients([1.0], [float("nan")]), 1.0))


def test_only_matrices_decay() -> None:
    """Norm weights are in a group without decay; every weight, tied or not, is in one group once."""
    sizes = {"vocab_size": 20, "context_length": 4, "d_model": 8, "num_layers": 2, "num_heads": 2}
    model = TransformerLM(**sizes, tie_embeddings=True)
    decayed, kept = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert len(kept["params"]) == 5
    assert len(decayed["params"] + kept["params"]) == len({id(p) for p in model.parameters()})


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    """A parameter that needs no gradient is in no group, and a group without parameters is not returned."""
    model = TransformerLM(vocab_size=9, context_length=4, d_model=8, num_layers=1, num_heads=1, norm_position="none")
    model.token_embeddings.weight.requires_grad_(False)
    (group,) = parameter_groups(model, weight_decay=0.1)
    assert not any(p is model.token_embeddings.weight for p in group["params"])


def test_its_repr_shows_what_it_updates() -> None:
    """repr() gives the kind, and for each group its size and its settings."""
    matrices, vector = nn.Parameter(torch.zeros(30, 50)), nn.Parameter(torch.zeros(4))
    optimizer = SGD([{"params": [matrices], "weight_decay": 0.1}, {"params": [vector]}], 0.5)
    assert repr(optimizer) == (
        "SGD(1 tensors of 1,500 numbers, weight_decay=0.1, lr=0.5, momentum=0.0; "
        "1 tensors of 4 numbers, lr=0.5, momentum=0.0, weight_decay=0.0)"
    )


def test_what_a_device_updates_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update has temporary tensors of a whole bucket; a large parameter is alone, and devices are not mixed."""
    monkeypatch.setattr(optim, "_NUMBERS_AT_ONCE", 10)
    sizes = [("meta", 4), ("meta", 6), ("meta", 1), ("meta", 20), ("cpu", 3), ("cpu", 2), ("meta", 0), ("meta", 9)]
    buckets = optim._buckets([torch.empty(size, device=device) for device, size in sizes])
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[4, 6], [1], [20], [3], [2], [0, 9]]
