"""Tests of `transformerlm-eval` as a user calls it."""

from __future__ import annotations

import json

import pytest

from config.io import dump_toml
from databuilder.dataset_builder import build_dataset
from tests.cli.commands import call, shipped
from tests.interop.models import make_checkpoint
from tests.token_files.shards import as_shards
from tests.training.tiny_run import read_records, tiny_config, write_chat_files
from transformerlm.checkpoints.directory import list_checkpoints
from transformerlm.checkpoints.document_ids import KEY, DocumentIds
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat

USUAL = ("--config", shipped("eval"), "--device=cpu", "--resamples=50")


def test_a_checkpoint_is_evaluated_on_text_and_on_its_token_file(pipeline, tmp_path):
    """One JSON line on stdout with sizes, values and intervals; a table on stderr."""
    for name in (pipeline.files.text, pipeline.files.valid, as_shards(pipeline.files.valid, tmp_path, shard_tokens=50)):
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
    """With a stride of the context the loss on the same data is close to the logged one, which omits an end."""
    arguments = ("--checkpoint", pipeline.run, "--input", pipeline.files.valid, "--mode=sliding", "--stride=16")
    (record,) = call("eval", *USUAL, *arguments).records
    logged = [line["metrics.val_loss"] for line in read_records(pipeline.run) if "metrics.val_loss" in line][-1]
    assert record["metrics.loss"] == pytest.approx(logged, rel=0.02)  # 20 windows of 43, each shifted by one token


def test_documents_of_a_token_file_begin_as_those_of_a_text(pipeline, tmp_path):
    """A model that knows another token before a text than after it reads that one in both."""
    tokenizer = Tokenizer.from_directory(pipeline.files.tokenizer)
    ends = (tokenizer.special_token_ids["<|endoftext|>"],)
    build_dataset(pipeline.files.text, tokenizer=tokenizer, train_path=tmp_path / "all.npy")
    losses = []
    for number, ids in enumerate((DocumentIds(7, ends, starts_texts=True), DocumentIds(ends[0], ends))):
        checkpoint = make_checkpoint(tmp_path / str(number), pipeline.files, state={KEY: ids.to_state()})
        for name in (pipeline.files.text, tmp_path / "all.npy"):
            (record,) = call("eval", *USUAL, "--checkpoint", checkpoint, "--input", name).records
            losses.append(record["metrics.loss"])
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


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
        (("--input", "a.txt", "b.shards/"), "found 2 with a .shards"),
        (("--stride=9", "--context_length=8"), "stride (9) exceeds context_length (8)"),
        (("--input", "a.npy", "--separator=<|x|>"), "separator is for text, found the token file a.npy"),
        (("--input", "a.npy", "--text_field=a"), "text_field is for text, found the token file a.npy"),
        (("--input", "a.npy", "--allow_special"), "allow_special is for text, found the token file a.npy"),
        (("--input", "a.shards", "--invalid_utf8=refuse"), "invalid_utf8 is for text, found the token file a.shards"),
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
    """Invalid bytes are counted on stderr, or refused."""
    (tmp_path / "a.txt").write_bytes(b"Ada sees \xff the sea.")
    arguments = (*USUAL, "--checkpoint", pipeline.run, "--input", tmp_path / "a.txt")
    done = call("eval", *arguments)
    assert done.records[0]["metrics.loss_low"] is None  # a single document
    assert "U+FFFD was read 1 times" in done.stderr
    assert call("eval", *arguments, "--invalid_utf8=refuse").code == 2


def test_a_part_of_the_documents_is_drawn(pipeline):
    """Documents of a text or a token file are drawn by seed, the same for both checkpoints; record and table say so."""
    newest, older = list_checkpoints(pipeline.run / "checkpoints")[:2]
    for name in (pipeline.files.text, pipeline.files.valid):
        done = call("eval", *USUAL, "--compare", older, newest, "--input", name, "--max_documents=7")
        (record,) = done.records
        assert (record["partial"], record["stopped_by"], record["params.max_documents"]) == (True, None, 7)
        for size in ("documents", "tokens", "bytes"):
            assert record[f"a.metrics.{size}"] == record[f"b.metrics.{size}"] > 0
        assert (record["a.metrics.documents"], record["documents"] > 7) == (7, True)
        assert f"7 of {record['documents']} documents" in done.stderr
        assert "partial (max_documents): an estimate of the whole text" in done.stderr
        assert "fewer than 20 documents: do not trust the intervals" in done.stderr
    sizes = [
        call("eval", *USUAL, "--checkpoint", newest, "--input", name, "--max_documents=7", seed).records[0][
            "metrics.bytes"
        ]
        for seed in ("--seed=1", "--seed=1", "--seed=2")
    ]
    assert sizes[0] == sizes[1] != sizes[2]


