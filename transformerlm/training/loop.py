"""One optimizer step and one evaluation: functions of a model and its batches, which know no configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from profiling import nvtx
from transformerlm.distributed.parallel import average_gradients
from transformerlm.distributed.world import World, all_reduce_sum
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.data import Batch
from transformerlm.training.loss import cross_entropy, training_loss
from transformerlm.training.optim import clip_grad_norm
from transformerlm.training.spike_guard import Trouble, not_finite
from transformerlm.utils.row_blocks import logits_at_once

Autocast = Callable[[], AbstractContextManager[object]]
Judge = Callable[[float, float], Trouble | None]
"""Returns why a step with this loss and this gradient norm must not be made; None: it may."""


@dataclass(frozen=True)
class StepResult:
    """What a step gives to log.

    Args:
        loss: mean loss in nats over all micro-batches and ranks.
        grad_norm: L2 norm of the gradient before clipping.
        tokens: target tokens, of all ranks.
        learning_rate: the rate of the step.
        trouble: why the step was not made, with the weights left as they were; None: it was made.
    """

    loss: float
    grad_norm: float
    tokens: int
    learning_rate: float
    trouble: Trouble | None = None

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
    world: World,
    z_loss: float = 0.0,
    judge: Judge = not_finite,
) -> StepResult:
    """Make one optimizer step on the mean loss over all tokens of all micro-batches and ranks.

    `z_loss` is that of `training_loss`, and is not in the loss that is returned. `max_grad_norm` 0 does not clip.
    `judge` is asked once, with numbers that are the same on all ranks; a step that it refuses is not made: weights,
    optimizer and learning rate stay as they were. `model` may be compiled.
    """
    tokens = sum(targets.numel() for _, targets in micro_batches)
    optimizer.zero_grad(set_to_none=True)
    loss = _accumulate_gradients(model, micro_batches, tokens=tokens, autocast=autocast, z_loss=z_loss)
    with nvtx.range("optimizer"):
        # (2,): the summed loss and the number of tokens of all ranks, whose batches may differ in size by a window.
        totals = all_reduce_sum(torch.stack((loss * tokens, loss.new_full((), tokens))), world)
        average_gradients(model.parameters(), world, share=tokens / totals[1])
        norm = clip_grad_norm(model.parameters(), max_grad_norm or math.inf)
        # The one time that a step waits for the device: a step that is not finite must not be made.
        total_loss, num_tokens, grad_norm = torch.cat((totals, norm.to(totals).view(1))).tolist()
        mean_loss = total_loss / num_tokens
        trouble = judge(mean_loss, grad_norm)
        if trouble is None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        else:
            optimizer.zero_grad(set_to_none=True)
    return StepResult(mean_loss, grad_norm, int(num_tokens), learning_rate, trouble)


def _accumulate_gradients(
    model: TransformerLM, micro_batches: Sequence[Batch], *, tokens: int, autocast: Autocast, z_loss: float
) -> Tensor:
    """Add up the gradients of the micro-batches `(batch, seq)`, and return their mean loss, a scalar on the device.

    Each adds the gradient of its share of the loss, so that k micro-batches of b sequences give the gradient of one
    batch of k b.
    """
    loss = torch.zeros((), dtype=torch.float32, device=micro_batches[0][0].device)
    for inputs, targets in micro_batches:
        with nvtx.range("forward"), autocast():
            entropy, minimised = batch_loss(model, inputs, targets, z_loss=z_loss)
        share = targets.numel() / tokens
        with nvtx.range("backward"):
            (minimised * share).backward()  # type: ignore[no-untyped-call]
        loss += entropy.detach() * share
    return loss


def batch_loss(model: TransformerLM, inputs: Tensor, targets: Tensor, *, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return `training_loss` of ids and targets `(batch, seq)`: the cross-entropy, and what to minimise."""
    hidden = model(inputs, head=False)  # (batch, seq, d_model): the logits are made with the loss, in blocks of rows
    return training_loss(hidden, model.head_weight, targets, soft_cap=model.settings.logit_soft_cap, z_loss=z_loss)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, token_bytes: Tensor, autocast: Autocast) -> EvalResult:
    """Return the mean loss over the batches, and bits per byte.

    Bits per byte compares models with different tokenizers: the summed loss in bits over the number of bytes that the
    targets decode to. `token_bytes` `(vocab_size,)` holds each id's length in bytes, 0 for special tokens. A batch is
    cut so that there are never more logits at once than in training: what can be trained can be evaluated.
    """
    training = model.training
    model.eval()
    nats, tokens, num_bytes = 0.0, 0, 0
    try:
        for inputs, targets in batches:  # (batch, seq)
            num_rows = max(1, logits_at_once(inputs.device.type) // (len(token_bytes) * inputs.shape[1]))
            for some, theirs in zip(torch.split(inputs, num_rows), torch.split(targets, num_rows), strict=True):
                with nvtx.range("evaluate"), autocast():
                    nats += cross_entropy(model(some), theirs, reduction="sum").item()
            tokens += targets.numel()
            num_bytes += int(token_bytes[targets].sum())
    finally:
        model.train(training)
    return EvalResult(loss=nats / tokens, bits_per_byte=nats / math.log(2) / max(1, num_bytes))
