"""Clock, locale, hash seed, umask, width of the terminal and names: the same numbers, or a plain error."""

from __future__ import annotations

import os

import pytest

from tests.torture.faults import small_disk
from tests.torture.harness import Run, compare, one_line_refusal
from tests.torture.order import SHIM
from tests.torture.process import ROOT, Exec, Surroundings

PATH = f"{SHIM}:{ROOT}"
AWAY = {"TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "COLUMNS": "20", "LINES": "1"}
PLAIN = {
    "TZ": "",
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "ascii",
}
AROUND = {
    "far away, private files": Surroundings(AWAY, umask=0o077),
    "jumping clock, open files": Surroundings({"TORTURE_CLOCK": "1", "PYTHONPATH": PATH}, umask=0o000),
}


@pytest.mark.parametrize("name", AROUND)
def test_surroundings_change_nothing(name, real, real_reference, tmp_path):
    """Another time zone, locale, width, umask, or a clock that jumps by months: the same numbers and weights."""
    run = Run(real, tmp_path / "Ein Ort: é 🍎 'quoted'", run_name="a run @1 =2")
    assert run.finish(around=AROUND[name]) == []
    assert compare(run, real_reference) == []


def test_another_hash_seed_and_a_plain_locale(real, real_reference, tmp_path):
    """Another hash seed, the C locale and an ASCII terminal change nothing, not even where names are not ASCII."""
    run = Run(real, tmp_path / "été", run_name="a run")
    child = run.start(around=Surroundings({**PLAIN, "PYTHONHASHSEED": "7"}), starter=Exec(["-m", "cli.train"]))
    assert child.wait() == 0, child.stderr
    assert compare(run, real_reference) == []


def test_a_directory_that_cannot_be_written(real, tmp_path):
    """A place below a file, and a read-only one, are refused in one line that names them."""
    (tmp_path / "file").write_text("")
    run = Run(real, tmp_path)
    assert one_line_refusal(run.start("--runs_dir=file/runs"), naming="file") == []
    with small_disk(tmp_path / "fixed", kilobytes=16, read_only=True) as mounted:
        if not mounted:
            (tmp_path / "fixed").chmod(0o555)
        if mounted or os.geteuid() != 0:
            assert one_line_refusal(run.start("--runs_dir=fixed/runs"), naming="fixed") == []