def test_all_documents_are_no_part(pipeline):
    """A limit above the number of documents omits none, and many documents need no warning."""
    done = call("eval", *USUAL, "--checkpoint", pipeline.run, "--input", pipeline.files.text, "--max_documents=99")
    (record,) = done.records
    assert (record["partial"], record["stopped_by"], record["documents"]) == (False, None, 40)
    assert "partial" not in done.stderr
    assert "do not trust" not in done.stderr


@pytest.mark.parametrize("mode", ["documents", "sliding"])
def test_the_time_ends_it_with_what_there_is(mode, pipeline):
    """At least one batch of each checkpoint is scored, and both count the same bytes of the same documents."""
    newest, older = list_checkpoints(pipeline.run / "checkpoints")[:2]
    arguments = ("--compare", older, newest, "--input", pipeline.files.text, f"--mode={mode}", "--time=0.0001s")
    done = call("eval", *USUAL, *arguments)
    (record,) = done.records
    assert (done.code, record["partial"], record["stopped_by"]) == (0, True, "time")
    assert 0 < record["a.metrics.documents"] == record["b.metrics.documents"] < record["documents"]
    assert record["a.metrics.bytes"] == record["b.metrics.bytes"] > 0
    assert "partial (stopped by time = 0.0001s): an estimate of the whole text" in done.stderr


def interrupt_at(batch, monkeypatch):
    """Press Ctrl-C in the given batch."""
    from transformerlm.evaluation import scoring

    batches, advance = [], scoring.Scoring.advance

    def interrupted(self):
        batches.append(self)
        if len(batches) == batch:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(scoring.Scoring, "advance", interrupted)


def test_ctrl_c_shows_what_there_is(pipeline, monkeypatch):
    """There is a table and a record of the batches before it, marked as partial, and the exit code of an interrupt."""
    interrupt_at(4, monkeypatch)
    done = call("eval", *USUAL, "--checkpoint", pipeline.run, "--input", pipeline.files.text)
    (record,) = done.records
    assert (done.code, record["partial"], record["stopped_by"]) == (130, True, "SIGINT")
    assert 0 < record["metrics.documents"] < 40
    assert "partial (stopped by Ctrl-C): an estimate of the whole text" in done.stderr


def test_ctrl_c_before_the_first_number_is_an_interrupt_like_any_other(pipeline, monkeypatch):
    """There is nothing to show, and stdout stays empty."""
    interrupt_at(1, monkeypatch)
    done = call("eval", *USUAL, "--checkpoint", pipeline.run, "--input", pipeline.files.text)
    assert (done.code, done.stdout, done.stderr.splitlines()[-1]) == (130, "", "interrupted")


def test_the_estimate_so_far_stands_in_the_line(pipeline, monkeypatch):
    """The progress shows bits per byte, or the difference of two, with the half width of its interval."""
    shown = []
    monkeypatch.setattr("cli.eval.SECONDS_BETWEEN_ESTIMATES", -1.0)
    monkeypatch.setattr("cli.eval.Progress", lambda *_, **__: lambda done, facts: shown.append(facts))
    newest, older = list_checkpoints(pipeline.run / "checkpoints")[:2]
    (record,) = call("eval", *USUAL, "--checkpoint", newest, "--input", pipeline.files.text).records
    assert shown[-1]["bits_per_byte"] == pytest.approx(record["metrics.bits_per_byte"])
    half = (record["metrics.bits_per_byte_high"] - record["metrics.bits_per_byte_low"]) / 2
    assert shown[-1]["margin"] == pytest.approx(half, rel=0.5)  # of 50 resamples
    (record,) = call("eval", *USUAL, "--compare", older, newest, "--input", pipeline.files.text).records
    assert shown[-1]["bits_per_byte_difference"] == pytest.approx(record["metrics.bits_per_byte_difference"])


# --- conversations -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Return the files of a run on conversations, and its directory: each conversation is whole in a row."""
    home = tmp_path_factory.mktemp("chat")
    files = write_chat_files(home)
    changes = {
        "model.context_length": 128,
        "model.document_mask": True,
        "data.packing": "documents",
        "data.order": "epoch",
        "training.max_steps": 6,
        "training.eval_tokens": 10**6,
    }
    (home / "train.toml").write_text(dump_toml(tiny_config(files, home, changes)))
    done = call("train", "--config", home / "train.toml")
    assert done.code == 0, done.stderr
    return files, home / "run"


