"""How good a run will be, from a short run with the same settings and from what came of such pairs before.

From the probe to the run, bits per byte fall as a power of the steps, bits = those of the probe * (steps ratio)^-s.
Prose has an exponent s of about 0.1, HTML pages one of 0.3; past runs give it by least squares as

    log s = b0 + b1 log(1 + passes) + b2 log(probe / gzip) + b3 log((0.01 + seen) / 0.05).

The last asks how much of the validation text the training text has word for word: a model learns it late, and gzip,
which remembers 32 KiB, does not see it.

The interval comes from corpora that the fit had not seen: each is left out in turn, and the errors of their log s give
the spread of Student's t. Nothing here knows the text but by four numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transformerlm.experiments.fit.choice import Plan
from transformerlm.experiments.statistics import t_quantile
from transformerlm.utils.json_files import read_json_object

Array = npt.NDArray[np.float64]

PAST_RUNS = Path(__file__).with_name("past_runs.json")
STORY_RUNS = Path(__file__).with_name("story_runs.json")  # a grammar is learnt unlike any text by people
CONFIDENCE = 0.9
# Before any run is known: ten times the steps save a quarter of the bits, give or take. That weighs less than a run.
GUESS = np.array([math.log(0.13), 0.0, 0.0, 0.0])
GUESS_WEIGHT = 0.3
LEAST_SEEN, USUAL_SEEN = 0.01, 0.05  # less than a hundredth is as little as nothing
# Fewer corpora than this are filled up by guessed ones, whose log s errs by this much.
ENOUGH_CORPORA = 4
GUESSED_SPREAD = 0.3
SEED_SPREAD = 0.005  # two seeds of one run differ by about this much, however long it is
MIN_EXPONENT = 0.01  # of a run that was no better than its probe
MIN_LENGTH = math.log(2.0)  # a run that was hardly longer than its probe says little of its exponent
_MOST_BYTES = 50_000_000


@dataclass(frozen=True)
class Row:
    """A past run and its probe; `bits_per_byte` is what the whole run reached on its validation text."""

    corpus: str
    num_bytes: int
    train_tokens: int
    vocab_size: int
    parameters: int
    gzip_bits_per_byte: float
    share_seen: float
    steps: int
    probe_steps: int
    passes: float
    probe_bits_per_byte: float
    bits_per_byte: float


@dataclass(frozen=True)
class Probe:
    """What a short run reached, on the tokens on which the whole run will be measured."""

    bits_per_byte: float
    gzip_bits_per_byte: float
    steps: int


@dataclass(frozen=True)
class Interval:
    """Bits per byte: the most probable value, and an interval that holds the outcome in `confidence` of all cases."""

    low: float
    middle: float
    high: float
    confidence: float

    def holds(self, value: float) -> bool:
        """Return whether a value is inside."""
        return self.low <= value <= self.high


def predict(
    probe: Probe, plan: Plan, rows: Sequence[Row], *, share_seen: float, confidence: float = CONFIDENCE
) -> Interval:
    """Return what a run should reach, from its probe and from past runs; without any, a wide guess."""
    features, exponents = _features_of(rows), np.array([_log_exponent(row) for row in rows])
    at = _features(plan.passes, probe.bits_per_byte / probe.gzip_bits_per_byte, share_seen)
    length = math.log(max(1.0, plan.steps / probe.steps))
    coefficients, covariance = _fit(features, exponents)
    spread, freedom = _spread(features, exponents, [row.corpus for row in rows])
    quantile = t_quantile((1 + confidence) / 2, freedom)
    margin = quantile * spread * math.sqrt(1 + at @ covariance @ at)

    def bits(side: int) -> float:
        change = length * math.exp(at @ coefficients - side * margin)
        return probe.bits_per_byte * math.exp(side * quantile * SEED_SPREAD - change)

    return Interval(bits(-1), bits(0), bits(1), confidence)


# --- the fit -----------------------------------------------------------------------------------------------------


def _features(passes: float, against_gzip: float, share_seen: float) -> Array:
    """Return what the exponent depends on, (4,)."""
    seen = math.log((LEAST_SEEN + share_seen) / USUAL_SEEN)
    return np.array([1.0, math.log1p(passes), math.log(against_gzip), seen])


def _log_exponent(row: Row) -> float:
    """Return the logarithm of the exponent with which the bits fell from the probe to the run."""
    length = max(MIN_LENGTH, math.log(row.steps / row.probe_steps))
    return math.log(max(MIN_EXPONENT, math.log(row.probe_bits_per_byte / row.bits_per_byte) / length))


def _features_of(rows: Sequence[Row]) -> Array:
    """Return the features of past runs, (rows, 4)."""
    found = [_features(row.passes, row.probe_bits_per_byte / row.gzip_bits_per_byte, row.share_seen) for row in rows]
    return np.array(found).reshape(-1, len(GUESS))


def _fit(features: Array, exponents: Array) -> tuple[Array, Array]:
    """Return the coefficients (4,) by least squares drawn to `GUESS`, and their covariance (4, 4) per spread^2."""
    information = features.T @ features + GUESS_WEIGHT * np.eye(len(GUESS))
    covariance = np.linalg.inv(information).astype(np.float64)
    return covariance @ (features.T @ exponents + GUESS_WEIGHT * GUESS), covariance


def _spread(features: Array, exponents: Array, corpora: Sequence[str]) -> tuple[float, float]:
    """Return how much log s errs on a corpus that the fit has not seen, and the degrees of freedom.

    The runs on one corpus err together, so each corpus counts once.
    """
    names = np.array(corpora)
    squares = [GUESSED_SPREAD**2] * max(0, ENOUGH_CORPORA - len(set(corpora)))
    for name in sorted(set(corpora)):
        seen, left_out = names != name, names == name
        coefficients, covariance = _fit(features[seen], exponents[seen])
        errors = exponents[left_out] - features[left_out] @ coefficients
        expected = 1 + np.einsum("ij,jk,ik->i", features[left_out], covariance, features[left_out])
        squares.append(float(np.mean(errors**2 / expected)))
    return math.sqrt(sum(squares) / len(squares)), len(squares) - 1


# --- past runs ---------------------------------------------------------------------------------------------------


def read_rows(path: Path = PAST_RUNS) -> list[Row]:
    """Return the past runs in a file: a JSON object whose `rows` is a list of them.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    rows = read_json_object(path, max_bytes=_MOST_BYTES).get("rows")
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected past runs as a list under "rows", found {type(rows).__name__}')
    return [_row(row, where=f"{path}: rows[{number}]") for number, row in enumerate(rows)]


def _row(row: Any, *, where: str) -> Row:
    names = [field.name for field in fields(Row)]
    if not isinstance(row, dict) or set(row) != set(names):
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected the keys {', '.join(names)}, found {found}")
    for name in names[1:]:
        is_number, is_share = isinstance(row[name], int | float), name == "share_seen"
        is_right = is_number and (0 <= row[name] <= 1 if is_share else 0 < row[name] < 1e18)
        if not is_right or isinstance(row[name], bool):
            expected = "a number from 0 to 1" if is_share else "a positive number"
            raise ValueError(f"{where}: {name}: expected {expected}, found {row[name]!r}")
    if not isinstance(row["corpus"], str):
        raise ValueError(f"{where}: corpus: expected a string, found {row['corpus']!r}")
    return Row(**row)
