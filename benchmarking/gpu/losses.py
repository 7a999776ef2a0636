"""Forty training steps whose losses can be compared between devices, precisions and versions of PyTorch.

Weights and batches come from the raw words of numpy's Philox generator, a stream that numpy promises never to change;
torch's own generators differ between devices and versions. The text is an invented language that can be learned: most
ids have four successors. The losses of fp32 on a CPU are in a file, which takes a quarter of an hour to make:

    python -m benchmarking.gpu.losses benchmarking/gpu/cpu_losses.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarking.gpu.shapes import SMALL, Shape
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.loop import train_step
from transformerlm.training.optim import AdamW, parameter_groups
from transformerlm.utils.dtypes import Precision, autocast

STEPS = 40
KEPT = Path(__file__).with_name("cpu_losses.json")
WARMUP_STEPS, LEARNING_RATE = 10, 1e-3
_NUM_SUCCESSORS, _FOLLOWS = 4, 0.75


def losses(
    shape: Shape, *, device: str, precision: Precision, backend: str | None = None, steps: int = STEPS
) -> Iterator[float]:
    """Yield the loss of each step, in nats; `backend` is that of `torch.compile`, None does not compile."""
    model = fill(TransformerLM(**shape.model())).to(device)
    forward: Any = model if backend is None else torch.compile(model, backend=backend)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.1), lr=LEARNING_RATE, betas=(0.9, 0.95))
    for step in range(1, steps + 1):
        windows = torch.from_numpy(text(shape, step)).to(device)
        batches = [(part[:, :-1], part[:, 1:]) for part in torch.split(windows, shape.micro_batch_size)]
        yield train_step(
            forward,
            optimizer,
            batches,
            learning_rate=LEARNING_RATE * min(1.0, step / WARMUP_STEPS),
            max_grad_norm=1.0,
            autocast=partial(autocast, device, precision),
        ).loss


def fill(model: TransformerLM) -> TransformerLM:
    """Refill every matrix with its own spread from a stream that is the same everywhere, and return the model."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim == 2:
                std = 1.0 if name.startswith("token_embeddings") else (2.0 / sum(parameter.shape)) ** 0.5
                numbers = (2.0 * _uniform(parameter.numel(), 1, index) - 1.0) * 3**0.5 * std
                parameter.copy_(torch.from_numpy(numbers).view_as(parameter))
            else:
                nn.init.ones_(parameter)
    return model


def text(shape: Shape, step: int) -> npt.NDArray[np.int64]:
    """Return the windows of a step, `(batch_size, context_length + 1)`."""
    vocab_size, batch_size = shape.vocab_size, shape.batch_size
    successors = _skewed(_uniform(vocab_size * _NUM_SUCCESSORS, 2, 0), vocab_size).reshape(vocab_size, -1)
    draws = _uniform(3 * (shape.context_length + 1) * batch_size, 3, step).reshape(3, -1, batch_size)
    fresh = _skewed(draws[0], vocab_size)  # (context_length + 1, batch_size)
    rows = [fresh[0]]
    for position in range(1, shape.context_length + 1):
        which = (draws[1, position] * _NUM_SUCCESSORS).astype(np.int64)
        follows = draws[2, position] < _FOLLOWS
        rows.append(np.where(follows, successors[rows[-1], which], fresh[position]))
    return np.stack(rows, axis=1)


def _uniform(count: int, purpose: int, index: int) -> npt.NDArray[np.float64]:
    words = np.random.Philox(key=np.array([purpose, index], dtype=np.uint64)).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _skewed(uniform: npt.NDArray[np.float64], vocab_size: int) -> npt.NDArray[np.int64]:
    """Return ids of which the small ones are much more frequent, like the common words of a language."""
    return (vocab_size * uniform**3).astype(np.int64)


def kept_losses() -> list[float]:
    """Return the losses in fp32 on a CPU at the size `SMALL`."""
    found: list[float] = json.loads(KEPT.read_text())["losses"]
    return found


def main(path: Path) -> None:
    """Make the file of losses, and show each as it comes."""
    from dataclasses import replace

    found: list[float] = []
    # Fewer sequences at a time are faster on a CPU, and the sums are the same.
    for loss in losses(replace(SMALL, micro_batch_size=16), device="cpu", precision="fp32"):
        found.append(loss)
        print(f"step {len(found)}: {loss:.6f}", file=sys.stderr, flush=True)
    facts = {"torch": torch.__version__, "precision": "fp32", "shape": asdict(SMALL), "losses": found}
    path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