def test_of_conversations_what_is_learnt_counts_alone(chat):
    """Loss, bits per byte and tokens are those of the run's own validation, and the output says what counts."""
    files, run = chat
    done = call("eval", *USUAL, "--checkpoint", run, "--input", files.valid)
    assert done.code == 0, done.stderr
    (record,) = done.records
    dataset = TokenDataset(files.valid)
    assert record["learnt_only"] is True
    assert record["metrics.tokens"] == dataset.num_learnt < len(dataset) / 2
    (line,) = [line for line in read_records(run) if line.get("step") == 6 and "metrics.val_loss" in line]
    assert record["metrics.loss"] == pytest.approx(line["metrics.val_loss"], rel=1e-5)
    assert record["metrics.bits_per_byte"] == pytest.approx(line["metrics.val_bits_per_byte"], rel=1e-5)
    answers = [
        message["content"]
        for row in files.text.read_text(encoding="utf-8").splitlines()
        for message in json.loads(row)["messages"]
        if message["role"] == "assistant"
    ]
    assert 0 < record["metrics.bytes"] < sum(len(answer.encode()) for answer in answers)
    assert "conversations: the tokens that are learnt count alone" in done.stderr
    assert record["metrics.documents"] == dataset.num_documents


def test_learnt_tokens_of_shards_and_of_a_stream_are_the_same(chat, tmp_path):
    """Mode sliding and shards count the same tokens and bytes, and a part of the documents fewer."""
    files, run = chat
    shards = tmp_path / "valid.shards"
    build_dataset(
        files.text,
        tokenizer=Tokenizer.from_directory(files.tokenizer),
        train_path=tmp_path / "train.shards",
        valid_path=shards,
        valid_fraction=0.3,
        text_field="messages",
        chat=ChatFormat(),
    )
    found = []
    for arguments in ((files.valid, "--mode=sliding"), (shards, "--mode=sliding"), (shards, "--mode=documents")):
        (record,) = call("eval", *USUAL, "--checkpoint", run, "--input", *arguments).records
        found.append((record["metrics.tokens"], record["metrics.bytes"], record["learnt_only"]))
    assert found[0] == found[1] == found[2]
    done = call("eval", *USUAL, "--compare", run, run, "--input", files.valid, "--max_documents=9")
    (record,) = done.records
    assert record["a.metrics.tokens"] == record["b.metrics.tokens"] < found[0][0]
    assert record["metrics.bits_per_byte_difference"] == 0


def test_conversations_without_an_answer_are_refused(chat, tmp_path):
    """There is nothing to count: one line, exit code 2."""
    files, run = chat
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}) + "\n")
    made = ("--input", questions, "--tokenizer", files.tokenizer, "--train", tmp_path / "q.npy", "--toml", "[chat]")
    assert call("make_data", *made, "--valid=none", "--valid_fraction=0").code == 0
    done = call("eval", *USUAL, "--checkpoint", run, "--input", tmp_path / "q.npy")
    assert (done.code, done.stdout) == (2, "")
    assert "q.npy: expected text that is learnt, found none in 1 documents" in done.stderr
    for key in ("train", "valid"):
        config = tiny_config(files, tmp_path, {f"data.{key}": str(tmp_path / "q.npy"), "model.context_length": 4})
        (tmp_path / "train.toml").write_text(dump_toml(config))
        done = call("train", "--config", tmp_path / "train.toml")
        assert done.code == 2
        assert f"data.{key}: {tmp_path / 'q.npy'}: expected some tokens that are learnt, found none" in done.stderr


def test_a_part_without_an_answer_is_refused(chat, tmp_path):
    """One of two conversations has an answer, and the other one is drawn."""
    files, run = chat
    rows = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}] for text in ("So.", "")]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    made = ("--input", path, "--tokenizer", files.tokenizer, "--train", tmp_path / "q.npy", "--toml", "[chat]")
    assert call("make_data", *made, "--valid=none", "--valid_fraction=0").code == 0
    arguments = (*USUAL, "--checkpoint", run, "--input", tmp_path / "q.npy", "--max_documents=1")
    found = [call("eval", *arguments, f"--seed={seed}") for seed in range(8)]
    assert {done.code for done in found} == {0, 2}
    refused = next(done for done in found if done.code)
    assert "q.npy: max_documents: expected text, found none in the 1 drawn" in refused.stderr


def test_text_counts_all_tokens(pipeline):
    """A token file without a mask is what it was: everything counts."""
    (record,) = call("eval", *USUAL, "--checkpoint", pipeline.run, "--input", pipeline.files.valid).records
    assert record["learnt_only"] is False
