"""`transformerlm-train-tokenizer`: a tokenizer that loads, one JSON line about it, and refusals before any work."""

from __future__ import annotations

import json
import os
import sys
import threading

import pytest

from logger import WandbLogger
from tests.cli.commands import call
from tests.logger.test_wandb_logger import FAKE
from tests.small_disk import files_of_at_most
from transformerlm.tokenizer import Tokenizer


@pytest.fixture
def arguments(pipeline, tmp_path):
    """Return a command line for the pipeline's text."""
    return ["--input", pipeline.files.text, "--output_dir", tmp_path / "tokenizer", "--tokenizer.vocab_size=280"]


def test_it_writes_a_tokenizer_and_one_json_line(arguments, pipeline, tmp_path):
    """The directory loads as the tokenizer that the line describes; stderr holds what is for people."""
    done = call("train_tokenizer", *arguments)
    assert done.code == 0
    (record,) = done.records
    tokenizer = Tokenizer.from_directory(tmp_path / "tokenizer")
    assert record["event"] == "tokenizer_trained"
    assert record["vocab_size"] == tokenizer.vocab_size == 280
    assert record["merges"] == 280 - 256 - 1
    assert record["sha256"] == tokenizer.fingerprint()
    text = pipeline.files.text.read_text()
    assert record["bytes_per_token"] == pytest.approx(tokenizer.bytes_per_token(text))
    assert "280 tokens" in done.stderr


def test_smollm_s_pattern_is_trained_and_used_by_the_reference(arguments, pipeline, tmp_path):
    """Data is made with it; both commands refuse the compiled engine before any work."""
    arguments += ["--tokenizer.pattern=smollm"]
    refused = call("train_tokenizer", *arguments, "--tokenizer.engine=compiled")
    assert (refused.code, (tmp_path / "tokenizer").exists()) == (2, False)
    assert 'engine: expected auto or reference with pattern = "smollm", found "compiled"' in refused.stderr
    assert call("train_tokenizer", *arguments).code == 0
    assert Tokenizer.from_directory(tmp_path / "tokenizer").pattern == "smollm"
    make = ["--input", pipeline.files.text, "--tokenizer", tmp_path / "tokenizer", "--train", tmp_path / "train.npy"]
    refused = call("make_data", *make, "--engine=compiled")
    assert (refused.code, (tmp_path / "train.npy").exists()) == (2, False)
    assert "engine: expected auto or reference with the pattern 'smollm'" in refused.stderr
    assert call("make_data", *make).code == 0


def test_a_tokenizer_is_not_written_over_by_accident(arguments, tmp_path):
    """A directory with a tokenizer is refused, and replaced with `--overwrite`."""
    call("train_tokenizer", *arguments)
    before = (tmp_path / "tokenizer/vocab.json").read_bytes()
    again = call("train_tokenizer", *arguments, "--tokenizer.vocab_size=290")
    assert again.code == 2
    assert again.stdout == ""
    assert "--overwrite" in again.stderr
    assert (tmp_path / "tokenizer/vocab.json").read_bytes() == before
    assert call("train_tokenizer", *arguments, "--tokenizer.vocab_size=290", "--overwrite").code == 0
    assert len(json.loads((tmp_path / "tokenizer/vocab.json").read_text())) == 290


def test_a_logger_that_is_not_installed_is_said_before_the_work(arguments, tmp_path, monkeypatch):
    """Training may take hours, and the tokenizer would be there with exit code 2."""
    monkeypatch.setattr("config.extras.importlib.util.find_spec", lambda name: None)
    done = call("train_tokenizer", *arguments, "--logging.backend=wandb")
    assert (done.code, "wandb is not installed" in done.stderr) == (2, True)
    assert not (tmp_path / "tokenizer").exists()


def test_special_tokens_that_no_export_can_express_are_named_before_the_work(arguments):
    """One line on stderr names them and what will not be possible; others are not named."""
    done = call("train_tokenizer", *arguments, '--toml=tokenizer.special_tokens = ["é<x>", "<|endoftext|>", "«q»"]')
    assert done.code == 0
    line = done.stderr.splitlines()[0]
    assert line.endswith(
        "special_tokens: tokenizer.json cannot express 'é<x>', '«q»', so no export to it (take ASCII characters)"
    )
    assert done.stderr.count("cannot express") == 1
    assert "cannot express" not in call("train_tokenizer", *arguments, "--overwrite").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on file sizes")
