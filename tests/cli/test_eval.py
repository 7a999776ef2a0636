"""Tests of `transformerlm-eval` as a user calls it."""

from __future__ import annotations

import pytest

from tests.cli.commands import call, shipped
from tests.training.tiny_run import read_records
from transformerlm.training.checkpoint import list_checkpoints

USUAL = ("--config", shipped("eval"), "--device=cpu", "--resamples=50")


def test_a_checkpoint_is_evaluated_on_text_and_on_its_token_file(pipeline):
    """One JSON line on stdout with sizes, values and intervals; a table on stderr."""
    for name in (pipeline.files.text, pipeline.files.valid):
        done = call("eval", *USUAL, "--checkpoint", pipeline.run, "--input", name)
        assert done.code == 0, done.stderr
        (record,) = done.records
        assert (
            record["metrics.bits_per_byte_low"] < record["metrics.bits_per_byte"] < record["metrics.bits_per_byte_high"]
        )
        assert (record["params.context_length"], record["params.stride"], record["params.precision"]) == (16, 8, "fp32")
        assert "bits/byte" in done.stderr
    text = pipeline.files.text.read_text(encoding="utf-8")
    (record,) = call("eval", *USUAL, "--checkpoint", pipeline.run, "--input", pipeline.files.text).records
    assert record["metrics.documents"] == 40
    assert record["metrics.bytes"] == len(text.replace("<|endoftext|>", "").encode())


def test_the_validation_loss_of_the_run_comes_out_again(pipeline):
    """With a stride of the context the loss on the same data is near the logged one, which leaves an end out."""
    arguments = ("--checkpoint", pipeline.run, "--input", pipeline.files.valid, "--mode=sliding", "--stride=16")
    (record,) = call("eval", *USUAL, *arguments).records
    logged = [line["metrics.val_loss"] for line in read_records(pipeline.run) if "metrics.val_loss" in line][-1]
    assert record["metrics.loss"] == pytest.approx(logged, rel=0.02)  # 20 windows of 43, each shifted by one token


def test_two_checkpoints_are_compared_on_the_same_text(pipeline):
    """The difference is that of the two, second minus first; training more has helped."""
    newest, older = list_checkpoints(pipeline.run / "checkpoints")[:2]
    done = call("eval", *USUAL, "--compare", older, newest, "--input", pipeline.files.text)
    (record,) = done.records
    difference = record["b.metrics.bits_per_byte"] - record["a.metrics.bits_per_byte"]
    assert record["metrics.bits_per_byte_difference"] == pytest.approx(difference)
    assert record["metrics.bits_per_byte_difference_high"] < 0
    assert (record["a.checkpoint"], record["b.checkpoint"]) == (str(older), str(newest))
    assert "second - first" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "one"), "compare: expected two checkpoints, found one (one)"),
        (("--input", "a.txt", "b.npy"), "input: expected text files or one token file, found 2"),
        (("--stride=9", "--context_length=8"), "stride (9) exceeds context_length (8)"),
        (("--checkpoint=nowhere",), "nowhere: no such checkpoint or run directory"),
        (("--checkpoint=none",), "expected checkpoint, or compare with two checkpoints, found neither"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_line(arguments, message):
    """Each error names the key, and exits with 2."""
    done = call("eval", "--config", shipped("eval"), *arguments)
    assert done.code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_bytes_that_are_no_utf8_are_told_of(pipeline, tmp_path):
    """They are counted on stderr, or refused."""
    (tmp_path / "a.txt").write_bytes(b"Ada sees \xff the sea.")
    arguments = (*USUAL, "--checkpoint", pipeline.run, "--input", tmp_path / "a.txt")
    done = call("eval", *arguments)
    assert done.records[0]["metrics.loss_low"] is None  # a single document
    assert "U+FFFD was read 1 times" in done.stderr
    assert call("eval", *arguments, "--invalid_utf8=refuse").code == 2
