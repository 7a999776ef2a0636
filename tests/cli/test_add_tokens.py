"""`transformerlm-add-tokens` as a user calls it, and all that its output is good for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.commands import call, shipped
from tests.training.tiny_run import VOCAB_SIZE
from transformerlm.token_files.dataset import TokenDataset

SIZE = f"--model.vocab_size={VOCAB_SIZE + 2}"


@pytest.fixture(scope="module")
def extended(pipeline, tmp_path_factory) -> Path:
    """Return a run with ChatML's tokens that no test changes."""
    out = tmp_path_factory.mktemp("extended") / "run"
    done = call("add_tokens", "--config", shipped("add_tokens"), "--source", pipeline.run, "--output", out)
    assert done.code == 0, done.stderr
    return out


def test_the_command_says_what_is_new(pipeline, tmp_path):
    """Ids and rows on stderr, the same as a line of JSON, and a line that begins a training."""
    arguments = ("--source", pipeline.run, "--output", tmp_path / "out")
    done = call("add_tokens", *arguments, "--special_tokens", "<|im_start|>", "<|endoftext|>")
    assert done.code == 0, done.stderr
    (record,) = done.records
    assert record["added"] == {"<|im_start|>": VOCAB_SIZE}
    assert list(record["known"]) == ["<|endoftext|>"]
    assert record["model.vocab_size"] == VOCAB_SIZE + 1
    assert record["tokenizer"] == str(tmp_path / "out/tokenizer")
    assert f"<|im_start|>: {VOCAB_SIZE}" in done.stderr
    assert "a special token before" in done.stderr
    assert f"the model has {VOCAB_SIZE + 1} rows, 1 of them new" in done.stderr
    assert f"--checkpoint.init_from={tmp_path / 'out'}" in done.stderr
    for line in done.stderr.splitlines():
        if "transformerlm-" in line:  # what to do next: the commands take these words
            program, *words = shlex.split(line)
            asked = call(program.rpartition("transformerlm-")[2].replace("-", "_"), *words, "--print-config")
            assert asked.code == 0, asked.stderr


def test_all_commands_take_the_result(extended, pipeline, tmp_path):
    """It generates, is evaluated on the old token file, and is exported; its answers are those of the old model."""
    old, new = (
        call("infer", "--checkpoint", run, "--prompt", "Ada", "--sampling.temperature=0", "--device=cpu")
        for run in (pipeline.run, extended)
    )
    assert new.code == 0, new.stderr
    assert new.records[0]["text.output"] == old.records[0]["text.output"]
    usual = ("--config", shipped("eval"), "--input", pipeline.files.valid, "--resamples=0", "--device=cpu")
    old, new = (call("eval", *usual, "--checkpoint", run) for run in (pipeline.run, extended))
    assert new.code == 0, new.stderr
    more = new.records[0]["metrics.loss"] - old.records[0]["metrics.loss"]
    assert 0 < more < 0.02  # two more ids, each about as likely as an average one of 290
    done = call("export", "--checkpoint", extended, "--output", tmp_path / "hf", "--verify=false")
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "hf/config.json").read_text())["vocab_size"] == VOCAB_SIZE + 2


def test_what_is_there_already_is_not_new(extended, tmp_path):
    """The tokens a second time: the command says that nothing is new, and not that they took rows to spare."""
    done = call("add_tokens", "--source", extended, "--output", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert done.records[0]["added"] == {}
    assert "nothing is new" in done.stderr
    assert "to spare" not in done.stderr


def test_a_run_begins_with_it_on_old_and_on_new_token_files(extended, pipeline, tmp_path):
    """The old files are valid for the new tokenizer, and conversations are encoded with it."""
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada sees the sea."}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 40)
    tokenizer = extended / "tokenizer"
    arguments = ("--input", tmp_path / "chat.jsonl", "--tokenizer", tokenizer, "--train", tmp_path / "chat.npy")
    done = call("make_data", *arguments, "--toml", "chat = {}")
    assert done.code == 0, done.stderr
    usual = ("--config", pipeline.train_toml, SIZE, f"--data.tokenizer={tokenizer}", "--training.max_steps=3")
    begin = (f"--checkpoint.init_from={extended}", f"--runs_dir={tmp_path}")
    for name, data in (("old", pipeline.files.train), ("new", tmp_path / "chat.npy")):
        done = call("train", *usual, *begin, f"--logging.run_name={name}", f"--data.train={data}")
        assert done.code == 0, done.stderr
    assert TokenDataset(tmp_path / "chat.npy").has_mask


def test_it_is_no_run_to_resume(extended, pipeline):
    """The line says which key begins a run with it."""
    arguments = (SIZE, f"--data.tokenizer={extended / 'tokenizer'}", f"--runs_dir={extended.parent}")
    done = call("train", "--config", pipeline.train_toml, *arguments, "--training.max_steps=100")
    assert done.code == 2
    advice = "choose another logging.run_name, and name it in checkpoint.init_from"
    assert f"a model with tokens added: {advice}" in done.stderr


def test_the_old_run_is_refused_with_the_new_tokenizer(extended, pipeline, tmp_path):
    """It lacks the rows, and the line names the command that adds them."""
    arguments = (SIZE, f"--data.tokenizer={extended / 'tokenizer'}", f"--runs_dir={tmp_path}")
    done = call("train", "--config", pipeline.train_toml, *arguments, f"--checkpoint.init_from={pipeline.run}")
    assert done.code == 2
    assert f"model.vocab_size is {VOCAB_SIZE} there, {VOCAB_SIZE + 2} here" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=nowhere", "--output=out"], "nowhere: no such checkpoint or run directory"),
        (["--source=taken", "--output=taken/out"], "output: expected a directory apart from the source"),
        (["--source=nowhere", "--output=taken"], "taken: is there already"),
        (["--source=nowhere", "--output=out", "--special_tokens="], "special_tokens"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch):
    """Exit code 2, what was expected and what was found; nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    done = call("add_tokens", *arguments)
    assert done.code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]


def test_a_word_that_is_a_token_is_refused(pipeline, tmp_path):
    """Text that spells it would get another id."""
    tokens = json.loads((pipeline.files.tokenizer / "vocab.json").read_text(encoding="utf-8"))
    word = next(token for token, number in tokens.items() if number > 256 and token.isascii() and token.isalpha())
    done = call("add_tokens", "--source", pipeline.run, "--output", tmp_path / "out", "--special_tokens", word)
    assert done.code == 2
    assert f"found {word!r}, which is the ordinary token {tokens[word]}" in done.stderr