def test_a_full_disk_is_one_line_and_leaves_nothing_unfinished(arguments, tmp_path):
    """If the system refuses to write more: exit 1, one line that names the directory, and no file in it."""
    with files_of_at_most(1500):
        done = call("train_tokenizer", *arguments)
    assert done.code == 1
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'tokenizer'}: File too large"
    assert list((tmp_path / "tokenizer").iterdir()) == []


def test_a_text_with_too_few_pairs_gives_a_smaller_vocabulary(tmp_path):
    """If there is nothing left to merge, the user is told, and the vocabulary is as large as it can be."""
    (tmp_path / "short.txt").write_text("ab ab")
    done = call(
        "train_tokenizer",
        f"--input={tmp_path / 'short.txt'}",
        f"--output_dir={tmp_path / 'out'}",
        "--tokenizer.vocab_size=1000",
    )
    assert done.code == 0
    assert "no more pairs to merge" in done.stderr
    assert done.records[0]["vocab_size"] < 270


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_no_text_is_an_error_and_writes_nothing(content, tmp_path):
    """A file that is missing or empty gives exit 2, a line that names it, and no directory."""
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    done = call("train_tokenizer", f"--input={path}", f"--output_dir={tmp_path / 'out'}", "--tokenizer.vocab_size=300")
    assert (done.code, done.stdout) == (2, "")
    assert "text.txt" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_noop_logging_leaves_stdout_empty(arguments):
    """`logging.backend = "noop"` writes no record; the tokenizer is made all the same."""
    done = call("train_tokenizer", *arguments, "--logging.backend=noop")
    assert (done.code, done.stdout) == (0, "")


def test_wandb_gets_the_tokenizer_whatever_its_name_and_finishes(arguments, tmp_path, monkeypatch):
    """The line and the files arrive, under a name that W&B takes, and the run there is ended."""
    pytest.importorskip("wandb")
    package, calls = tmp_path / "fake/wandb", tmp_path / "calls.jsonl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE.format(init="pass", log="pass", finish="pass"))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_WANDB_CALLS", str(calls))
    for name in ("init_timeout", "close_timeout"):
        monkeypatch.setitem(WandbLogger.__init__.__kwdefaults__, name, 300.0)
    done = call("train_tokenizer", *arguments, "--output_dir", tmp_path / "my own", "--logging.backend=wandb")
    assert done.code == 0, done.stderr
    found = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [kind for kind, *_ in found] == ["init", "log", "artifact", "finish"]
    assert found[2][1:] == ["my-own-tokenizer", "tokenizer", ["dir", str(tmp_path / "my own")]]


def test_training_goes_on_beyond_a_memory_limit(arguments):
    """One line on stderr says that files are used; the tokenizer is the same as without a limit."""
    pytest.importorskip("numba")
    limited = call("train_tokenizer", *arguments, "--memory_limit_mb=1", "--tokenizer.engine=compiled")
    assert "warning: memory_limit_mb: the distinct words need" in limited.stderr
    assert limited.code == 0
    unlimited = call("train_tokenizer", *arguments, "--overwrite")
    assert limited.records[0]["sha256"] == unlimited.records[0]["sha256"]


def test_an_output_that_cannot_be_made_is_refused_before_the_text_is_read(arguments, tmp_path):
    """A file in the directory's place: exit 2 and one line, without progress."""
    (tmp_path / "tokenizer").write_text("")
    done = call("train_tokenizer", *arguments)
    assert done.code == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'tokenizer'}: expected a directory, found the file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_once(pipeline, tmp_path):
    """The text may come through a pipe; the report is the same as for a file."""
    text = pipeline.files.text.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(text,), daemon=True)
    writer.start()
    rest = ["--tokenizer.vocab_size=280", "--output_dir"]
    piped = call("train_tokenizer", "--input", tmp_path / "pipe", *rest, tmp_path / "a")
    assert piped.code == 0, piped.stderr
    read = call("train_tokenizer", "--input", pipeline.files.text, *rest, tmp_path / "b")
    for key in ("sha256", "bytes_per_token"):
        assert piped.records[0][key] == read.records[0][key]
    writer.join(10)


def test_a_special_token_that_cannot_be_saved_is_named_before_the_work(arguments, tmp_path):
    """`§` is how vocab.json writes a byte: exit 2, one line that names it, no directory."""
    done = call("train_tokenizer", *arguments, "--tokenizer.special_tokens", "<|endoftext|>", "§")
    assert (done.code, done.stdout) == (2, "")
    assert "found '§'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("command", ["train_tokenizer", "make_data", "quickstart", "eval"])
