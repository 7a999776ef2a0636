"""Measure everything on one GPU in a few minutes, the most valuable first, so that an interrupted run is useful, too.

    python -m benchmarking.gpu_suite --out DIR

It runs from the source tree with the installed libraries; it installs and downloads nothing. Each part has a process of
its own. Results are in `DIR/results.jsonl` as soon as they are known, everything printed is in `DIR/log.txt`, and the
tables are in `DIR/report.md`. docs/gpu.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarking.gpu.parts import BESIDES, ENVIRONMENT, PACKAGES, PARTS, Part
from benchmarking.gpu.results import NAME, Results, read
from benchmarking.gpu_report import markdown
from transformerlm.utils.files import write_whole

REPORT, LOG = "report.md", "log.txt"
ROOT = Path(__file__).parents[1]
_TINY_FACTOR = 12  # a slow and busy CPU may take this many times longer for a toy than a GPU for the real task
_RESERVE = 3.0  # seconds for the report
_LAST_WORDS = 2000
_INTERRUPTED = "interrupted"


def main(argv: Sequence[str] | None = None, *, parts: Sequence[Part] = PARTS, environment: Part = ENVIRONMENT) -> None:
    """Run the suite; exit with 0 if all parts that started ended well, 1 if something failed, 2 for bad arguments."""
    arguments = _parse(argv, parts)
    plan = [(part, _missing(part)) for part in parts if not arguments.only or part.name in arguments.only]
    if arguments.dry_run:
        print(_plan(plan, arguments.minutes))
        sys.exit(0)
    out: Path = arguments.out
    if (out / NAME).exists():
        sys.exit(_refusal(f"--out {out}: expected a new folder, found the {NAME} of an earlier run in it"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        Results(out).write("suite", date=time.strftime("%Y-%m-%d %H:%M"), arguments=_as_text(arguments))
    except OSError as error:
        sys.exit(_refusal(f"--out {out}: expected a folder that can be written to ({error.strerror})"))
    _say(_plan(plan, arguments.minutes))
    try:
        sys.exit(_Suite(arguments).run([(environment, _missing(environment)), *plan]))
    except OSError as error:  # a full disk, for example: what has been written stays
        _say(f"--out {out}: {error}")
        sys.exit(1)


class _Suite:
    """Runs the parts one after the other and keeps the report up to date."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._out = arguments, arguments.out
        self._deadline = time.monotonic() + 60 * arguments.minutes - _RESERVE
        self._results = Results(arguments.out)

    def run(self, plan: list[tuple[Part, list[str]]]) -> int:
        """Run the plan, the environment first, until its end or a Ctrl-C; return the exit code."""
        with tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as scratch:
            for number, (part, missing) in enumerate(plan):
                step = f"[{number}/{len(plan) - 1}] {part.name}"
                _say(f"{step}: {part.what}")
                began = time.monotonic()
                try:
                    status, why = self._run_part(part, missing, scratch)
                except KeyboardInterrupt:
                    status, why = "stopped", _INTERRUPTED
                seconds = round(time.monotonic() - began, 1)
                self._results.write("part", part=part.name, status=status, seconds=seconds, why=why)
                _say(f"{step}: {status}, {seconds:.0f} s" + (f": {why.splitlines()[-1]}" if why else ""))
                self._report()
                if why == _INTERRUPTED:
                    return 130
        lines = read(self._out)
        bad = any(line["kind"] == "part" and line["status"] in ("failed", "stopped") for line in lines)
        bad = bad or any(line["kind"] == "check" and not line["held"] for line in lines)
        _say(f"{self._out / REPORT}{'; something failed: it says what' if bad else ''}")
        return 1 if bad else 0

    def _run_part(self, part: Part, missing: list[str], scratch: str) -> tuple[str, str]:
        left = self._deadline - time.monotonic()
        if missing:
            return "skipped", f"not installed: {', '.join(missing)}"
        if left < part.least:
            return "skipped", f"{max(0, left):.0f} s were left, it needs {part.least}"
        limit = min(part.limit * (_TINY_FACTOR if self._arguments.tiny else 1), left)
        request = {
            "module": part.module,
            "part": part.name,
            "device": self._arguments.device,
            "tiny": self._arguments.tiny,
            "out": str(self._out.absolute()),
            "scratch": scratch,
            "seconds": limit,
            "text": [str(path.absolute()) for path in self._arguments.text],
        }
        with (self._out / LOG).open("ab") as log:
            log.write(f"\n===== {part.name} =====\n".encode())
            log.flush()
            return self._wait(request, limit, log)

    def _wait(self, request: dict[str, Any], limit: float, log: Any) -> tuple[str, str]:
        """Return how the part ended and, if it failed, the end of its traceback."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if request["tiny"]:
            environment["OMP_NUM_THREADS"] = "1"  # the threads of a toy would only wait for each other
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(request["scratch"]) / "inductor"))
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarking.gpu.child", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=request["scratch"],
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return "stopped", f"at its limit of {limit:.0f} s; {LOG} says where it was"
        finally:
            _end(process)
        if code == 0:
            return "done", ""
        return "failed", _last_words(self._out / LOG, start) or f"exit code {code}"

    def _report(self) -> None:
        try:
            text = markdown(read(self._out))
        except Exception:  # a report that cannot be made must not cost the remaining parts
            text = f"The report could not be made; the results are in {NAME}.\n\n```\n{traceback.format_exc()}```\n"
        write_whole(self._out / REPORT, text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part's process and everything that it started."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _last_words(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read()[-_LAST_WORDS:].decode(errors="replace").strip()


def _missing(part: Part) -> list[str]:
    return [PACKAGES.get(module, module) for module in part.needs if find_spec(module) is None]


def _plan(plan: list[tuple[Part, list[str]]], minutes: float) -> str:
    rows = [f"{'part':<12}{'expected':>9}{'limit':>8}  what"]
    for part, missing in plan:
        limit = f"{part.limit} s" if part.limit <= 60 * minutes else "rest"
        without = f" (skipped, not installed: {', '.join(missing)})" if missing else ""
        rows.append(f"{part.name:<12}{f'{part.seconds} s':>9}{limit:>8}  {part.what}{without}")
    missing = sorted({name for _, names in plan for name in names})
    if missing:
        modules = {PACKAGES.get(module, module): module for part, _ in plan for module in part.needs}
        wheels = [wheel for name in missing for wheel in (name, *BESIDES.get(modules[name], ()))]
        rows.append(f"to run all of it: pip install {' '.join(missing)}; by hand, the wheels of {', '.join(wheels)}")
    return "\n".join(rows)


def _parse(argv: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.gpu_suite", description="Measure everything on one GPU in a few minutes."
    )
    names = [part.name for part in parts]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the results")
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="stop after this long (default: 9)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"these parts: {', '.join(names)}")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="train the recipe on these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying the suite out")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: every line runs, no number means anything")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing, and run nothing")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu: expected --tiny with it; the full sizes are for a GPU")
    for path in arguments.text:
        if not path.is_file():
            parser.error(f"--text {path}: no such file")
    return arguments


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 24 * 60:
        raise argparse.ArgumentTypeError(f"expected minutes, more than 0 and at most a day, found {text!r}")
    return minutes


def _as_text(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value if isinstance(value, bool | float) else str(value) for name, value in vars(arguments).items()}


def _refusal(line: str) -> int:
    _say(line)
    return 2


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
