"""Runs are compared in rows by name without the seed, with the first row as the baseline, and in a picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarking.compare_runs import main
from cli.train import train
from tests.training.tiny_run import tiny_config, write_tiny_files

FACTS = {"tokenizer_sha256": "a", "valid_sha256": "b", "valid_tokens": 100}


def make_run(folder: Path, name: str, *losses: float, **facts: object) -> str:
    """Write a run whose validations, 100 tokens apart, have these losses; return its directory."""
    (folder / name).mkdir()
    lines = [{"event": "started", **FACTS, **facts}, {"step": 1, "metrics.loss": 9.0, "metrics.tokens": 10}]
    lines += [
        {"metrics.tokens": 100 * (n + 1), "metrics.val_loss": loss, "metrics.val_bits_per_byte": loss / 2}
        for n, loss in enumerate(losses)
    ]
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
    """Its loss, more than twice the first run's, means nothing; nor does a mean that includes it."""
    runs = [make_run(tmp_path, "a-0", 5.0, 4.0), make_run(tmp_path, "b-0", 3.0), make_run(tmp_path, "b-1", 5.0, 8.1)]
    main(runs)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | 200 | 4.000 |  | 4.000 | +0.000 |",
        "| b | 200 | 3.000 | diverged |  |  |",
    ]


@pytest.mark.parametrize(
    ("fact", "named"),
    [
        (
            {"tokenizer_sha256": "other", "valid_sha256": "other"},
            "differ in tokenizer, validation file: comparing",
        ),
        ({"valid_sha256": "other"}, "differ in validation file: comparing bits per byte"),
        ({"valid_tokens": 50}, "differ in number of validation tokens: comparing bits per byte"),
    ],
    ids=str,
)
def test_runs_that_nats_do_not_compare_are_compared_in_bits_per_byte(
    fact: dict[str, object], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line reports another tokenizer, text or part of it, and the table uses the other measure."""
    main([make_run(tmp_path, "a", 4.0), make_run(tmp_path, "b", 3.0, **fact)])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2:] == [
        "| a | 100 | 2.000 | 2.000 | +0.000 |",
        "| b | 100 | 1.500 | 1.500 | -0.500 |",
    ]
    assert named in shown.err
    assert len(shown.err.splitlines()) == 1


def test_runs_alike_are_compared_in_nats_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of an earlier version does not say what it was measured on, which a line reports."""
    runs = [make_run(tmp_path, "a", 4.0), make_run(tmp_path, "b", 3.0)]
    main(runs)
    assert capsys.readouterr().err == ""
    path = tmp_path / "b/metrics.jsonl"
    path.write_text(path.read_text().replace('"tokenizer_sha256": "a", ', ""))
    main(runs)
    shown = capsys.readouterr()
    assert "| b | 100 | 3.000 | 3.000 | -1.000 |" in shown.out
    assert "b: does not say what it was measured on" in shown.err


def test_the_facts_of_a_real_run_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This reads what training writes: with other eval_tokens the losses are not those of the same text."""
    files = write_tiny_files(tmp_path)
    for name, tokens in (("a", 128), ("b", 256)):
        changes = {"training.eval_tokens": tokens, "training.max_steps": 3, "logging.run_name": name}
        assert train(tiny_config(files, tmp_path, changes)) == 0
    capsys.readouterr()
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "differ in number of validation tokens" in capsys.readouterr().err


def test_without_matplotlib_the_table_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the picture is missing, which one line says; the rest is done."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([make_run(tmp_path, "a", 4.0), "--picture", str(tmp_path / "p.png")])
    shown = capsys.readouterr()
    assert "| a | 100 | 4.000 |" in shown.out
    assert shown.err.startswith("no picture: ")
    assert 'pip install "transformerlm[plot]"' in shown.err
    assert not (tmp_path / "p.png").exists()


def test_a_picture_is_written(tmp_path: Path) -> None:
    """A PNG is written if asked for."""
    pytest.importorskip("matplotlib")
    main([make_run(tmp_path, "a", 5.0, 4.0), make_run(tmp_path, "b", 4.0, 3.0), "--picture", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ('{"a": 1}\n', "expected validations with metrics.val_loss, found none"),
        ("{", "expected a JSON object"),
    ],
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
