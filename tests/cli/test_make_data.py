"""`transformerlm-make-data`: token files that training opens, a JSON line for each, and refusals before any work."""

from __future__ import annotations

import pytest

from tests.cli.commands import call
from transformerlm.training.data import TokenDataset


@pytest.fixture
def arguments(pipeline, tmp_path):
    """Return a command line for the pipeline's text and tokenizer."""
    return ["--input", pipeline.files.text, "--tokenizer", pipeline.files.tokenizer, "--train", tmp_path / "train.npy"]


def test_it_writes_both_splits_and_a_line_for_each(arguments, pipeline, tmp_path):
    """Training and validation file open with the numbers that the lines name, and hold all documents between them."""
    done = call("make_data", *arguments, "--valid", tmp_path / "valid.npy", "--valid_fraction=0.2")
    assert done.code == 0
    assert [record["event"] for record in done.records] == ["data_made", "data_made"]
    for record in done.records:
        dataset = TokenDataset(record["path"])
        dataset.verify()
        assert (record["tokens"], record["bytes"]) == (dataset.num_tokens, dataset.num_bytes)
    text = pipeline.files.text.read_text()
    assert sum(record["documents"] for record in done.records) == text.count("<|endoftext|>") + 1
    assert "documents" in done.stderr


def test_outputs_are_not_written_over_by_accident(arguments, tmp_path):
    """A file that is there already is refused, and replaced with `--overwrite`."""
    call("make_data", *arguments)
    before = (tmp_path / "train.npy").stat().st_mtime_ns
    again = call("make_data", *arguments)
    assert (again.code, again.stdout) == (2, "")
    assert "overwrite" in again.stderr
    assert (tmp_path / "train.npy").stat().st_mtime_ns == before
    assert call("make_data", *arguments, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tokenizer=nowhere"], "nowhere"),
        (["--input=nowhere.txt"], r"nowhere\.txt"),
        (["--separator=<sep>"], "<sep>"),
        (["--train=x.bin"], r"must end in \.npy"),
        (["--valid_fraction=0.5"], "go together"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line_and_exit_2(changes, message, arguments, tmp_path, monkeypatch):
    """Inputs that are missing or do not fit together are refused, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    done = call("make_data", *arguments, *changes)
    assert (done.code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message.replace("\\", "") in done.stderr
    assert list(tmp_path.iterdir()) == []
