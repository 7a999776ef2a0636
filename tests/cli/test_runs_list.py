"""`transformerlm-runs list` shows the runs of a directory as JSON lines and as a table."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.commands import ROOT, call, call_in_terminal, lines_on_screen
from tests.experiments.runs import FINISHED, STARTED, step, validation, write_run


@pytest.fixture
def runs(tmp_path):
    """Return a directory with two finished runs and one that broke off."""
    folder = tmp_path / "runs"
    for at, (name, width, loss) in enumerate([("narrow", 64, 3.0), ("wide", 128, 2.5)]):
        records = (STARTED, step(10, 4.0), validation(50, loss), {"event": "summary", "best_val_loss": loss}, FINISHED)
        write_run(folder, name, *records, config={"model.d_model": width}, at=1.7e9 + at)
    write_run(folder, "killed", STARTED, step(7, 5.0), config={"model.d_model": 64}, at=1.6e9)
    return folder


def names(*arguments: object) -> list[str]:
    """Return the names of the runs that are listed."""
    done = call("runs_list", *arguments)
    assert (done.code, done.stderr) == (0, "")
    return [record["name"] for record in done.records]


def test_each_run_is_a_json_line(runs):
    """Where stdout is no terminal, a line has all that is known of a run, the one that changed last first."""
    first, second, third = call("runs_list", runs).records
    assert [first["name"], second["name"], third["name"]] == ["wide", "narrow", "killed"]
    assert (first["state"], third["state"]) == ("finished", "interrupted")
    assert (first["step"], first["max_steps"], first["tokens"], first["parameters"]) == (50, 50, 3200, 1000)
    assert (first["best_val_loss"], first["val_bits_per_byte"], first["tokens_per_second"]) == (2.5, 1.25, 100.0)
    assert first["directory"] == str(runs / "wide")
    files = list((runs / "wide").iterdir())
    assert first["disk_bytes"] == sum(path.stat().st_size for path in files)
    assert third["best_val_loss"] is None


IMPORTED = """
import sys
from cli.runs import main
try:
    main(["list", sys.argv[1]])
except SystemExit:
    heavy = ("config.commands", "config.train", "numpy", "torch")
    print(*(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


def test_a_list_imports_no_more_than_it_needs(runs, tmp_path, monkeypatch):
    """The schemas of all commands take longer than a look at a thousand runs that have not changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, "-c", IMPORTED, str(runs)]
    for _ in range(2):  # the first one reads the runs
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == "\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--filter=model.d_model=64"], ["narrow", "killed"]),
        (["--filter=model.d_model>64"], ["wide"]),
        (["--filter", "model.d_model<128", "state=finished"], ["narrow"]),
        (["--filter=best_val_loss<2.7"], ["wide"]),
        (["--filter=best_val_loss=none"], ["killed"]),
        (["--filter=state!=finished"], ["killed"]),
        (["--filter=name>a"], []),
        (["--sort=best_val_loss"], ["wide", "narrow", "killed"]),
        (["--sort=best_val_loss", "--reverse"], ["narrow", "wide", "killed"]),
        (["--sort=model.d_model", "--reverse"], ["wide", "narrow", "killed"]),
        (["--sort=name"], ["killed", "narrow", "wide"]),
    ],
    ids=str,
)
def test_rows_are_filtered_and_sorted(arguments, expected, runs):
    """By keys of the table and of the settings; a run without the key is last, in either order."""
    assert names(runs, *arguments) == expected


def test_a_key_that_no_run_has_is_refused(runs):
    """The line names the option and what was most likely meant; all such keys are told at once."""
    done = call("runs_list", runs, "--filter=model.d_modle=64", "--sort=lr")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "transformerlm-runs list: filter: model.d_modle is not a key of the table or of a run's settings "
        "(did you mean model.d_model?)",
        "transformerlm-runs list: sort: lr is not a key of the table or of a run's settings "
        "(did you mean optimizer.learning_rate?)",
    ]


@pytest.mark.parametrize("text", ["model.d_model", "=3", "a!3"])
def test_what_is_no_filter_is_refused(text):
    """The error says how a filter is written."""
    done = call("runs_list", f"--filter={text}")
    assert done.code == 2
    assert "expected KEY=VALUE, or with != < <= > >=" in done.stderr


def test_a_table_for_people(runs):
    """On a terminal each run has a row; a name with an escape sequence stays text."""
    write_run(runs, "odd\x1b[31m", STARTED)
    done = call_in_terminal("runs_list", runs)
    head, *rows = lines_on_screen(done.stdout.rstrip("\n"))
    assert head.split()[:5] == ["name", "state", "step", "of", "val"]
    assert rows[0].split()[:5] == ["wide", "finished", "50", "50", "2.500"]
    assert rows[-1].startswith("killed") or rows[-1].startswith("odd\\x1b[31m")
    assert "\x1b[31m" not in done.stdout


def test_a_directory_without_runs(tmp_path):
    """No runs are no error; no directory is one."""
    (tmp_path / "runs").mkdir()
    assert call("runs_list", tmp_path / "runs").stdout == ""
    done = call("runs_list", tmp_path / "runs", "--output.format=text")
    assert (done.code, done.stdout, done.stderr) == (0, "", f"{tmp_path}/runs: no runs\n")
    done = call("runs_list", tmp_path / "none")
    assert done.code == 2
    assert done.stderr == f"error: runs_dir: expected a directory of runs, found no directory {tmp_path}/none\n"
