"""The suite for a rented GPU: every part at toy size, and what is kept when parts fail or the suite is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarking import gpu_suite
from benchmarking.gpu import parts as suite_parts
from benchmarking.gpu.results import read
from benchmarking.gpu_report import markdown
from tests.benchmarking.gpu.quick_parts import NUM_ROWS

ROOT = Path(__file__).parents[2]
TOY = ["--device", "cpu", "--tiny"]


def start(module: str, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, "--out", str(out), *TOY, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def quick(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return start("tests.benchmarking.gpu.quick_parts", out, *arguments)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole suite at toy size on the CPU."""
    out = tmp_path_factory.mktemp("suite") / "out"
    process = start("benchmarking.gpu_suite", out, "--minutes", "60")
    _, errors = process.communicate()
    assert process.returncode == 0, errors + (out / "report.md").read_text() + (out / "log.txt").read_text()[-5000:]
    return out


@pytest.mark.slow
def test_every_part_runs_at_toy_size(toy: Path) -> None:
    """Each part ends well, writes something, and everything that it promises holds."""
    lines = read(toy)
    ends = {line["part"]: line["status"] for line in lines if line["kind"] == "part"}
    names = ["environment", *(part.name for part in suite_parts.PARTS)]
    assert ends == dict.fromkeys(names, "done")
    wrote = {line["part"] for line in lines if line["kind"] in ("row", "check", "environment")}
    assert wrote == set(names)
    assert all(line["held"] for line in lines if line["kind"] == "check")


