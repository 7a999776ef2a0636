"""Training runs side by side: a Markdown table on stdout and a picture of their validation losses.

    python -m benchmarking.compare_runs runs/adamw-* runs/muon-* --picture docs/images/ablations.png

It reads `metrics.jsonl` of each run. Runs whose names differ only in a final `-` and digits, the seed, share a row.
Runs with different tokenizers or texts are compared in bits per byte. The picture needs the extra `plot`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.compare_runs")

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.terminal import note
from config.extras import how_to_install

WIDTH, HEIGHT = 9, 5
_NUM_COLOURS = 10  # matplotlib repeats its colours after this many
_SEED = re.compile(r"-\d+$")
NATS, BITS = "metrics.val_loss", "metrics.val_bits_per_byte"
_UNITS = {NATS: "nats per token", BITS: "bits per byte"}
# What a run's losses are measured on: the keys of its line `started`, and their meaning.
_MEASURED_ON = {
    "tokenizer_sha256": "tokenizer",
    "valid_sha256": "validation file",
    "valid_tokens": "number of validation tokens",
}

Records = list[Mapping[str, Any]]
Curve = list[tuple[float, float]]
"""(tokens, validation loss) of each validation."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and draw the picture if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.compare_runs", description="Compare the validation losses of training runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs, the baseline first")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the losses over the tokens")
    arguments = parser.parse_args(argv)
    try:
        records = {run: _read_lines(run / "metrics.jsonl") for run in arguments.runs}
        measure = choose_measure(records)
        groups = read_groups(records, measure)
        print(table(groups))
        sys.stdout.flush()
        if arguments.picture is not None:
            save_curves(groups, arguments.picture, unit=_UNITS[measure])
    except ImportError as error:
        note(f"no picture: {error}; {how_to_install('plot')}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def choose_measure(records: Mapping[Path, Records]) -> str:
    """Return the key of the losses that can be compared: nats per token, or bits per byte if tokenizer or text differ.

    Nats per token depend on the tokenizer. With different texts, or different parts of one, neither says which model is
    better; the line that is printed names what differs.
    """
    facts = {run: _measured_on(lines) for run, lines in records.items()}
    known = {run: found for run, found in facts.items() if found}
    if len(known) < len(facts):
        unknown = next(run for run in facts if run not in known)
        note(f"{unknown}: does not say what it was measured on; comparing it supposes the same tokenizer and text")
    different = [
        name for key, name in _MEASURED_ON.items() if len({str(found.get(key)) for found in known.values()}) > 1
    ]
    if not different:
        return NATS
    texts = "" if different == ["tokenizer"] else "; of different texts a difference says nothing of the models"
    note(f"the runs differ in {', '.join(different)}: comparing bits per byte, not nats per token{texts}")
    return BITS


def _measured_on(lines: Records) -> Mapping[str, Any]:
    """Return the last line `started` if it says what losses are measured on; those of earlier versions do not."""
    started = [line for line in lines if line.get("event") == "started" and "tokenizer_sha256" in line]
    return started[-1] if started else {}


def read_groups(records: Mapping[Path, Records], measure: str) -> dict[str, list[Curve]]:
    """Return the curves of the runs, by name without the seed, in the order given.

    Raises:
        ValueError: a run without a validation, or without the measure that is compared.
    """
    groups: dict[str, list[Curve]] = {}
    for directory, lines in records.items():
        path = directory / "metrics.jsonl"
        curve = [(line["metrics.tokens"], line[measure]) for line in lines if measure in line]
        if not curve:
            raise ValueError(f"{path}: expected validations with {measure}, found none (set data.valid)")
        groups.setdefault(_SEED.sub("", directory.name), []).append(curve)
    return groups


def _read_lines(path: Path) -> Records:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a JSON object a line ({error}); a resumed run mends its last line"
        ) from error


def table(groups: Mapping[str, Sequence[Curve]]) -> str:
    """Return a row for each group: tokens, each seed's last validation loss, their mean, and its ratio to the first."""
    limit = _limit(groups)
    num_seeds = max(map(len, groups.values()))
    seeds = [f"run {number + 1}" for number in range(num_seeds)]
    lines = ["| " + " | ".join(["", "tokens", *seeds, "mean", "against the first"]) + " |"]
    lines.append("|" + "---|" * (num_seeds + 4))
    baseline = None
    for name, curves in groups.items():
        losses = [curve[-1][1] for curve in curves]
        mean = statistics.mean(losses)
        baseline = mean if baseline is None else baseline
        cells = ["diverged" if loss > limit else f"{loss:.3f}" for loss in losses] + [""] * (num_seeds - len(losses))
        cells += ["", ""] if max(losses) > limit else [f"{mean:.3f}", f"{mean - baseline:+.3f}"]
        tokens = f"{max(curve[-1][0] for curve in curves):,.0f}"
        lines.append("| " + " | ".join([name, tokens, *cells]) + " |")
    return "\n".join(lines)


def _limit(groups: Mapping[str, Sequence[Curve]]) -> float:
    """Return the final loss above which a run counts as diverged: twice that of the first run."""
    return 2 * next(iter(groups.values()))[0][-1][1]


def save_curves(groups: Mapping[str, Sequence[Curve]], picture: Path, *, unit: str) -> None:
    """Draw each group in a colour of its own, with a line for each run; lines are dashed from the eleventh group on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curves) in enumerate(groups.items()):
        colour, dashes = f"C{number}", "-" if number < _NUM_COLOURS else "--"
        for index, curve in enumerate(curves):
            millions, losses = [tokens / 1e6 for tokens, _ in curve], [loss for _, loss in curve]
            axes.plot(millions, losses, dashes, color=colour, label="" if index else name, linewidth=1.4)
    # The first losses, and those of runs that diverged, are far above the others, which would have no room.
    last = [curve[-1][1] for curves in groups.values() for curve in curves if curve[-1][1] <= _limit(groups)]
    axes.set(xlabel="tokens (millions)", ylabel=f"validation loss ({unit})", ylim=(min(last) - 0.05, max(last) + 0.8))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
