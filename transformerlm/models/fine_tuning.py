"""Which weights a training changes: all, all but those that are frozen, or small matrices beside frozen ones (LoRA).

It knows names and shapes alone. `lora.py` makes a model of them, `estimates.py` counts them. A pattern means the
weights whose names it matches, and those in a layer whose name it matches; `*` and `?` are as in a file system.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Shape = tuple[int, ...]
A, B = "lora_a", "lora_b"
"""What LoRA's matrices are called, beside the `weight` of their layer."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Matrices that are trained beside frozen ones (Hu et al. 2021); the fields are the keys of [fine_tuning.lora].

    Args:
        rank: the rows of each A, and the columns of each B.
        alpha: B A is multiplied by `alpha / rank`, so that another rank needs no other learning rate.
        targets: patterns of the linear layers, in the blocks, that get an A and a B.
        dropout: the probability of each number that A reads to be dropped.
        train: patterns of the weights that are trained as they are, besides.
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    dropout: float = 0.0
    train: Sequence[str] = ()

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def layers(self, shapes: Mapping[str, Shape]) -> list[str]:
        """Return the names of the layers that get an A and a B, of a model with weights of these `shapes`, in order.

        Raises:
            ValueError: a pattern means none of them, or the rank is larger than a side of one.
        """
        found = [name.removesuffix(".weight") for name, shape in shapes.items() if _is_linear(name, shape)]
        chosen = matching(self.targets, found, key="fine_tuning.lora.targets", what="linear layer of the blocks")
        layers = [name for name in found if name in chosen]
        for name in layers:
            if self.rank > (side := min(shapes[f"{name}.weight"])):
                raise ValueError(
                    f"fine_tuning.lora.rank: expected at most {side}, the smaller side of {name}, found {self.rank}; "
                    "more teaches it nothing (lower the rank, or leave the layer out of fine_tuning.lora.targets)"
                )
        return layers


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Which weights are trained: all but those that `freeze` means, or with `lora` its matrices; see `LoRA`."""

    freeze: Sequence[str] = ()
    lora: LoRA | None = None

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> FineTuning:
        """Return what the keys of [fine_tuning] mean."""
        lora = tree.get("lora")
        return cls(freeze=tuple(tree.get("freeze", ())), lora=None if lora is None else LoRA(**lora))

    def __bool__(self) -> bool:
        """Return whether some weights are not trained."""
        return bool(self.freeze) or self.lora is not None

    def extended(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return `shapes`, those of a plain model's weights by their names, with LoRA's matrices beside their layers'.

        Raises:
            ValueError: a pattern means no layer.
        """
        if self.lora is None:
            return dict(shapes)
        layers, found = set(self.lora.layers(shapes)), dict[str, Shape]()
        for name, shape in shapes.items():
            found[name] = shape
            if (layer := name.removesuffix(".weight")) in layers:
                found |= {f"{layer}.{A}": (self.lora.rank, shape[1]), f"{layer}.{B}": (shape[0], self.lora.rank)}
        return found

    def trained(self, names: Iterable[str]) -> set[str]:
        """Return which of a model's weights are trained; `names` are those of all of them, LoRA's too.

        Raises:
            ValueError: a pattern means no weight, or nothing is trained.
        """
        names = list(names)
        if self.lora is None:
            left = set(names) - matching(self.freeze, names, key="fine_tuning.freeze", what="weight")
            if not left:
                raise ValueError(
                    f"fine_tuning.freeze: {', '.join(self.freeze)} freezes all {len(names)} weights of the model, and "
                    "there is nothing to train; leave some"
                )
            return left
        plain = [name for name in names if not is_lora(name)]
        whole = matching(self.lora.train, plain, key="fine_tuning.lora.train", what="weight")
        return {name for name in names if is_lora(name) or name in whole}


def is_lora(name: str) -> bool:
    """Return whether a weight is one of LoRA's matrices, by its name."""
    return name.endswith((f".{A}", f".{B}"))


def matching(patterns: Iterable[str], names: Sequence[str], *, key: str, what: str) -> set[str]:
    """Return the names that a pattern matches, or that are in a layer that it matches.

    Raises:
        ValueError: a pattern matches none; the message has the key, and the names that are most like it.
    """
    found: set[str] = set()
    for pattern in patterns:
        mine = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not mine:
            is_list = pattern.startswith("[") and pattern.endswith("]")
            words = "; on a command line patterns are words: PATTERN PATTERN, not a list" * is_list
            raise ValueError(f"{key}: {pattern!r} is no {what} of this model; {_near(pattern, names)}{words}")
        found |= mine
    return found


def _near(pattern: str, names: Sequence[str]) -> str:
    """Return a few names like a pattern: one of each kind of layer, the blocks' with a star for their number."""
    kinds = dict.fromkeys(_kind(name) for name in names)
    near = difflib.get_close_matches(_kind(pattern), kinds, n=3, cutoff=0.5)
    return f"near it: {', '.join(near)}" if near else f"there are {', '.join(list(kinds)[:12])}"


def _kind(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _is_linear(name: str, shape: Shape) -> bool:
    return name.startswith("layers.") and name.endswith(".weight") and len(shape) == 2
