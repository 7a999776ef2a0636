"""A comparison as tables of text, for people, and as flat records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from transformerlm.experiments.compare import AXES, UNITS, Comparison, GroupResult
from transformerlm.experiments.settings import SEED

Table = tuple[list[str], list[list[str]]]
"""Heads, and rows of as many cells."""
_FEW_SECONDS = 10.0
_WORDS = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}


def loss_table(comparison: Comparison) -> Table:
    """Return a row for each group: tokens, each run's loss, their mean, and its difference to the first one's."""
    width = max(len(result.losses) for result in comparison.results)
    heads = ["", "tokens", *(f"run {number + 1}" for number in range(width)), "mean", "against the first"]
    first, rows = comparison.results[0].mean, []
    for result in comparison.results:
        cells = [
            word if loss is None else f"{loss:.3f}" for loss, word in zip(result.losses, result.words, strict=True)
        ] + [""] * (width - len(result.losses))  # fmt: skip
        mean = "" if result.mean is None else f"{result.mean:.3f}"
        against = "" if result.mean is None or first is None else f"{result.mean - first:+.3f}"
        tokens = "" if result.tokens is None else f"{result.tokens:,.0f}"
        rows.append([result.group.name, tokens, *cells, mean, against])
    return heads, rows


def verdict_table(comparison: Comparison) -> Table:
    """Return a row for each group but the first: the difference with its interval, and what it says."""
    heads = ["against " + comparison.results[0].group.name, "bits/byte", "difference", "95 % interval", "test", ""]
    return heads, [_verdict_row(result) for result in comparison.results[1:]]


def _verdict_row(result: GroupResult) -> list[str]:
    known = [bits for bits in result.bits if bits is not None]
    bits = f"{sum(known) / len(known):.3f}" if known and result.mean is not None else ""
    versus = result.versus
    if versus is None:
        return [result.group.name, bits, "", "", "", f"cannot tell: {result.missing}"]
    interval = f"{versus.low:+.4f} to {versus.high:+.4f}"
    return [result.group.name, bits, f"{versus.mean:+.4f}", interval, _test(result), _verdict(result)]


def _test(result: GroupResult) -> str:
    assert result.versus is not None
    if result.versus.method == "paired":
        return f"{result.versus.seeds} pairs"
    return f"Welch, {result.versus.degrees_of_freedom:.1f} d.f."


def _verdict(result: GroupResult) -> str:
    assert result.versus is not None
    if result.versus.verdict != "cannot tell":
        return result.versus.verdict
    more = more_seeds(result)
    if more is None:
        return "cannot tell: no number of seeds that one trains would"
    return f"cannot tell: about {more} more seed{'s' * (more > 1)} of each would"


def more_seeds(result: GroupResult) -> int | None:
    """Return how many more seeds of each group would tell, if the difference is what it seems; None: too many."""
    if result.versus is None or result.versus.verdict != "cannot tell":
        return None
    needed = result.versus.seeds_needed()
    return None if needed is None else max(1, needed - result.versus.seeds)


def settings_table(comparison: Comparison) -> Table:
    """Return a row for each setting in which groups differ."""
    heads = ["setting", *(result.group.name for result in comparison.results)]
    return heads, [[key, *map(_shown, row)] for key, row in comparison.settings.items()]


def _shown(value: Any) -> str:
    """Return a setting as TOML has it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def elsewhere_table(comparison: Comparison) -> Table:
    """Return the groups' means at the last common place of each axis."""
    heads = ["at equal", *(result.group.name for result in comparison.results)]
    return heads, [
        [place_words(axis, place), *("" if mean is None else f"{mean:.3f}" for mean in means)]
        for axis, (place, means) in comparison.elsewhere.items()
    ]


def place_words(axis: str, place: float | None) -> str:
    """Return a place in words: `1,000 steps`, `1.23e+15 FLOPs`."""
    if axis == "lowest":
        return "each run's lowest validation"
    if axis == "end" or place is None:
        return "each run's end"
    if axis == "flops":
        return f"{place:.3g} FLOPs"
    if axis == "seconds" and place < _FEW_SECONDS:  # of a run so short, whole seconds say too little
        return f"{place:.2f} {_WORDS[axis]}"
    return f"{place:,.0f} {_WORDS[axis]}"


def title(comparison: Comparison) -> str:
    """Return what the losses are and where they were taken."""
    return f"validation loss ({UNITS[comparison.measure]}) at {place_words(comparison.at, comparison.place)}"


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    heads, rows = table
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in [heads, *rows]]
    lines = ["| " + " | ".join(cells) + " |" for cells in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def records(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield a flat record for each group, the first one first."""
    for number, result in enumerate(comparison.results):
        yield {
            "group": result.group.name,
            "runs": [str(run.directory) for run in result.group.runs],
            "seeds": [run.config.get(SEED) for run in result.group.runs],
            "at": comparison.at,
            "place": comparison.place,
            "measure": comparison.measure.removeprefix("metrics."),
            "losses": result.losses,
            "bits_per_byte": result.bits,
            "words": result.words,
            "tokens": result.tokens,
            "mean": result.mean,
            "spread": result.spread,
            **_difference(result),
            **{f"settings.{key}": row[number] for key, row in comparison.settings.items()},
            **_elsewhere(comparison, number),
        }


def _difference(result: GroupResult) -> dict[str, Any]:
    versus = result.versus
    if versus is None:
        return {"missing": result.missing} if result.missing else {}
    return {
        "difference.mean": versus.mean,
        "difference.low": versus.low,
        "difference.high": versus.high,
        "difference.degrees_of_freedom": versus.degrees_of_freedom,
        "difference.method": versus.method,
        "verdict": versus.verdict,
        "more_seeds": more_seeds(result),
    }


def _elsewhere(comparison: Comparison, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis in AXES:
        if axis in comparison.elsewhere:
            place, means = comparison.elsewhere[axis]
            found |= {f"at.{axis}": place, f"mean_at.{axis}": means[number]}
    return found
