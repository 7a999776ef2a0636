"""Past runs are measured by real fits, one after the other, and a stop costs the one that was running."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarking import fit_rows
from transformerlm.experiments.fit.prediction import Row, read_rows
from transformerlm.utils.lock import DirectoryLock


@pytest.fixture
def fits(monkeypatch):
    """Pretend the fits; return what was started: text, time and exit code."""
    started: list[list[str]] = []
    codes: dict[int, int] = {}

    def run(command, *, quiet):
        started.append(command[4:])
        text, seconds, home = (word.rpartition("=")[2] for word in command[4:7])
        Path(home).mkdir(parents=True)  # transformerlm-fit takes no directory that is there
        if code := codes.get(len(started) - 1, 0):
            return code, "", ""
        row = Row(Path(text).name, 10**6, 250_000, 2000, 10**6, 3.1, 0.1, 1000, 100, float(seconds[:-1]), 3.0, 2.5)
        (Path(home) / "outcome.json").write_text(json.dumps({"row": asdict(row)}))
        return 0, "", ""

    monkeypatch.setattr(fit_rows, "wait_for", run)
    return started, codes


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder of two texts."""
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text("words")
    return tmp_path / "texts"


def measure(folder, out):
    """Run the command for two times and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        fit_rows.main([str(folder), "--out", str(out), "--seconds", "60", "20"])
    return ended.value.code


def test_each_text_gives_a_row_for_each_time(fits, folder, tmp_path):
    """The rows are in the form that fit reads; the shortest time comes first."""
    out = tmp_path / "rows.json"
    assert measure(folder, out) == 0
    assert [(row.corpus, row.passes) for row in read_rows(out)] == [
        ("a.txt", 20.0),
        ("a.txt", 60.0),
        ("b.txt", 20.0),
        ("b.txt", 60.0),
    ]
    started, _ = fits
    assert [words[1] for words in started] == ["--time=20s", "--time=20s", "--time=60s", "--time=60s"]


@pytest.mark.parametrize("code", [129, 130, 143])
def test_the_same_command_goes_on_after_a_stop(code, fits, folder, tmp_path):
    """Ctrl-C or a closed terminal ends it with the rows so far; then only what is missing is fitted."""
    started, codes = fits
    codes[2] = code
    out = tmp_path / "rows.json"
    assert measure(folder, out) == code
    assert len(read_rows(out)) == 2
    codes.clear()
    assert measure(folder, out) == 0
    assert len(read_rows(out)) == 4
    assert len(started) == 5


def test_a_fit_that_fails_is_named_and_the_others_go_on(fits, folder, tmp_path, capsys):
    """One text that cannot be fitted costs no other row, also the next time; the exit code says what is missing."""
    started, codes = fits
    codes[0] = codes[4] = 1
    out = tmp_path / "rows.json"
    for number in (4, 5):
        assert measure(folder, out) == 1
        assert len(read_rows(out)) == 3
        assert f"no row from {tmp_path / 'rows' / 'a.txt-20s'}" in capsys.readouterr().err
        assert len(started) == number
    assert measure(folder, out) == 0
    assert len(read_rows(out)) == 4


def test_a_folder_in_which_another_command_measures_is_refused(fits, folder, tmp_path, capsys):
    """It would remove what the other one has not finished."""
    with DirectoryLock(tmp_path / "rows"):
        assert measure(folder, tmp_path / "rows.json") == 2
    assert "expected to be the only measurement here, found process" in capsys.readouterr().err
    assert fits[0] == []


def test_a_folder_without_files_is_refused(tmp_path, capsys):
    """There is one line, and no file."""
    (tmp_path / "texts").mkdir()
    assert measure(tmp_path / "texts", tmp_path / "rows.json") == 2
    assert "expected text files, found none" in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()
