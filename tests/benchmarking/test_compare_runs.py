"""Behaviour of the comparison of runs: rows by name without the seed, the first row as the baseline, a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarking.compare_runs import main


def make_run(folder: Path, name: str, *losses: float) -> str:
    """Write a run whose validations, 100 tokens apart, have these losses; return its directory."""
    (folder / name).mkdir()
    lines = [{"event": "started"}, {"step": 1, "metrics.loss": 9.0, "metrics.tokens": 10}]
    lines += [{"metrics.tokens": 100 * (n + 1), "metrics.val_loss": loss} for n, loss in enumerate(losses)]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / name)


def test_runs_that_differ_in_the_seed_share_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Last losses, their mean, and the mean against the first row; tokens are those of the last validation."""
    runs = [make_run(tmp_path, "adamw-0", 5.0, 4.0), make_run(tmp_path, "adamw-12", 5.0, 4.5)]
    main([*runs, make_run(tmp_path, "muon-lr0.1", 4.0)])
    assert capsys.readouterr().out.splitlines() == [
        "|  | tokens | run 1 | run 2 | mean | against the first |",
        "|---|---|---|---|---|---|",
        "| adamw | 200 | 4.000 | 4.500 | 4.250 | +0.000 |",
        "| muon-lr0.1 | 100 | 4.000 |  | 4.000 | -0.250 |",
    ]


def test_a_run_that_diverged_has_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss, more than twice the first run's, says nothing; nor does a mean with it."""
    runs = [make_run(tmp_path, "a-0", 5.0, 4.0), make_run(tmp_path, "b-0", 3.0), make_run(tmp_path, "b-1", 5.0, 8.1)]
    main(runs)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | 200 | 4.000 |  | 4.000 | +0.000 |",
        "| b | 200 | 3.000 | diverged |  |  |",
    ]


def test_a_picture_is_written(tmp_path: Path) -> None:
    """A PNG, where asked for."""
    pytest.importorskip("matplotlib")
    main([make_run(tmp_path, "a", 5.0, 4.0), make_run(tmp_path, "b", 4.0, 3.0), "--picture", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ('{"a": 1}\n', "expected validation losses, found none"), ("{", "expected a JSON object")],
)
def test_what_is_no_run_is_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, with a line that names the file."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "metrics.jsonl" in error
    assert message in error
