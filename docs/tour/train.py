"""Training on one page: a loss, a schedule, AdamW and the loop, for the model of transformer.py and the ids of bpe.py.

    python docs/tour/train.py

`transformerlm/training` has the same losses, step by step. It adds what makes a run robust and fast: checkpoints,
validation, micro-batches, several GPUs, bf16, skipped steps, logs. docs/examples/minimal_train.py is this loop again,
written with the product's own parts and the files of its commands.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from bpe import NUM_MERGES, TEXT, encode, learn
from torch import Tensor
from transformer import Transformer

SIZES = {"vocab_size": 256 + NUM_MERGES, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64}
BATCH = {"batch_size": 8, "context_length": 16, "seed": 0}
SCHEDULE = {"peak": 1e-2, "lowest": 1e-3, "warmup_steps": 10, "max_steps": 100}
Batch = tuple[Tensor, Tensor]


def get_batch(ids: Sequence[int], step: int, *, batch_size: int, context_length: int, seed: int) -> Batch:
    """Return inputs and targets (batch, seq) from random places of the text; the targets are one id further on."""
    words = np.random.Philox(key=[seed, step]).random_raw(batch_size)  # depends on seed and step alone
    starts = words % np.uint64(len(ids) - context_length)
    windows = torch.tensor([list(ids[start : start + context_length + 1]) for start in starts.astype(int)])
    return windows[:, :-1], windows[:, 1:]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log p(target), p = softmax(logits), in nats; logits (batch, seq, vocab_size)."""
    right = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (batch, seq): the logit of each target
    return (logits.logsumexp(dim=-1) - right).mean()


def learning_rate(step: int, *, peak: float, lowest: float, warmup_steps: int, max_steps: int) -> float:
    """Return the rate of a step, from 1: a straight line up, then half a cosine down (Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (max_steps + 1 - warmup_steps)
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - lowest)


class AdamW:
    """Adam with decoupled weight decay of the matrices (Loshchilov & Hutter 2019, algorithm 2)."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params, self.num_steps = params, 0
        self.means, self.squares = [[torch.zeros_like(p) for p in params] for _ in range(2)]

    @torch.no_grad()
    def step(self, lr: float, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, decay: float = 0.1) -> None:
        """Move each parameter against the mean of its gradients, divided by their root mean square."""
        self.num_steps += 1
        for p, m, v in zip(self.params, self.means, self.squares, strict=True):
            p.mul_(1 - lr * decay * (p.ndim >= 2))
            m.lerp_(p.grad, 1 - beta1)  # m = beta1 m + (1 - beta1) g
            v.lerp_(p.grad.square(), 1 - beta2)  # v = beta2 v + (1 - beta2) g^2
            mean, square = m / (1 - beta1**self.num_steps), v / (1 - beta2**self.num_steps)  # they began at 0
            p.sub_(lr * mean / (square.sqrt() + eps))
            p.grad = None


@torch.no_grad()
def clip_gradients(params: Sequence[Tensor], max_norm: float = 1.0) -> None:
    """Shrink all gradients by one factor, where together they are longer than `max_norm` (Pascanu et al. 2013)."""
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    for p in params:
        p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def train(
    model: Transformer, ids: Sequence[int], *, batch: dict[str, int], schedule: dict[str, Any]
) -> Iterator[float]:
    """Train a model in place and yield the loss of each step."""
    params = list(model.parameters())
    optimizer = AdamW(params)
    for step in range(1, schedule["max_steps"] + 1):
        inputs, targets = get_batch(ids, step, **batch)
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        clip_gradients(params)
        optimizer.step(learning_rate(step, **schedule))
        yield loss.item()


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a model more threads are slower
    torch.manual_seed(0)
    losses = train(Transformer(**SIZES), encode(TEXT, learn(TEXT, NUM_MERGES)), batch=BATCH, schedule=SCHEDULE)
    for number, loss in enumerate(losses, 1):
        if number == 1 or number % 20 == 0:
            print(f"step {number:3}  loss {loss:.3f}")