def test_a_file_that_is_no_text_is_refused_before_any_work(command, pipeline, tmp_path):
    """By every command that reads text: exit 2, one line with the way out, and nothing is left behind."""
    (tmp_path / "a.txt").write_bytes(("some text " * 5000).encode("utf-16"))
    arguments = {
        "train_tokenizer": ["--output_dir", tmp_path / "out", "--tokenizer.vocab_size=300"],
        "make_data": ["--tokenizer", pipeline.files.tokenizer, "--train", tmp_path / "out.npy"],
        "quickstart": ["--dir", tmp_path / "out"],
        "eval": ["--checkpoint", pipeline.run],
    }[command]
    done = call(command, "--text" if command == "quickstart" else "--input", tmp_path / "a.txt", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert "found UTF-16 (iconv -f utf-16 -t utf-8" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def by_shares(arguments, pipeline, tmp_path):
    """Return a command line for text of two parts, and the folder of its parts."""
    text = pipeline.files.text.read_text()
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(text * (700_000 // len(text)))
    arguments[1] = tmp_path / "*.txt"
    return [*arguments, "--cluster.on=share", "--cluster.part_mb=1"], tmp_path / "tokenizer.parts"


def test_shares_write_the_tokenizer_that_one_machine_writes(by_shares, tmp_path):
    """Files and numbers are the same; nothing of the parts is left, and a share that comes late has nothing to do."""
    command, parts = by_shares
    done = call("train_tokenizer", *command, "--cluster.share=2/3")
    local = call("train_tokenizer", *command[:-2], "--output_dir", tmp_path / "local")
    assert (done.code, local.code, parts.exists()) == (0, 0, False)
    names = {"seconds", "output_dir"}
    assert [{key: value for key, value in end.records[0].items() if key not in names} for end in (done, local)] == [
        {key: value for key, value in local.records[0].items() if key not in names}
    ] * 2
    for file in (tmp_path / "local").iterdir():
        assert (tmp_path / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    late = call("train_tokenizer", *command, "--cluster.share=1/3")
    assert (late.code, late.stdout) == (0, "")
    assert "holds a tokenizer, so this share has nothing to do" in late.stderr
    refused = call("train_tokenizer", *command, "--cluster.share=1/3", "--overwrite")
    assert refused.code == 2
    assert 'expected false with cluster.on = "share"' in refused.stderr


def test_a_saving_that_was_killed_is_gone_on_with(by_shares, tmp_path, monkeypatch):
    """A half-saved tokenizer beside counted parts is finished by the same command, and refused by another."""
    command, parts = by_shares
    command.append("--cluster.share=1/1")

    def half(self, directory):
        (directory / "vocab.json").parent.mkdir()
        (directory / "vocab.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformerlm.tokenizer.tokenizer.Tokenizer.save", half)
        failed = call("train_tokenizer", *command)
    assert failed.code != 0
    assert "No space left on device" in failed.stderr
    assert parts.exists()
    assert "--overwrite" in call("train_tokenizer", *command[:-3]).stderr
    other = call("train_tokenizer", *command, "--tokenizer.vocab_size=290")
    assert other.code == 2
    assert "found vocab_size = 280, now 290" in other.stderr
    assert (tmp_path / "tokenizer/vocab.json").read_text() == "{}"
    assert call("train_tokenizer", *command).code == 0
    assert Tokenizer.from_directory(tmp_path / "tokenizer").vocab_size == 280
    assert not parts.exists()


@pytest.mark.parametrize("place", ["share", "ray"])
def test_a_removal_that_was_killed_does_not_open_a_tokenizer_to_others(by_shares, tmp_path, place):
    """Left-over parts beside a complete tokenizer let no command of other settings replace it."""
    command, parts = by_shares
    command.append("--cluster.share=1/1")
    assert call("train_tokenizer", *command).code == 0
    before = (tmp_path / "tokenizer/vocab.json").read_bytes()
    parts.mkdir()
    for name in (".lock", "saving"):  # the plan goes first
        (parts / name).touch()
    other = ["--tokenizer.vocab_size=290"] if place == "share" else ["--cluster.share=none", "--cluster.on=ray"]
    again = call("train_tokenizer", *command, *other)
    assert again.code == (0 if place == "share" else 2)
    assert "holds a tokenizer" in again.stderr
    assert (tmp_path / "tokenizer/vocab.json").read_bytes() == before


def test_a_sample_is_said_in_the_log_and_on_the_terminal(arguments):
    """How many documents were trained on is never left to guess."""
    done = call("train_tokenizer", *arguments, "--sample=0.5")
    (record,) = done.records
    assert record["sample"] == 0.5
    assert 0 < record["chosen_documents"] < record["documents"]
    assert f"trained on {record['chosen_documents']:,} of {record['documents']:,} documents" in done.stderr
