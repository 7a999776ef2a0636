"""AdamW as one kernel has the numbers of the plain form, and a step that must not be made changes nothing."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICE, launch_here
from transformerlm.models.transformer import TransformerLM
from transformerlm.training import optim
from transformerlm.training.loop import StepResult, train_step
from transformerlm.training.muon import Muon, muon_groups
from transformerlm.training.optim import AdamW, adamw_step, parameter_groups
from transformerlm.training.reading import IGNORED, Reading

kernel = pytest.importorskip("transformerlm.training.fast.adamw_kernel", reason="no Triton", exc_type=ImportError)

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _tensors(*shape: int) -> list[Tensor]:
    """Return a weight, its gradient, and its moments."""
    torch.manual_seed(0)
    weight, grad, mean, square = torch.randn(4, *shape, device=DEVICE)
    return [weight, grad, mean, square.abs()]


def _number(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("shape", [(1,), (16,), (5, 7), (33,)], ids=str)
@pytest.mark.parametrize("step", [1, 7])
def test_it_equals_the_plain_form(shape: tuple[int, ...], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight and moments, for sizes of one block, of several, and of a part of one."""
    monkeypatch.setattr(kernel, "_BLOCK", 16)
    found, expected = _tensors(*shape), _tensors(*shape)
    kernel.adamw_step_where(_number(1), *found, step=step, **SETTINGS)
    adamw_step(*expected, step=step, **SETTINGS)
    torch.testing.assert_close(found, expected)


def test_what_may_not_be_changes_nothing() -> None:
    """Nothing is written, whatever the gradient holds."""
    found, before = _tensors(40), _tensors(40)
    for tensors in (found, before):
        tensors[1][3] = math.nan
    kernel.adamw_step_where(_number(0), *found, step=3, **SETTINGS)
    torch.testing.assert_close(found, before, rtol=0, atol=0, equal_nan=True)


# --- in a step of training -----------------------------------------------------------------------------------------


def _model() -> TransformerLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "context_length": 12, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32}
    return TransformerLM(**sizes).to(DEVICE)


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(50, (4, 13), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


def _step(model: TransformerLM, optimizer: AdamW, batch: tuple[Tensor, Tensor], **settings: Any) -> StepResult:
    usual: dict[str, Any] = {"learning_rate": 0.01, "max_grad_norm": 1.0, "autocast": nullcontext}
    return train_step(model, optimizer, [batch], **{**usual, **settings})


def _adamw(model: TransformerLM) -> AdamW:
    return AdamW(parameter_groups(model, weight_decay=0.1), 0.01)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the kernel be used here; return the list of the steps for which it was."""
    launch_here(monkeypatch, optim)
    steps: list[int] = []
    once = AdamW.step_where
    monkeypatch.setattr(AdamW, "step_where", lambda self, may, *, lr: steps.append(int(may)) or once(self, may, lr=lr))
    return steps


@pytest.mark.parametrize("ignores", [False, True])
def test_steps_are_those_without_it(ignores: bool, launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on the kernel makes them: the same losses, weights, moments and counts."""
    model, plain = _model(), _model()
    optimizer, plainly = _adamw(model), _adamw(plain)
    monkeypatch.setattr(plainly, "can_step_where", lambda: False)
    reading = Reading(some_ignored=ignores)
    for seed in range(4):
        inputs, targets = _batch(seed)
        if ignores:
            targets = targets.clone()
            targets[0, :5] = IGNORED
        found = _step(model, optimizer, (inputs, targets), reading=reading)
        expected = _step(plain, plainly, (inputs, targets), reading=reading)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.tokens == expected.tokens
    assert launched == [1, 1, 1]
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(optimizer.state_dict(), plainly.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["not_finite", "spike", "nothing_learnt"])
def test_a_step_that_is_refused_changes_nothing(kind: str, launched: list[int]) -> None:
    """Weights, moments, counts and learning rate keep their bits, and the next step is made."""
    model = _model()
    optimizer = _adamw(model)
    _step(model, optimizer, _batch(0))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    state = repr(optimizer.state_dict())
    inputs, targets = _batch(1)
    settings: dict[str, Any] = {"learning_rate": 0.5, "max_loss": 1.0 if kind == "spike" else math.inf}
    if kind == "nothing_learnt":
        settings["reading"], targets = Reading(some_ignored=True), torch.full_like(targets, IGNORED)
    hook = model.layers[1].register_forward_hook(
        lambda module, args, output: output * math.nan if kind == "not_finite" else output
    )
    result = _step(model, optimizer, (inputs, targets), **settings)
    hook.remove()
    assert result.trouble == kind
    torch.testing.assert_close(list(model.state_dict().values()), before, rtol=0, atol=0)
    assert repr(optimizer.state_dict()) == state
    assert _step(model, optimizer, _batch(2)).made
    assert launched == [0, 1]


def test_a_gradient_that_is_not_finite_is_refused_on_the_device(launched: list[int]) -> None:
    """Though the loss is finite: the norm tells."""
    model = _model()
    optimizer = _adamw(model)
    _step(model, optimizer, _batch(0))
    model.ln_final.weight.register_hook(lambda grad: grad * math.inf)
    result = _step(model, optimizer, _batch(1))
    assert (result.trouble, math.isfinite(result.loss)) == ("not_finite", True)
    assert launched == [0]


def test_others_wait(launched: list[int]) -> None:
    """Matrices that are made orthogonal, and halves, are updated after the verdict, as before."""
    model = _model()
    muon = Muon(muon_groups(model, weight_decay=0.1), 0.01)
    halves = _model().to(torch.bfloat16)
    for each, optimizer in ((model, muon), (halves, _adamw(halves))):
        for seed in range(2):
            assert _step(each, optimizer, _batch(seed)).made
    assert launched == []
