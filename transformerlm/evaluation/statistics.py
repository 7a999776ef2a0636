"""From the cost of each document to loss, perplexity and bits per byte, with bootstrap intervals over documents.

The bootstrap (Efron, 1979) repeatedly draws as many documents as there are, with replacement; the middle 95 % of the
results are the interval. It says what another sample of such documents might have given, and nothing about another
training run. Documents are drawn, not tokens, because the tokens of a document depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from transformerlm.evaluation.documents import Array
from transformerlm.evaluation.scoring import Scores

CONFIDENCE = 0.95
FEW_DOCUMENTS = 20  # an interval from fewer cannot be trusted
_NORMAL = 1.96  # standard errors to the ends of such an interval
_DRAWS_AT_ONCE = 1 << 20

Metrics = dict[str, float | int | None]


def summarize(scores: Scores, *, resamples: int = 1000, seed: int = 0) -> Metrics:
    """Return loss (nats a token), perplexity and bits per byte, each with the ends of its interval, and the sizes.

    An interval's ends are None for a single document, without resamples, and where a resample has nothing that counts.
    """
    table = _table(scores)
    values = _ratios(table.sum(axis=0))
    drawn = _resample(table, resamples=resamples, seed=seed)
    metrics: Metrics = {}
    for column, name in enumerate(("loss", "bits_per_byte")):
        metrics |= {name: float(values[column]), **interval(name, drawn[:, column])}
    for end in ("", "_low", "_high"):
        loss = metrics[f"loss{end}"]
        metrics[f"perplexity{end}"] = None if loss is None else _exp(loss)
    sizes = {"documents": len(table), "tokens": int(scores.tokens.sum()), "bytes": int(scores.num_bytes.sum())}
    return metrics | sizes


def compare(first: Scores, second: Scores, *, resamples: int = 1000, seed: int = 0) -> Metrics:
    """Return how many more bits per byte `second` needs than `first` on the same documents, with a paired interval.

    Each resample takes the same documents for both, so whatever makes a document hard for both cancels out.

    Raises:
        ValueError: the documents are not the same.
    """
    if not np.array_equal(first.num_bytes, second.num_bytes):
        raise ValueError("compare: expected the same documents for both, found others")
    table = np.concatenate([_table(first), _table(second)], axis=1)
    values = _ratios(table.sum(axis=0))
    drawn = _resample(table, resamples=resamples, seed=seed)
    name = "bits_per_byte_difference"
    return {name: float(values[3] - values[1]), **interval(name, drawn[:, 3] - drawn[:, 1])}


def estimate(first: Scores, second: Scores | None = None) -> tuple[float, float | None]:
    """Return bits per byte, or how many more `second` needs than `first`, and half the width of the 95 % interval.

    The width is that of the normal approximation for a ratio of sums (Cochran 1977, section 6.4). It needs no
    resampling, so a caller may ask for it often. It is None for fewer than two documents.
    """
    total = float(first.num_bytes.sum())
    bits = (first.nats if second is None else second.nats - first.nats) / math.log(2)
    value, num = float(bits.sum()) / total, len(bits)
    if num < 2:
        return value, None
    squares = float(np.square(bits - value * first.num_bytes).sum())
    return value, _NORMAL * math.sqrt(squares * num / (num - 1)) / total


def _table(scores: Scores) -> Array:
    """Return nats, tokens and bytes as columns `(documents, 3)`."""
    return np.stack([scores.nats, scores.tokens, scores.num_bytes], axis=1).astype(np.float64)


def _ratios(sums: Array) -> Array:
    """Return loss and bits per byte of each model, `(..., 2 models)`, from sums `(..., 3 models)`."""
    nats, tokens, num_bytes = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have conversations without an answer alone
        both = np.stack([nats / tokens, nats / num_bytes / math.log(2)], axis=-1)  # (..., models, 2)
    return both.reshape(*both.shape[:-2], 2 * both.shape[-2])


def _resample(table: Array, *, resamples: int, seed: int) -> Array:
    """Return the ratios of each resample, `(resamples, 2 models)`."""
    resamples = resamples if len(table) > 1 else 0
    return _ratios(np.concatenate([table[:0], *resampled_sums(table, resamples, np.random.default_rng(seed))]))


def resampled_sums(table: Array, resamples: int, rng: np.random.Generator) -> Iterator[Array]:
    """Yield the sums of the columns of a table `(documents, columns)` over each resample of its rows, many at once."""
    at_once = max(1, _DRAWS_AT_ONCE // len(table))
    for first in range(0, resamples, at_once):
        drawn = rng.integers(0, len(table), size=(min(at_once, resamples - first), len(table)))
        yield table[drawn].sum(axis=1)


def interval(name: str, drawn: Array) -> Metrics:
    """Return the ends of the middle 95 % of what was drawn `(resamples,)`; None where nothing was."""
    if not len(drawn):
        return {f"{name}_low": None, f"{name}_high": None}
    if not np.isfinite(drawn).all():
        return {f"{name}_low": None, f"{name}_high": None}
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _exp(loss: float) -> float | None:
    """Return e to the loss, or None if that overflows, because JSON has no infinity."""
    return math.exp(loss) if loss < 700 else None
