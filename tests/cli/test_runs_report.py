"""`transformerlm-runs report`: a file for people, a JSON line for programs, and refusals in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import call
from tests.experiments.runs import STARTED, step, validation, write_run
from tests.training.tiny_run import read_records


def test_a_report_is_written_and_told(tmp_path):
    """stdout has one JSON line, stderr a sentence, and the file is there."""
    runs = [write_run(tmp_path, name, STARTED, step(1, 3.0), validation(2, 2.5)) for name in ("one", "two")]
    output = tmp_path / "out.html"
    found = call("runs_report", *runs, "--output", output, "--title=Two of them")
    assert found.code == 0
    size = output.stat().st_size
    assert found.records == [{"event": "report_written", "path": str(output), "runs": 2, "bytes": size}]
    assert f"{output}: 2 runs, {size / 1000:,.0f} kB; open it in a browser" in found.stderr
    assert '"title":"Two of them"' in output.read_text()


def test_refusals_are_one_line(tmp_path):
    """A directory that is no run, and an output that is something else's, are refused before anything is written."""
    run = write_run(tmp_path, "one", step(1, 3.0))
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    for arguments, words in (
        ([tmp_path], f"{tmp_path}: expected the directory of a run, found no metrics.jsonl in it"),
        ([run, f"--output={kept}"], "expected a new name or an older report"),
        ([run, f"--output={tmp_path}"], "found a directory"),
    ):
        found = call("runs_report", *arguments)
        assert found.code == 2
        assert words in found.stderr
        assert len(found.stderr.splitlines()) == 1
    assert kept.read_text() == "mine"


@pytest.mark.slow
def test_the_command_in_it_gives_the_same_losses(pipeline, tmp_path):
    """A shell that runs the report's command in a fresh place trains the same run, bit for bit."""
    from transformerlm.experiments.history import read_history
    from transformerlm.experiments.reproduction import command_of

    history = read_history(pipeline.run)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-c", command_of(history)]
    subprocess.run(
        command, check=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, timeout=600
    )
    again = pipeline.run.resolve().parent / "reproduced" / pipeline.run.name

    def losses(run: Path) -> list[object]:
        keys = ("step", "metrics.loss", "metrics.val_loss", "metrics.grad_l2_norm")
        return [tuple(one.get(key) for key in keys) for one in read_records(run) if "metrics.loss" in one]

    assert len(losses(again)) == 12
    assert losses(again) == losses(pipeline.run)
