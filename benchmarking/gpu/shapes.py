"""The sizes of the trained models: the one to measure, and a toy. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model, and how many sequences it sees in a step and at a time."""

    vocab_size: int
    context_length: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    batch_size: int
    micro_batch_size: int

    def model(self) -> dict[str, Any]:
        """Return the keywords of `TransformerLM`."""
        return {name: value for name, value in asdict(self).items() if "batch" not in name}


SMALL = Shape(10000, 256, 512, 4, 16, 1344, batch_size=128, micro_batch_size=128)
TINY = Shape(64, 16, 32, 1, 2, 64, batch_size=4, micro_batch_size=4)
