"""One optimizer step and one evaluation: functions of a model and its batches, which know no configuration.

The plain form of a step is the body of the loop in docs/examples/minimal_train.py: batch, `cross_entropy`, `backward`,
`clip_grad_norm`, `optimizer.step`. Added here are micro-batches, ranks, ignored targets and steps that are not made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from profiling import nvtx
from transformerlm.distributed.sharding import Shards
from transformerlm.distributed.world import World, all_reduce_sum
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.data import Batch
from transformerlm.training.loss import cross_entropy, training_loss
from transformerlm.training.optim import AdamW, grad_norm, scale_gradients
from transformerlm.training.reading import IGNORED, Reading
from transformerlm.training.spike_guard import Trouble, trouble_with
from transformerlm.utils.device import to_host
from transformerlm.utils.row_blocks import logits_at_once

Autocast = Callable[[], AbstractContextManager[object]]
Flags = Callable[[], Sequence[float]]


@dataclass(frozen=True)
class StepResult:
    """What a step gives to log.

    Args:
        loss: mean loss in nats over all micro-batches and ranks.
        grad_norm: L2 norm of the gradient before clipping.
        tokens: target tokens that are learnt, of all ranks.
        learning_rate: the rate of the step.
        trouble: why the step was not made, with the weights left as they were; None: it was made.
        flags: the sums over the ranks of what `train_step` was given as `flags`; nothing in a world of one.
    """

    loss: float
    grad_norm: float
    tokens: int
    learning_rate: float
    trouble: Trouble | None = None
    flags: tuple[float, ...] = ()

    @property
    def made(self) -> bool:
        """Whether the weights have changed."""
        return self.trouble is None


@dataclass(frozen=True)
class EvalResult:
    """Mean loss in nats per token, and bits per UTF-8 byte of the text that the targets decode to."""

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """Return e to the loss, infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def train_step(
    model: TransformerLM,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch],
    *,
    learning_rate: float,
    max_grad_norm: float,
    autocast: Autocast,
    shards: Shards | None = None,
    num_tokens: int | None = None,
    z_loss: float = 0.0,
    dropout_keys: Sequence[Tensor | None] | None = None,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    max_loss: float = math.inf,
    flags: Flags = tuple,
) -> StepResult:
    """Make one optimizer step on the mean loss over all tokens of all micro-batches and ranks.

    It has more than ten parameters because all that a step depends on is here.

    Args:
        model: the model, which may be compiled.
        optimizer: an optimizer over the model's parameters, or over those of `shards`.
        micro_batches: this rank's batches; all ranks have equally many, of any sizes.
        learning_rate: the rate of this step.
        max_grad_norm: the gradient's norm is clipped to it; 0: never.
        autocast: makes the context of the forward pass.
        shards: how the ranks share the model; None: one process trains it.
        num_tokens: target tokens of this step over all ranks; None: those of `micro_batches`.
        z_loss: that of `training_loss`; it is not in the loss that is returned.
        dropout_keys: the keys with which the model drops numbers, for each micro-batch; None: nothing is dropped.
        reading: which targets are learnt, and where documents begin. A step in which nothing is learnt has no loss, and
            is not made.
        max_loss: a step with a higher loss, or with a loss or a norm that is not finite, is not made: weights,
            optimizer and learning rate stay as they were.
        flags: numbers of this rank that travel with the loss to the other ranks; asked for after the backward pass.
    """
    shards = Shards.whole(model) if shards is None else shards
    parameters = shards.parameters.values()
    num_tokens = num_tokens or sum(targets.numel() for _, targets in micro_batches)
    shards.drop_gradients()
    loss = _accumulate_gradients(
        model,
        micro_batches,
        num_tokens=num_tokens,
        autocast=autocast,
        z_loss=z_loss,
        dropout_keys=dropout_keys or [None] * len(micro_batches),
        reading=reading,
        shards=shards,
    )
    with nvtx.range("optimizer"):
        shards.take_gradients()
        own_flags = flags() if shards.world.is_distributed else ()
        own = _own_numbers(loss, micro_batches, reading=reading, flags=own_flags)
        sums, norm = shards.sum_with_norm(own, grad_norm(parameters))
        if reading.some_ignored:  # the gradients are those of a mean over all targets
            norm = _count_learnt_alone(parameters, norm, num_tokens / sums[1])
        scale_gradients(parameters, max_grad_norm or math.inf, norm)
        pending = to_host(torch.cat((sums[:1], norm.to(sums).view(1), sums[1:])))
        num_learnt = sums[1] if reading.some_ignored else num_tokens
        begun = _begin_step(optimizer, sums[0], num_learnt, norm, max_loss=max_loss, learning_rate=learning_rate)
        # The one time that a step waits for the device, but for `batch_loss` where targets are ignored.
        total_loss, joint_norm, *summed = pending()
        if reading.some_ignored:
            num_tokens = int(summed.pop(0))
        mean_loss = total_loss / num_tokens if num_tokens else math.nan
        trouble = trouble_with(mean_loss, joint_norm, max_loss=max_loss) if num_tokens else "nothing_learnt"
        if trouble is None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step() if begun is None else begun.count_step()
        else:
            shards.drop_gradients()
    return StepResult(mean_loss, joint_norm, num_tokens, learning_rate, trouble, tuple(summed))


