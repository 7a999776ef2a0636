"""Choosing an id in each row without moving ids: where an order is needed, only the numbers are sorted.

Top-k and top-p keep the head of one order: likely ids first, equal ones by id. To sort ids by their weights takes as
long as the model's step. NumPy sorts bare numbers with the processor's vectors, 20 times as fast. They alone say how
many ids are kept and which place in the order is drawn; the id is where the row has that number. Rows are grouped by
what they need, so that those which need no order do not pay for the others.

Twin of `choose`: `transformerlm.inference.sampling.choose`
Test: tests/inference/fast/test_choice.py
Pays: 32 rows of 4,096 ids: 15.9 ms to 0.7 with top-p 0.95, 14.5 to 0.6 with top-k 50, beside a step of 8 (docs/LOG.md)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformerlm.inference.fast.uncompiled import reason_of, warn_once
from transformerlm.inference.row_sums import row_sums
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.utils.dtypes import upcast

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

# Of a row's numbers in order, only so many are looked at first.
_FEW = 1536
# So many weights are read several times while they are in a processor's own cache.
_IN_CACHE = 1 << 17
_MOST_IDS = 2**31  # more than any vocabulary has
# Top-k first looks at the greatest of each so many.
_BLOCK = 16


def choose(logits: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor | None:
    """Return what the plain form does, or None on a GPU, which sorts fast."""
    if logits.device.type != "cpu":
        return None
    logits, groups = upcast(logits.detach()).contiguous(), _groups(tuple(params))
    if len(groups) == 1:
        return torch.from_numpy(_choose(logits, groups[0], uniforms.numpy()))
    ids = torch.empty(len(logits), dtype=torch.int64)
    for group in groups:
        rows = torch.from_numpy(group.rows)
        ids[rows] = torch.from_numpy(_choose(logits.index_select(0, rows), group, uniforms.numpy()[group.rows]))
    return ids


class _Group(NamedTuple):
    """Rows that go the same way, and their settings, one a row; None where no row of the group has any."""

    rows: Ints
    is_greedy: bool
    temperature: Tensor | None  # (rows, 1)
    top_k: Ints | None
    top_p: Floats | None
    min_p: Floats | None


@lru_cache(maxsize=256)  # mostly the same from step to step
def _groups(params: tuple[SamplingParams, ...]) -> list[_Group]:
    kinds: dict[str, list[int]] = {}
    for row, each in enumerate(params):
        order = "top_k" if each.top_k is not None else "top_p" if each.top_p < 1.0 else "ids"
        kinds.setdefault("greedy" if each.temperature == 0.0 else order, []).append(row)
    return [_group(kind, [params[row] for row in rows], rows) for kind, rows in kinds.items()]


def _group(kind: str, params: list[SamplingParams], rows: list[int]) -> _Group:
    smallest = torch.finfo(torch.float32).tiny  # as `apply_temperature` has it
    temperatures = torch.tensor([max(each.temperature, smallest) for each in params], dtype=torch.float64).unsqueeze(-1)
    top_p, min_p = np.array([each.top_p for each in params]), np.array([each.min_p for each in params])
    return _Group(
        rows=np.array(rows),
        is_greedy=kind == "greedy",
        temperature=None if bool((temperatures == 1.0).all()) else temperatures,
        top_k=np.array([min(each.top_k or 0, _MOST_IDS) for each in params]) if kind == "top_k" else None,
        top_p=None if (top_p == 1.0).all() else top_p,
        min_p=min_p if min_p.any() else None,
    )


def _choose(logits: Tensor, group: _Group, uniforms: Floats) -> Ints:
    """Return the ids `(rows)` of one group, -1 where a row cannot be drawn from."""
    if group.is_greedy:
        ids: Ints = logits.numpy().argmax(axis=-1)  # 20 times as fast as torch's; the place of a NaN where there is one
        ids[~np.isfinite(logits.numpy()[np.arange(len(ids)), ids])] = -1
        return ids
    kernels = _kernels()
    if kernels is not None and group.top_k is None and group.min_p is None and logits.dtype == torch.float32:
        return _choose_compiled(kernels, logits, group, uniforms)
    top = logits.amax(dim=-1, keepdim=True)  # (rows, 1)
    shifted = logits - top
    if group.temperature is not None:
        shifted /= group.temperature.to(shifted.dtype)
    weights = shifted.exp_().numpy()  # of the most likely id: 1
    is_finite = np.isfinite(top.numpy()[:, 0])
    weights[~is_finite] = 1.0  # numbers to go on with; the ids of these rows are -1 in the end
    if group.top_k is not None:
        ids = _from_top_k(weights, group, uniforms)
    elif group.top_p is not None:
        ids = _from_top_p(weights, group, uniforms)
    else:
        ids = _from_all(weights, group, uniforms)
    ids[~is_finite] = -1
    return ids


def _kernels() -> ModuleType | None:
    """Return the compiled loops, where a decoder has loaded its own: to compile takes longer than to make a text."""
    decoders = sys.modules.get("transformerlm.inference.fast.step_kernels")
    return _compiled_kernels() if decoders is not None and decoders.step.is_loaded else None


@cache
def _compiled_kernels() -> ModuleType | None:
    """Compile the loops, if they were not before, by two draws; return None where that fails."""
    plain = _Group(np.zeros(1, np.int64), is_greedy=False, temperature=None, top_k=None, top_p=None, min_p=None)
    try:
        from transformerlm.inference.fast import choice_kernels

        for group in (plain, plain._replace(top_p=np.full(1, 0.9))):
            _choose_compiled(choice_kernels, torch.zeros(1, 2), group, np.full(1, 0.5))
    except Exception as error:  # of many types: LLVM's, a full disk, a folder that cannot be written
        warn_once("the choice of tokens", reason_of(error))
        return None
    return choice_kernels


def _choose_compiled(kernels: ModuleType, logits: Tensor, group: _Group, uniforms: Floats) -> Ints:
    """Return what `_choose` does, by compiled loops where they are sure, a few rows at a time."""
    few = max(1, _IN_CACHE // logits.shape[1])
    if len(logits) > few:
        parts = [slice(first, first + few) for first in range(0, len(logits), few)]
        return np.concatenate(
            [_choose_compiled(kernels, logits[part], _part_of(group, part), uniforms[part]) for part in parts]
        )
    weights, tops = torch.empty_like(logits), np.empty(len(logits), np.float32)
    ids, numbers = np.empty(len(logits), np.int64), weights.numpy()
    temperature = group.temperature
    temperatures = np.ones_like(tops) if temperature is None else temperature.view(-1).float().numpy()
    kernels.shift(logits.numpy(), temperatures, numbers, tops)
    weights.exp_()  # torch's own: another exp has other last bits, and the ids would differ now and then
    uniforms, scratch = np.ascontiguousarray(uniforms), kernels.make_scratch(logits.shape[1])
    if group.top_p is None:
        kernels.draw_from_all(numbers, uniforms, ids, scratch)
    else:
        kernels.draw_from_top_p(numbers, row_sums(weights).numpy(), group.top_p, uniforms, ids, scratch)
    is_finite = np.isfinite(tops)
    unsure = (ids == kernels.UNSURE) & is_finite
    if unsure.any():
        plain = _from_all if group.top_p is None else _from_top_p
        ids[unsure] = plain(numbers[unsure], _part_of(group, unsure), uniforms[unsure])
    ids[~is_finite] = -1
    return ids


def _part_of(group: _Group, rows: slice | NDArray[np.bool_]) -> _Group:
    """Return some rows of a group without a top-k and a min-p."""
    temperature = None if group.temperature is None else group.temperature[rows]
    return group._replace(temperature=temperature, top_p=None if group.top_p is None else group.top_p[rows])


def _from_all(weights: Floats, group: _Group, uniforms: Floats) -> Ints:
    """Draw in the order of the ids."""
    if group.min_p is not None:
        weights = weights * (weights >= group.min_p[:, None].astype(weights.dtype))
    sums = _sums(weights)
    return _first(sums, uniforms * sums[:, -1], above=True)


def _from_top_k(weights: Floats, group: _Group, uniforms: Floats) -> Ints:
    """Draw from rows that all have a top-k."""
    assert group.top_k is not None, "the group says so"
    counts = np.minimum(group.top_k, weights.shape[1])
    ordered = _descending(_at_least(weights, _below_top_k(weights, counts)), int(counts.max()))
    sums = _sums(ordered)
    if group.top_p is not None:
        targets = group.top_p * sums[np.arange(len(sums)), counts - 1]
        counts = np.minimum(counts, 1 + _first(sums, targets, above=False))
    return _draw(weights, ordered, sums, counts, group.min_p, uniforms)


def _below_top_k(weights: Floats, counts: Ints) -> Floats:
    """Return numbers `(rows, 1)` that the `counts` greatest of each row are not below.

    If k blocks have a number that is not below it, so have at least k ids.
    """
    num_blocks = weights.shape[1] // _BLOCK
    if counts.max() > num_blocks:
        return np.zeros((len(weights), 1), weights.dtype)
    greatest = weights[:, : num_blocks * _BLOCK].reshape(len(weights), _BLOCK, num_blocks).max(axis=1)
    greatest.sort(axis=-1)
    low: Floats = greatest[np.arange(len(weights)), num_blocks - counts][:, None]
    return low


def _from_top_p(weights: Floats, group: _Group, uniforms: Floats) -> Ints:
    """Draw from rows that have a top-p and no top-k."""
    assert group.top_p is not None, "the group says so"
    totals = row_sums(torch.from_numpy(weights)).numpy()  # (rows)
    # The ids below 1/n of what top-p leaves out hold less than that. Most hold much less, so even ids below twice that
    # are left out nearly always. All are set to that number: equals are quick to sort.
    low = (2 * (1.0 - group.top_p) * totals / weights.shape[1]).astype(weights.dtype)
    size = min(_FEW, weights.shape[1])
    ordered = _descending(_at_least(weights, low[:, None]), size)
    sums = _sums(ordered)
    counts = 1 + _first(sums, group.top_p * totals, above=False)
    rest = (ordered[np.arange(len(counts)), np.minimum(counts, size) - 1] <= low) | (counts > size)
    # A place after the first may hold `low` in these rows, which is no id's weight.
    ids = _draw(weights, ordered, sums, np.where(rest, 1, counts), group.min_p, uniforms)
    if rest.any():  # the border may be anywhere
        ordered = _descending(weights[rest], weights.shape[1])
        sums = _sums(ordered)
        counts = 1 + _first(sums, (group.top_p * totals)[rest], above=False)
        ids[rest] = _draw(
            weights[rest], ordered, sums, counts, None if group.min_p is None else group.min_p[rest], uniforms[rest]
        )
    return ids


def _draw(weights: Floats, ordered: Floats, sums: Floats, counts: Ints, min_p: Floats | None, uniforms: Floats) -> Ints:
    """Return the ids `(rows)` at the places in order where the sums of the first `counts` pass their uniforms."""
    rows, last = np.arange(len(weights)), ordered.shape[1] - 1
    if min_p is not None:
        counts = np.minimum(counts, (ordered >= min_p[:, None].astype(ordered.dtype)).sum(axis=1))
    totals = sums[rows, (counts - 1).clip(0, last)]
    places = _first(sums, uniforms * totals, above=True).clip(0, last)
    values = ordered[rows, places]
    matches = weights == values[:, None]  # (rows, vocab)
    ids: Ints = matches.argmax(axis=1)
    # Of equals, the lower ids come first.
    for row in ((ordered[rows, places - 1] == values) & (places > 0)).nonzero()[0]:
        first = np.searchsorted(-ordered[row], -values[row])
        ids[row] = matches[row].nonzero()[0][places[row] - first]
    return ids


def _at_least(weights: Floats, low: Floats) -> Floats:
    """Return the greater of each weight and its row's `low`; torch is three times as fast as NumPy here."""
    raised: Floats = torch.maximum(torch.from_numpy(weights), torch.from_numpy(low)).numpy()
    return raised


def _descending(weights: Floats, size: int) -> Floats:
    """Return the `size` greatest numbers of each row in descending order; `weights` may be overwritten."""
    weights.sort(axis=1)
    return weights[:, : -size - 1 : -1].copy()


def _sums(weights: Floats) -> Floats:
    """Return the cumulative sums of each row in fp64."""
    sums: Floats = torch.from_numpy(weights).double().cumsum_(dim=1).numpy()
    return sums


def _first(sums: Floats, targets: Floats, *, above: bool) -> Ints:
    """Return the first place in each row where the sum is at least the target, or is above it."""
    places = torch.searchsorted(torch.from_numpy(sums), torch.from_numpy(targets).unsqueeze(1), right=above)
    found: Ints = places.squeeze(1).numpy()
    return found
