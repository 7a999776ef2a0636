"""One step and one evaluation: micro-batches add up, clipping clips, and a step that went wrong changes nothing."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from transformerlm.models.transformer import TransformerLM
from transformerlm.training.loop import EvalResult, evaluate, train_step
from transformerlm.training.loss import cross_entropy
from transformerlm.training.optim import SGD, AdamW
from transformerlm.training.reading import IGNORED, Reading
from transformerlm.utils import row_blocks as blocks
from transformerlm.utils.dtypes import autocast
from transformerlm.utils.plain_forms import plain_forms

VOCAB_SIZE = 50


def make_model(seed: int = 0) -> TransformerLM:
    """Return a small model whose weights the seed decides."""
    torch.manual_seed(seed)
    return TransformerLM(vocab_size=VOCAB_SIZE, context_length=12, d_model=16, num_layers=2, num_heads=2, d_ff=32)


def make_batch(batch_size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random inputs and targets, `(batch_size, 12)`."""
    ids = torch.randint(VOCAB_SIZE, (batch_size, 13), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, **settings):
    """Make a step in fp32, in one process, without clipping unless the settings ask for it."""
    usual = {"learning_rate": 0.1, "max_grad_norm": 0.0, "autocast": nullcontext}
    return train_step(model, optimizer, batches, **{**usual, **settings})


