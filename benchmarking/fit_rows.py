"""Past runs for `transformerlm-fit`, measured on this machine: what it predicts from.

    python -m benchmarking.fit_rows texts --out rows.json --seconds 60 240
    transformerlm-fit book.txt --past_runs rows.json

Each text file in the folder is fitted with each time, one after the other, and gives a row. A fit that is in the
working folder already is not made again, so the same command goes on after a stop; one that was stopped, or failed,
begins anew.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.fit_rows")

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cli.entry import STOP_CODES
from cli.stages import read_json, wait_for
from cli.terminal import note
from cli.utils import exit_after
from transformerlm.utils.files import write_whole
from transformerlm.utils.lock import DirectoryLock


def main(argv: Sequence[str] | None = None) -> None:
    """Fit what the command line asks for, and write the rows after each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.fit_rows", description="Measure past runs for transformerlm-fit on this machine."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="text files, each a corpus")
    parser.add_argument("--out", type=Path, required=True, metavar="ROWS.json", help="the file of rows to write")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[60.0, 240.0], metavar="S", help="training times (default: 60 240)"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the runs go (default: beside ROWS.json)")
    parser.add_argument("--device", default="auto", help="where to compute (default: auto)")
    arguments = parser.parse_args(argv)
    work = arguments.work or arguments.out.with_suffix("")
    exit_after(lambda: _measure(arguments.folder, arguments.out, arguments.seconds, work=work, device=arguments.device))


def _measure(folder: Path, out: Path, times: Sequence[float], *, work: Path, device: str) -> int:
    """Fit each text with each time, and return the exit code of a fit that was interrupted, or 0.

    Raises:
        ValueError: the folder has no files.
    """
    texts = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not texts:
        raise ValueError(f"{folder}: expected text files, found none")
    alone = {"work": "the only measurement here, found {holder} at work in it", "instead": "choose another --work"}
    with DirectoryLock(work, **alone):
        return _measure_all(texts, out, times, work=work, device=device)


def _measure_all(texts: Sequence[Path], out: Path, times: Sequence[float], *, work: Path, device: str) -> int:
    failed = []
    for seconds in sorted(times):
        for text in texts:
            home = work / f"{text.name}-{seconds:g}s"
            code = 0 if (home / "outcome.json").exists() else _fit(text, seconds, home=home, device=device)
            if code and code in STOP_CODES.values():
                return code
            if code:
                failed.append(str(home))
            write_whole(out, rows_text(_rows(work)))
    note(f"{out}: {len(list(_rows(work)))} rows")
    if failed:
        raise RuntimeError(f"no row from {', '.join(failed)}; the same command tries them again")
    return 0


def _fit(text: Path, seconds: float, *, home: Path, device: str) -> int:
    if home.exists():  # stopped or failed; transformerlm-fit would take another directory beside it
        shutil.rmtree(home)
    words = [str(text), f"--time={seconds:g}s", f"--dir={home}", f"--device={device}"]
    note(f"\n$ transformerlm-fit {subprocess.list2cmdline(words)}")
    return wait_for([sys.executable, "-P", "-m", "cli.fit", *words], quiet=False)[0]


def _rows(work: Path) -> Iterator[dict[str, Any]]:
    for outcome in sorted(work.glob("*/outcome.json")):
        yield read_json(outcome)["row"]


def rows_text(rows: Iterator[dict[str, Any]]) -> str:
    """Return the JSON of rows, a line each."""
    return '{"rows": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]}\n"