@pytest.mark.slow
def test_the_toys_report_says_that_it_is_one(toy: Path) -> None:
    """The report has a table of each part, and a warning; the recipe's losses are in a file of their own."""
    report = (toy / "report.md").read_text()
    assert "**Toy sizes: the numbers mean nothing.**" in report
    for heading in ("## Training, 22.7 M", "## Training, 124 M", "## Generation, 124 M", "## Memory", "## TinyStories"):
        assert heading in report
    steps = [json.loads(line) for line in (toy / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "metrics.loss" in record] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Return folder, exit code and stderr of a run in which one part fails, one never ends and one lacks a library."""
    out = tmp_path_factory.mktemp("troubled") / "out"
    process = quick(out)
    _, errors = process.communicate()
    return out, process.returncode, errors


def test_a_part_that_fails_costs_no_other(troubled: tuple[Path, int, str]) -> None:
    """The error keeps its traceback and the rows before it, the endless part is stopped, the third is skipped."""
    out, code, errors = troubled
    ends = {line["part"]: line for line in read(out) if line["kind"] == "part"}
    assert code == 1, errors
    statuses = ["done", "done", "failed", "stopped", "skipped", "done"]
    assert [ends[name]["status"] for name in ("environment", "rows", "error", "endless", "absent", "last")] == statuses
    assert "RuntimeError: the part is broken" in ends["error"]["why"]
    assert 'raise RuntimeError("the part is broken")' in ends["error"]["why"]
    assert ends["absent"]["why"] == "not installed: no_such_library"
    tables = {line["table"] for line in read(out) if line["kind"] == "row"}
    assert tables == {"Rows", "Before the error", "Before the end"}


def test_a_part_that_is_stopped_says_where_it_was(troubled: tuple[Path, int, str]) -> None:
    """The log has the line it was at."""
    assert "quick_parts.py" in (troubled[0] / "log.txt").read_text().split("===== endless =====")[1]


def test_the_report_names_what_went_wrong(troubled: tuple[Path, int, str]) -> None:
    """The report has one line a part, with the last line of an error; a bar in a cell is escaped."""
    report = (troubled[0] / "report.md").read_text()
    assert "| RuntimeError: the part is broken |" in report
    assert "| endless | stopped |" in report
    assert r"| 7 | a \| b |" in report
    assert "| 12,346 |" in report


def killed_runs(folder: Path) -> Iterator[tuple[Path, float]]:
    """Kill the suite after fixed random delays; yield the folder of each run."""
    rng = random.Random(13)
    for number in range(4):
        out, delay = folder / str(number), rng.uniform(0.05, 0.5)
        process = quick(out, "--only", "rows", "endless")
        wait_for_lines(out, "row", 1)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        yield out, delay


def wait_for_lines(out: Path, kind: str, count: int) -> None:
    """Wait until there are this many lines of a kind."""
    while True:
        try:
            if sum(line["kind"] == kind for line in read(out)) >= count:
                return
        except ValueError:  # nothing yet
            pass
        time.sleep(0.01)


def test_a_killed_run_leaves_a_readable_report(tmp_path: Path) -> None:
    """At any moment there are rows in order from the first on, and a report that says what did not end."""
    for out, _ in killed_runs(tmp_path):
        numbers = [line["cells"]["number"] for line in read(out) if line["kind"] == "row" and line["part"] == "rows"]
        assert numbers == list(range(len(numbers)))
        assert 1 <= len(numbers) <= NUM_ROWS
        command = [sys.executable, "-m", "benchmarking.gpu_report", str(out), "--print"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "not ended: the suite was killed" in shown
        assert "Quick 1" in shown


def test_a_killed_suite_leaves_no_process(tmp_path: Path) -> None:
    """A part ends with the suite, however that ends: its process must not keep the device."""
    process = quick(tmp_path / "out", "--only", "endless")
    wait_for_lines(tmp_path / "out", "row", 1)
    children = [pid for pid in children_of(process.pid) if "benchmarking.gpu.child" in command_of(pid)]
    assert len(children) == 1
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while os.path.exists(f"/proc/{children[0]}") and "gpu.child" in command_of(children[0]):
        time.sleep(0.01)


def test_ctrl_c_ends_the_suite_with_a_report(tmp_path: Path) -> None:
    """The running part is stopped with everything that it started, the report says so, and the exit code is 130."""
    out = tmp_path / "out"
    process = quick(out, "--only", "endless", "last")
    wait_for_lines(out, "row", 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    ends = {line["part"]: (line["status"], line["why"]) for line in read(out) if line["kind"] == "part"}
    assert ends == {"environment": ("done", ""), "endless": ("stopped", "interrupted")}
    assert "| endless | stopped |" in (out / "report.md").read_text()


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_left_out(cut: int, tmp_path: Path) -> None:
    """A file that ends in the middle of a line, or of a character, is read up to the line before."""
    lines = [{"kind": "suite", "date": "today"}, {"kind": "row", "part": "é", "table": "Ü", "cells": {"x": 1}}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "results.jsonl").write_bytes(text.encode()[:-cut])
    assert read(tmp_path) == lines[: 2 if cut == 1 else 1]
    assert "today" in markdown(read(tmp_path))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(argv)
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_plan_is_printed_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dry-run` names each part, its time, what is missing for it, and the wheels to carry."""
    monkeypatch.setattr(gpu_suite, "find_spec", lambda name: None if name in ("pydantic", "tomli_w") else object())
    code, plan, _ = run(capsys, "--out", str(tmp_path / "out"), "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()
    for part in suite_parts.PARTS:
        assert part.name in plan
    assert plan.count("(skipped, not installed: pydantic, tomli-w)") == 4
    assert "pip install pydantic tomli-w; by hand, the wheels of pydantic, pydantic-core, annotated-types" in plan


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cpu"], "--device cpu: expected --tiny with it"),
        (["--only", "tests", "speed"], "invalid choice: 'speed'"),
        (["--minutes", "0"], "expected minutes, more than 0 and at most a day, found '0'"),
        (["--minutes", "nine"], "found 'nine'"),
        (["--text", "no-such.txt"], "--text no-such.txt: no such file"),
    ],
)
def test_bad_arguments_are_refused(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that says what is wrong, and no folder."""
    code, _, errors = run(capsys, "--out", str(tmp_path / "out"), *argv)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_results_are_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with results, and a file in the folder's place, are refused before anything runs."""
    (tmp_path / "results.jsonl").write_text("kept\n")
    code, _, errors = run(capsys, "--out", str(tmp_path), *TOY)
    assert (code, (tmp_path / "results.jsonl").read_text()) == (2, "kept\n")
    assert "expected a new folder, found the results.jsonl of an earlier run in it" in errors
    (tmp_path / "file").write_text("")
    code, _, errors = run(capsys, "--out", str(tmp_path / "file"), *TOY)
    assert code == 2
    assert "expected a folder that can be written to" in errors


def test_the_suite_needs_nothing_installed() -> None:
    """The plan and the report need only the standard library, so they can name whatever is missing."""
    code = "import sys, benchmarking.gpu_suite; print(sorted({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_parts_that_need_torch_alone_import_no_more() -> None:
    """On a machine without pydantic, for example, the speed of training and generation is still measured."""
    parts = [part for part in suite_parts.PARTS if part.needs == suite_parts.CORE]
    assert [part.name for part in parts] == ["training", "gpt2", "generation"]
    absent = set(suite_parts.COMMANDS) - set(suite_parts.CORE)
    modules = ", ".join(part.module for part in parts)
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
