"""A picture of the tokenizer benchmark: a bar for each candidate, a row a quantity, a column a thread count.

    python -m benchmarking.plot_tokenizer results.jsonl docs/images/tokenizer-speed.png

Each candidate appears with its largest case: most text, then most ids. Needs the extra `plot`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.plot_tokenizer")

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking.harness import OURS
from transformerlm.utils.strings import in_words

OUR_COLOR, PEER_COLOR = "#d1495b", "#7aa6d8"
WIDTH, ROW_HEIGHT = 10, 1.9
TITLES = {
    "train_mb_per_second": "training, MB/s",
    "train_extra_memory_mb": "training, extra memory, MB (less is better)",
    "encode_file_first_pass_mb_per_second": "file to array, first pass, MB/s",
    "encode_file_second_pass_mb_per_second": "file to array, second pass, MB/s",
    "encode_documents_first_pass_mb_per_second": "documents to lists, first pass, MB/s",
    "decode_array_mb_per_second": "array to bytes, MB/s",
    "decode_list_mb_per_second": "list to text, MB/s",
}

Line = Mapping[str, Any]
Panel = dict[str, Line]
"""candidate -> its line."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.plot_tokenizer", description="Draw the results of bench_tokenizer as bars."
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl", help="what bench_tokenizer wrote to stdout")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png", help="the picture to write (.png, .svg or .pdf)")
    arguments = parser.parse_args(argv)
    try:
        save_bars(read_panels(arguments.results), arguments.picture)
    except (ValueError, OSError, ImportError) as error:
        parser.error(in_words(error))


def read_panels(results: Path) -> dict[tuple[str, int], Panel]:
    """Return the line of each candidate's largest case, by quantity and number of threads; the last of equal ones.

    Raises:
        ValueError: a line that is not JSON, or no line of this benchmark.
    """
    panels: dict[tuple[str, int], Panel] = {}
    for number, text in enumerate(results.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{results}:{number}: expected a JSON line, found none ({error})") from error
        if isinstance(line, dict) and line.get("benchmark") == "tokenizer" and line["quantity"] in TITLES:
            panel = panels.setdefault((line["quantity"], line["params.threads"]), {})
            before = panel.get(line["candidate"], line)
            panel[line["candidate"]] = line if _case(line) >= _case(before) else before
    if not panels:
        raise ValueError(
            f"{results}: expected lines of bench_tokenizer, found none (python -m benchmarking.bench_tokenizer > FILE)"
        )
    return panels


def save_bars(panels: Mapping[tuple[str, int], Panel], picture: Path) -> None:
    """Draw the candidates of each panel, ours on top, with their median and how many times better ours is."""
    from matplotlib.figure import Figure

    quantities = [name for name in TITLES if any(quantity == name for quantity, _ in panels)]
    threads = sorted({number for _, number in panels})
    size = (WIDTH, ROW_HEIGHT * len(quantities))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(len(quantities), len(threads), squeeze=False)
    for row, quantity in zip(grid, quantities, strict=True):
        for axes, number in zip(row, threads, strict=True):
            if (quantity, number) in panels:
                _draw(axes, quantity, panels[quantity, number])
            else:
                axes.set_axis_off()
    figure.savefig(picture)


def _draw(axes: Any, quantity: str, panel: Panel) -> None:
    lines = sorted(panel.values(), key=lambda line: line["candidate"] != OURS)
    values = [line["median"] for line in lines]
    colors = [OUR_COLOR if line["candidate"] == OURS else PEER_COLOR for line in lines]
    bars = axes.barh([line["candidate"] for line in lines], values, color=colors)
    axes.bar_label(bars, labels=[_label(line, lines[0]) for line in lines], padding=3, fontsize=8)
    axes.set_xlim(0, max(values) * 1.3)  # room for the labels
    axes.invert_yaxis()
    threads = "1 thread" if lines[0]["params.threads"] == 1 else f"{lines[0]['params.threads']} threads"
    case = f"{lines[0]['params.size_mb']:g} MB, {lines[0]['params.vocab_size']:,} ids, {threads}"
    axes.set_title(f"{TITLES[quantity]}\n{case}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(line: Line, first: Line) -> str:
    """Return a bar's median, our speedup, and its case if that is not the title's."""
    text = f"{line['median']:,.0f}" if line["median"] >= 10 else f"{line['median']:.1f}"
    if "speedup.median" in line:
        speedup = line["speedup.median"]
        text += f" (ours {speedup:.0f}x)" if speedup >= 10 else f" (ours {speedup:.2g}x)"
    size, num_ids = _case(line)
    if size != first["params.size_mb"]:
        text += f" at {size:g} MB"
    return text if num_ids == first["params.vocab_size"] else f"{text} with {num_ids:,} ids"


def _case(line: Line) -> tuple[float, int]:
    return line["params.size_mb"], line["params.vocab_size"]