def _own_numbers(
    total_loss: Tensor, micro_batches: Sequence[Batch], *, reading: Reading, flags: Sequence[float]
) -> Tensor:
    """Return this rank's summed loss, its number of learnt targets if some are ignored, and `flags`."""
    learnt = [reading.num_learnt(targets) for _, targets in micro_batches] if reading.some_ignored else []
    counts = [torch.stack(learnt).sum()] if learnt else []
    # The device fills the flags in: it would have to be waited for before a copy from here.
    return torch.stack([total_loss, *counts, *(total_loss.new_full((), flag) for flag in flags)])


def _begin_step(
    optimizer: Optimizer,
    total_loss: Tensor,
    num_tokens: Tensor | int,
    norm: Tensor,
    *,
    max_loss: float,
    learning_rate: float,
) -> AdamW | None:
    """Let the device itself decide whether the step may be made, and make it, while the host reads the numbers.

    Returns the optimizer, which does not know yet whether it was made; None: it cannot, and nothing was begun.
    """
    if not (isinstance(optimizer, AdamW) and optimizer.can_step_where()):
        return None
    loss = total_loss.double() / num_tokens
    optimizer.step_where((loss <= max_loss) & loss.isfinite() & norm.isfinite(), lr=learning_rate)
    return optimizer


def _accumulate_gradients(
    model: TransformerLM,
    micro_batches: Sequence[Batch],
    *,
    num_tokens: int,
    autocast: Autocast,
    z_loss: float,
    dropout_keys: Sequence[Tensor | None],
    reading: Reading,
    shards: Shards,
) -> Tensor:
    """Add up the gradients of the micro-batches `(batch, seq)`, and return this rank's summed loss in nats, a scalar.

    Each adds the gradient of its share of the loss, so that k micro-batches of b sequences give the gradient of one
    batch of k b. The ranks' gradients are averaged, whatever their numbers of tokens, so each share is counted as often
    as there are ranks.
    """
    loss = torch.zeros((), dtype=torch.float32, device=micro_batches[0][0].device)
    for number, ((inputs, targets), keys) in enumerate(zip(micro_batches, dropout_keys, strict=True), 1):
        shards.begin_micro_batch(is_last=number == len(micro_batches))
        with nvtx.range("forward"), autocast():
            # Without targets of its own a rank computes any loss, and counts it as nothing: it only keeps in step.
            theirs = targets if len(targets) else inputs
            nats, objective = batch_loss(model, inputs, theirs, z_loss=z_loss, dropout_keys=keys, reading=reading)
        share = targets.numel() / num_tokens
        with nvtx.range("backward"):
            (objective * (share * shards.world.world_size)).backward()  # type: ignore[no-untyped-call]
        loss += nats.detach() * targets.numel()
    return loss


