"""Make tables of the results of `benchmarking.gpu_suite`, and keep them in the docs, one section for each kind of GPU.

    python -m benchmarking.gpu_report DIR

It writes the section of DIR's GPU into docs/benchmarks.md, in place of an older one of the same kind; `--print` writes
to stdout instead. The folder of a killed run will do, too: it has the results so far. Standard library only.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarking.gpu.results import Line, read

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
NOT_MEASURED = "Not yet measured."
_NOT_ENDED = "not ended: the suite was killed, or is still running"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit with 2 for a folder or a page that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.gpu_report", description="Put the results of benchmarking.gpu_suite into the docs."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the suite's --out")
    parser.add_argument(
        "--docs", type=Path, default=DOCS, metavar="FILE", help="the page (default: docs/benchmarks.md)"
    )
    parser.add_argument("--print", action="store_true", help="print the tables instead")
    arguments = parser.parse_args(argv)
    try:
        lines = read(arguments.folder)
        if arguments.print:
            print(markdown(lines), end="")
            return
        page = arguments.docs.read_text(encoding="utf-8")
        arguments.docs.write_text(with_section(page, lines), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{arguments.docs}: {device_of(lines)}", file=sys.stderr)


def device_of(lines: list[Line]) -> str:
    """Return the name of the GPU; "unknown" if the suite ended before it had asked."""
    found = next((line for line in lines if line["kind"] == "environment"), {})
    return str(found.get("device_name", "unknown"))


def with_section(page: str, lines: list[Line]) -> str:
    """Return the page with these results in it; other kinds of GPU keep their sections.

    Raises:
        ValueError: the page has no place for them, or they are from a toy or a CPU.
    """
    asked, device = _suite(lines).get("arguments", {}), device_of(lines)
    if asked.get("tiny") or asked.get("device") != "cuda" or device == "unknown":
        raise ValueError("expected results of a GPU at full size, found a toy's, a CPU's or none; use --print")
    before, begin, rest = page.partition(f"{BEGIN}\n")
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page: expected the lines {BEGIN} and {END}, between which the results go")
    sections = dict(re.findall(r"^#### (.+)\n((?:(?!^#### ).*\n)*)", inside, flags=re.MULTILINE))
    sections[device] = f"\n{markdown(lines, heading='#####')}\n"
    text = "".join(f"#### {name}\n{body}" for name, body in sections.items())
    return f"{before}{begin}\n{text}{end}{after}"


def markdown(lines: list[Line], *, heading: str = "##") -> str:
    """Return the report: the machine, how each part ended, what did not hold, and the tables."""
    blocks = [_environment(lines), _ends(lines), *_promises(lines)]
    for title, rows in _tables(lines).items():
        blocks.append(f"{heading} {title}\n\n{_table(rows)}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def _suite(lines: list[Line]) -> Line:
    return next((line for line in lines if line["kind"] == "suite"), {})


def _environment(lines: list[Line]) -> str:
    suite = _suite(lines)
    found = next((line for line in lines if line["kind"] == "environment"), {})
    facts = [f"{name} {value}" for name, value in found.items() if name not in ("kind", "part", "device_name")]
    toy = " **Toy sizes: the numbers mean nothing.**" if suite.get("arguments", {}).get("tiny") else ""
    return f"{suite.get('date', 'unknown date')}, {device_of(lines)}; {', '.join(facts) or 'nothing known'}.{toy}"


def _ends(lines: list[Line]) -> str:
    ends = {line["part"]: line for line in lines if line["kind"] == "part"}
    begun = dict.fromkeys(line["part"] for line in lines if "part" in line)
    rows = []
    for name in begun:
        end = ends.get(name, {"status": _NOT_ENDED, "why": ""})
        why = str(end["why"]).strip().splitlines()[-1] if end["why"] else ""
        rows.append({"part": name, "ended": end["status"], "seconds": end.get("seconds", ""), "why": why})
    return _table(rows) if rows else "No part has begun."


def _promises(lines: list[Line]) -> Iterator[str]:
    checks = [line for line in lines if line["kind"] == "check"]
    broken = [line for line in checks if not line["held"]]
    if broken:
        yield "**Did not hold:**\n\n" + "\n".join(f"- {_promise(line)}" for line in broken)
    if held := [line for line in checks if line["held"]]:
        yield "Held:\n\n" + "\n".join(f"- {_promise(line)}" for line in held)


def _promise(line: Line) -> str:
    return f"{line['part']}: {line['what']}" + (f" ({_one_line(line['found'])})" if line["found"] else "")


def _tables(lines: list[Line]) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "row":
            tables.setdefault(line["table"], []).append(line["cells"])
    return tables


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name, "")) for name in columns] for row in rows]
    head = [name.replace("_", " ") for name in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _one_line(str(value))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


if __name__ == "__main__":
    main()
