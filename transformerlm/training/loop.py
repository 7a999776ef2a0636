"""One optimizer step and one evaluation: functions of a model and its batches, which know no configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from profiling import nvtx
from transformerlm.distributed import World, all_reduce_sum, average_gradients
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.loss import cross_entropy, training_loss
from transformerlm.training.optim import clip_grad_norm
from transformerlm.utils.row_blocks import logits_at_once

Batch = tuple[Tensor, Tensor]
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StepResult:
    """What a step reports: mean loss in nats, gradient norm before clipping, and target tokens, over all ranks.

    `made` is False where the step was refused, and the weights are as they were.
    """

    loss: float
    grad_norm: float
    tokens: int
    made: bool = True


def is_finite(result: StepResult) -> bool:
    """Return whether a step's loss and gradient norm are finite: the least that a step must fulfil."""
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


@dataclass(frozen=True)
class EvalResult:
    """Mean loss in nats per token, and bits per UTF-8 byte of the text that the targets stand for."""

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
    accept: Callable[[StepResult], bool] = is_finite,
) -> StepResult:
    """Make one optimizer step on the mean loss over all tokens of all micro-batches and ranks.

    Each micro-batch `(batch, seq)` adds the gradient of its share of the loss, so that k micro-batches of b sequences
    give the gradient of one batch of k b. `z_loss` is that of `training_loss`, and is not in the loss that is returned.
    `max_grad_norm` 0 does not clip. A step that `accept` refuses is not made: weights, optimizer and learning rate stay
    as they were. `accept` sees the same numbers on all ranks. `model` may be compiled.
    """
    tokens = sum(targets.numel() for _, targets in micro_batches)
    loss = torch.zeros((), dtype=torch.float32, device=micro_batches[0][0].device)
    optimizer.zero_grad(set_to_none=True)
    for inputs, targets in micro_batches:
        with nvtx.range("forward"), autocast():
            entropy, minimised = batch_loss(model, inputs, targets, z_loss=z_loss)
        share = targets.numel() / tokens
        with nvtx.range("backward"):
            (minimised * share).backward()  # type: ignore[no-untyped-call]
        loss += entropy.detach() * share
    with nvtx.range("optimizer"):
        totals = all_reduce_sum(torch.stack((loss * tokens, loss.new_full((), tokens))), world)
        average_gradients(model.parameters(), world, share=tokens / totals[1])
        norm = clip_grad_norm(model.parameters(), max_grad_norm or math.inf)
        # The one time that a step waits for the device: a step that is not finite must not be made.
        total_loss, num_tokens, grad_norm = torch.cat((totals, norm.to(totals).view(1))).tolist()
        result = StepResult(loss=total_loss / num_tokens, grad_norm=grad_norm, tokens=int(num_tokens))
        if not accept(result):
            optimizer.zero_grad(set_to_none=True)
            return replace(result, made=False)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return result


def batch_loss(model: TransformerLM, inputs: Tensor, targets: Tensor, *, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return `training_loss` of ids and targets `(batch, seq)`: the cross-entropy, and what to minimise."""
    hidden = model(inputs, head=False)
    return training_loss(hidden, model.head_weight, targets, soft_cap=model.settings.logit_soft_cap, z_loss=z_loss)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, token_bytes: Tensor, autocast: Autocast) -> EvalResult:
    """Return the mean loss over the batches, and bits per byte.

    Bits per byte compares models with different tokenizers: the summed loss in bits over the number of bytes that the
    targets decode to. `token_bytes` `(vocab_size,)` holds each id's length in bytes, 0 for special tokens. Sequences
    pass in pieces that make no more logits than training holds at a time, so that what can be trained can be evaluated.
    """
    training = model.training
    model.eval()
    nats, tokens, num_bytes = 0.0, 0, 0
    try:
        for inputs, targets in batches:
            num_rows = max(1, logits_at_once(inputs.device.type) // (len(token_bytes) * inputs.shape[1]))
            for some, theirs in zip(torch.split(inputs, num_rows), torch.split(targets, num_rows), strict=True):
                with nvtx.range("evaluate"), autocast():
                    nats += cross_entropy(model(some), theirs, reduction="sum").item()
            tokens += targets.numel()
            num_bytes += int(token_bytes[targets].sum())
    finally:
        model.train(training)
    return EvalResult(loss=nats / tokens, bits_per_byte=nats / math.log(2) / max(1, num_bytes))