def _count_learnt_alone(parameters: Iterable[nn.Parameter], norm: Tensor, factor: Tensor) -> Tensor:
    """Multiply all gradients, and return their norm, by a factor: a mean over all becomes one over those learnt."""
    torch._foreach_mul_([one.grad for one in parameters if one.grad is not None], factor)
    return norm * factor


def batch_loss(
    model: TransformerLM,
    inputs: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    dropout_keys: Tensor | None = None,
    reading: Reading = Reading(),  # noqa: B008  # frozen
) -> tuple[Tensor, Tensor]:
    """Return `training_loss` of ids and targets `(batch, seq)`: the cross-entropy, and what to minimise.

    Both are means over all targets; those that are ignored count as 0.
    """
    # (batch, seq, d_model): the logits are made with the loss, in blocks of rows.
    hidden, weight = model(inputs, head=False, dropout_keys=dropout_keys, **reading.places(inputs)), model.head_weight
    loss = partial(training_loss, soft_cap=model.settings.logit_soft_cap, z_loss=z_loss)
    if not reading.some_ignored:
        return loss(hidden, weight, targets)
    # The host waits here for the number of places. With a mask as an index it would wait at each use of it.
    places = (targets.flatten() != IGNORED).nonzero().squeeze(1)  # (learnt,)
    if not len(places):
        # The backward pass must reach every weight, as on other ranks.
        nothing = 0.0 * (hidden.sum() + weight.sum())
        return nothing.detach(), nothing
    learnt = partial(torch.index_select, dim=0, index=places)
    nats, objective = loss(learnt(hidden.flatten(0, 1)), weight, learnt(targets.flatten()))
    share = reading.num_learnt(targets) / targets.numel()
    return nats * share, objective * share


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    token_bytes: Tensor,
    autocast: Autocast,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    world: World = World(),  # noqa: B008  # frozen
) -> EvalResult:
    """Return the mean loss over the batches of all ranks, and bits per byte.

    Bits per byte compares models with different tokenizers: the summed loss in bits over the number of bytes that the
    targets decode to. `token_bytes` `(vocab_size,)` holds each id's length in bytes, 0 for special tokens. A batch is
    cut so that there are never more logits at once than in training: what can be trained can be evaluated. A batch may
    have fewer rows of targets than of inputs; rows without are only there to make all ranks' forward passes alike.
    `reading` says which targets count, and where documents begin.
    """
    training = model.training
    model.eval()
    nats, tokens, num_bytes = 0.0, 0, 0
    try:
        for inputs, targets in batches:  # (batch, seq); targets may have fewer rows
            num_rows = max(1, logits_at_once(inputs.device.type) // (len(token_bytes) * inputs.shape[1]))
            for start in range(0, len(inputs), num_rows):
                own, theirs = inputs[start : start + num_rows], targets[start : start + num_rows]
                with nvtx.range("evaluate"), autocast():
                    logits = model(own, **reading.places(own))[: len(theirs)]
                    if reading.some_ignored:
                        logits, theirs = logits[theirs != IGNORED], theirs[theirs != IGNORED]
                    if len(theirs):
                        nats += cross_entropy(logits, theirs, reduction="sum").item()
            targets = targets[targets != IGNORED] if reading.some_ignored else targets
            tokens += targets.numel()
            num_bytes += int(token_bytes[targets].sum())
    finally:
        model.train(training)
    nats, tokens, num_bytes = all_reduce_sum(
        torch.tensor([nats, tokens, num_bytes], dtype=torch.float64), world
    ).tolist()
    return EvalResult(loss=nats / tokens if tokens else math.nan, bits_per_byte=nats / math.log(2) / max(1, num_bytes))