@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [5, 2, 1]], ids=str)
def test_micro_batches_give_the_step_of_one_batch(sizes):
    """k micro-batches, equal or not, give the loss, the gradient and the weights of the whole batch, in fp32."""
    inputs, targets = make_batch(8)
    reference, model = make_model(), make_model()
    expected = step(reference, SGD(reference.parameters(), 0.1), [(inputs, targets)])
    micro_batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    found = step(model, SGD(model.parameters(), 0.1), micro_batches)
    assert found.tokens == expected.tokens == 8 * 12
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_step_equals_pytorch_written_out():
    """Loss, gradient norm and new weights are those of PyTorch's own loss, clipping and SGD."""
    inputs, targets = make_batch(4)
    model, reference = make_model(), make_model()
    result = step(model, SGD(model.parameters(), 0.1), [(inputs, targets)], max_grad_norm=0.5, learning_rate=0.3)
    loss = nn.functional.cross_entropy(reference(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    torch.optim.SGD(reference.parameters(), 0.3).step()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_in_plain_forms_is_the_fast_one(precision):
    """Model, loss, clipping and AdamW, each by its formula: the loss, the gradient norm and the new weights agree."""
    fast, plain = make_model(), make_model()
    settings = {
        "max_grad_norm": 0.5,
        "learning_rate": 0.01,
        "z_loss": 1e-3,
        "autocast": partial(autocast, "cpu", precision),
    }
    expected = step(fast, AdamW(fast.parameters()), [make_batch(4)], **settings)
    with plain_forms():
        found = step(plain, AdamW(plain.parameters()), [make_batch(4)], **settings)
    relative = 1e-5 if precision == "fp32" else 1e-2
    assert found.loss == pytest.approx(expected.loss, rel=relative)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=relative)
    # A first step of AdamW is as long as the learning rate, and bf16 may turn it where a gradient is near zero.
    moved = [(a - b).abs() for a, b in zip(plain.parameters(), fast.parameters(), strict=True)]
    assert torch.cat([each.flatten() for each in moved]).mean() < (1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("sizes", [[4], [2, 1, 1]], ids=str)
def test_z_loss_is_minimised_and_not_reported(sizes):
    """With any micro-batches, the gradient is that of cross-entropy plus z-loss; the reported loss is without it."""
    inputs, targets = make_batch(4)
    model, reference = make_model(), make_model()
    micro_batches = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    result = step(model, SGD(model.parameters(), 0.1), micro_batches, z_loss=0.2)
    logits = reference(inputs)
    loss = cross_entropy(logits, targets)
    (loss + 0.2 * logits.logsumexp(-1).square().mean()).backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_reported_norm_is_before_clipping_and_the_gradient_after():
    """After clipping the gradient has `max_grad_norm`, and the result has the norm before it; 0 clips nothing."""
    for limit, expected in ((0.01, 0.01), (0.0, None), (1e6, None)):
        model = make_model()
        result = step(model, SGD(model.parameters(), 0.1), [make_batch(4)], max_grad_norm=limit)
        left = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in model.parameters()))
        assert result.grad_norm > 0.1
        assert left == pytest.approx(expected or result.grad_norm, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_step_that_is_not_finite_changes_nothing(value, optimizer):
    """A nan or inf loss or gradient is reported, and weights, moments and learning rate stay as they were."""
    model = make_model()
    made = optimizer(model.parameters(), 0.1)
    step(model, made, [make_batch(4)], learning_rate=0.05)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = repr(made.state_dict())
    hook = model.layers[1].register_forward_hook(lambda module, args, output: output * value)
    result = step(model, made, [make_batch(4), make_batch(4, seed=1)])
    assert not result.made
    assert not math.isfinite(result.loss)
    hook.remove()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert repr(made.state_dict()) == state


def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is():
    """A step whose backward pass overflows is not made, whatever the loss says."""
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.ln_final.weight.register_hook(lambda grad: grad * math.inf)
    result = step(model, AdamW(model.parameters(), 0.1), [make_batch(4)], max_grad_norm=1.0)
    assert not result.made
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_step_that_is_refused_changes_nothing():
    """A loss above what the caller allows is reported, and the step is not made."""
    model = make_model()
    made = AdamW(model.parameters(), 0.1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = step(model, made, [make_batch(4)], max_loss=1.0)
    assert not result.made
    assert result.trouble == "spike"
    assert result.loss > 1.0
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert made.state_dict()["state"] == {}


class Reads(TorchDispatchMode):
    """Collects the operators that would let the host wait for a GPU; a mask as an index does, to know its size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        indices = args[1] if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put) else ()
        if waits or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch) -> Reads:
    """Return what collects reads; `tolist` is one, too."""
    reads, to_list = Reads(), Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: reads.found.append("tolist") or to_list(tensor))
    return reads


@pytest.mark.parametrize("optimizer", [partial(SGD, momentum=0.9), AdamW])
def test_a_step_reads_from_its_device_once(optimizer, reads):
    """On a GPU the host waits for each number that it reads, so it reads one list alone: loss and norm."""
    model = make_model()
    with reads:
        step(model, optimizer(model.parameters()), [make_batch(2), make_batch(3)])
    assert reads.found == ["tolist"]


def test_where_targets_are_ignored_each_micro_batch_reads_once_more(reads):
    """How many of its targets are learnt; the loss and gradients are then those of the others alone."""
    every_third = torch.arange(0, 12, 3)
    made = [make_batch(2), make_batch(3, seed=1)]
    model, batches = make_model(), [(ids, targets.index_fill(1, every_third, IGNORED)) for ids, targets in made]
    with reads:
        found = step(model, SGD(model.parameters(), 0.1), batches, reading=Reading(some_ignored=True))
    assert reads.found == ["aten::nonzero", "aten::nonzero", "tolist"]
    reference = make_model()
    logits = torch.cat([reference(inputs).flatten(0, 1) for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
    loss.backward()
    assert (found.loss, found.tokens) == (pytest.approx(loss.item(), rel=1e-6), 5 * 8)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_bf16_step_keeps_fp32_weights_and_loss():
    """Under autocast the weights and gradients stay fp32, and the loss is close to the fp32 one."""
    model, reference = make_model(), make_model()
    expected = step(reference, SGD(reference.parameters(), 0.1), [make_batch(4)])
    result = step(
        model, SGD(model.parameters(), 0.1), [make_batch(4)], autocast=partial(autocast, torch.device("cpu"), "bf16")
    )
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert result.loss == pytest.approx(expected.loss, rel=0.02)


# --- evaluation --------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A model whose logits depend on the last id only: those of a fixed table."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[ids]


def test_loss_and_bits_per_byte_are_those_worked_out_by_hand():
    """Two tokens of three bytes, predicted with 1/4 and 1/2, cost 1 bit per byte and 1.5 bits per token."""
    probabilities = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    batch = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])  # p(1 | 0) = 1/4 and p(0 | 1) = 1/2
    result = evaluate(Table(probabilities.log()), [batch], token_bytes=torch.tensor([2, 1, 0]), autocast=nullcontext)
    assert result.loss == pytest.approx(1.5 * math.log(2))
    assert result.bits_per_byte == pytest.approx(1.0)
    assert result.perplexity == pytest.approx(2**1.5)


def test_special_tokens_cost_bits_but_stand_for_no_bytes():
    """A separator's loss counts and its length does not, so ending a document is not free."""
    table = Table(torch.zeros(4, 4))  # 2 bits a token
    batch = torch.tensor([[0, 0]]), torch.tensor([[1, 3]])
    result = evaluate(table, [batch], token_bytes=torch.tensor([1, 2, 3, 0]), autocast=nullcontext)
    assert result.bits_per_byte == pytest.approx(4 / 2)


def test_batches_of_different_sizes_are_weighted_by_tokens():
    """The mean over a large and a small batch is the mean over all their tokens, not the mean of two means."""
    model = make_model()
    inputs, targets = make_batch(7)
    batches = list(zip(inputs.split([5, 2]), targets.split([5, 2]), strict=True))
    result = evaluate(model, batches, token_bytes=torch.ones(VOCAB_SIZE, dtype=torch.long), autocast=nullcontext)
    expected = cross_entropy(model(inputs), targets).item()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-5)


def test_evaluation_holds_no_more_logits_than_training(monkeypatch):
    """A batch with too many logits passes in parts, and its loss is the same."""
    monkeypatch.setattr(blocks, "_CPU_LOGITS", 3 * 12 * VOCAB_SIZE)
    model, (inputs, targets) = make_model(), make_batch(7)
    sizes: list[int] = []
    model.register_forward_hook(lambda _model, args, _result: sizes.append(len(args[0])))
    token_bytes = torch.ones(VOCAB_SIZE, dtype=torch.long)
    result = evaluate(model, [(inputs, targets)], token_bytes=token_bytes, autocast=nullcontext)
    assert sizes == [3, 3, 1]
    assert result.loss == pytest.approx(cross_entropy(model(inputs), targets).item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training):
    """Mode, weights and gradients are untouched, even when a batch raises."""
    model = make_model().train(training)
    settings = {"token_bytes": torch.ones(VOCAB_SIZE), "autocast": nullcontext}
    evaluate(model, [make_batch(2)], **settings)
    assert model.training == training
    with pytest.raises(ValueError, match="context_length"):
        evaluate(model, [(torch.zeros(1, 13, dtype=torch.long),) * 2], **settings)
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


def test_perplexity_of_a_hopeless_model_is_infinite():
    """A loss whose exponential overflows gives inf, not an error."""
    assert EvalResult(loss=1e4, bits_per_byte=1.0).perplexity == math.inf
