"""`transformerlm-quickstart` is the other commands in order: what it shows is what it runs, and all of it is valid."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli import quickstart
from databuilder.stories import tell_stories
from tests.cli.commands import ROOT, call
from tests.cli.pretended import settings_of
from tests.training.tiny_run import END
from transformerlm.experiments.fit import choice
from transformerlm.training import yardsticks

STORY = next(tell_stories())


@pytest.fixture
def pretend(pretend):
    """Let the pretended infer command tell a story."""
    pretend.output = STORY
    return pretend


@pytest.fixture
def text(tmp_path) -> Path:
    """Return a text file with documents."""
    path = tmp_path / "my text.txt"
    path.write_text(END.join(["Some words.\n" * 40] * 50))
    return path


@pytest.mark.parametrize("corpus", ["text", "stories", "docstrings"])
def test_the_commands_that_are_shown_are_run_in_order_and_valid(corpus, pretend, text, tmp_path, monkeypatch):
    """Each `$ transformerlm-...` line stands for the process started after it, and that command accepts it."""
    monkeypatch.setattr(quickstart, "CORPUS_BYTES", 100_000)
    source = ["--text", text] if corpus == "text" else ["--corpus", corpus]
    done = call("quickstart", *source, "--dir", tmp_path / "home", "--time=100s", "--device=cpu")
    assert done.code == 0, done.stderr
    assert done.stdout == "\n".join([STORY, "-" * 72, STORY, "-" * 72, STORY, ""])
    shown = [shlex.split(line[2:]) for line in done.stderr.splitlines() if line.startswith("$ ")]
    names = [words[0].removeprefix("transformerlm-").replace("-", "_") for words in shown]
    assert names == ["plan", "plan", "train_tokenizer", "make_data", "train", "train", "infer"]
    for name, words, command in zip(names, shown, pretend.started, strict=True):
        assert command == [sys.executable, "-P", "-m", f"cli.{name}", *words[1:]]
        checked = call(name, *words[1:], "--print-config")
        assert checked.code == 0, checked.stderr


def test_the_run_is_what_was_planned(pretend, text, tmp_path):
    """Size and data are those of the TOML with the reasons; the probe has the same, and both share the time."""
    call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=1000s")
    plan, probe, train = (settings_of(pretend.started[number]) for number in (1, 4, 5))
    assert pretend.started[5][4:] == [f"--config={tmp_path / 'home/train.toml'}"]
    assert 0.9 * 1000 <= float(train["training.max_time"].removesuffix("s")) < 1000
    assert probe["training.max_steps"] < train["training.max_steps"] / 5
    assert train["checkpoint.interval"] % train["training.eval_interval"] == 0  # no validation of its own
    assert plan["training.eval_tokens"] >= train["training.eval_tokens"] >= choice.MIN_EVAL_TOKENS
    assert probe["training.eval_tokens"] == train["training.eval_tokens"]
    of_model = {key: value for key, value in train.items() if key.startswith(("model.", "data.", "optimizer."))}
    assert of_model == {key: probe[key] for key in of_model}


def test_the_stories_are_checked_by_their_grammar(pretend, tmp_path, monkeypatch):
    """Beside the texts is how many of them keep their hero and are grammatical, but not with other prompts."""
    monkeypatch.setattr(quickstart, "CORPUS_BYTES", 100_000)
    done = call("quickstart", "--dir", tmp_path / "home")
    assert "Of 4 new stories, 100% keep their hero's name and 100% are grammatical" in done.stderr
    assert settings_of(pretend.started[-1])["num_samples"] == quickstart.NUM_STORIES
    done = call("quickstart", "--dir", tmp_path / "home", "--prompt=A dog")
    assert "new stories" not in done.stderr


def test_many_passes_over_a_small_text_are_told(pretend, text, tmp_path):
    """Long training on little text gets a note that more text would help more; the number of passes is said."""
    done = call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=1h")
    assert "more text would help more than more time" in done.stderr
    pretend.plan["tokens_per_second"], pretend.probe_speed = 1.0, 1.0
    done = call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=100s")
    assert " times through the text" in done.stderr
    assert "more text would help" not in done.stderr


def test_a_machine_that_slows_down_is_told(pretend, text, tmp_path):
    """Far fewer steps than were planned (here 3) explain a poor model."""
    done = call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=100s")
    assert "slower than it was while it was timed: 3 steps instead of " in done.stderr


def test_ctrl_c_before_there_is_anything_leaves_nothing(tmp_path, monkeypatch):
    """Interrupted while it makes the corpus, it removes its empty directory."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("databuilder.stories.write_corpus", interrupted)
    assert call("quickstart", "--dir", tmp_path / "new/home").code == 130
    assert list(tmp_path.iterdir()) == []


def test_a_short_time_still_trains(pretend, text, tmp_path):
    """However short the time and slow the machine, there are steps; every interval is at least 1."""
    pretend.plan["tokens_per_second"], pretend.probe_speed = 1.0, 1.0
    assert call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=1s").code == 0
    assert settings_of(pretend.started[5])["training.max_steps"] >= 2


@pytest.mark.parametrize(("code", "is_kept"), [(2, False), (1, True), (130, True)])
def test_a_text_that_is_refused_leaves_nothing_behind(code, is_kept, pretend, text, tmp_path):
    """If a command refuses, the directory and the parents made for it are removed; after any other end they stay."""
    pretend.codes = {3: code}
    done = call("quickstart", "--text", text, "--dir", tmp_path / "new/deep/home")
    assert done.code == code
    assert (tmp_path / "new").exists() is is_kept
    assert ("everything so far is in" in done.stderr) is is_kept


def test_nothing_is_written_over(pretend, text, tmp_path):
    """A directory that is taken gets a number, so that a second run keeps the first."""
    for _ in range(3):
        assert call("quickstart", "--text", text, "--dir", tmp_path / "home").code == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"home", "home-2", "home-3"}
    assert call("quickstart", "--text", text, "--dir", text).code == 0  # the name of a file is taken, too


def test_a_text_without_documents_is_cut_into_some(pretend, tmp_path):
    """A plain book has no separators: it is cut at blank lines, the user is told, and the pieces are used."""
    book = tmp_path / "book.txt"
    book.write_text("A line of a book that goes on for a while.\n\n" * 3000)
    done = call("quickstart", "--text", book, "--dir", tmp_path / "home")
    corpus = tmp_path / "home/corpus.txt"
    assert settings_of(pretend.started[2])["input"] == [str(corpus)]
    assert corpus.read_text().count(END) > 10
    assert str(corpus) in done.stderr


def test_files_without_number_become_one(pretend, tmp_path, monkeypatch):
    """A folder of more files than a TOML should name is written into one corpus."""
    monkeypatch.setattr("cli.stages.MAX_FILES", 29)
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("Some words of a page.\n" * 40)
    assert call("quickstart", "--text", tmp_path, "--dir", tmp_path / "home").code == 0
    assert settings_of(pretend.started[2])["input"] == [str(tmp_path / "home/corpus.txt")]


def test_a_text_with_documents_is_used_as_it_is(pretend, text, tmp_path):
    """The user's own files go to the commands, untouched."""
    call("quickstart", "--text", text, "--dir", tmp_path / "home")
    assert settings_of(pretend.started[2])["input"] == [str(text)]
    assert not (tmp_path / "home/corpus.txt").exists()


@pytest.mark.parametrize("stage", range(7))
@pytest.mark.parametrize(("code", "expected"), [(2, 2), (130, 130), (-9, 1)])
def test_a_stage_that_fails_ends_it_with_its_code(code, expected, stage, pretend, text, tmp_path):
    """The first command that fails is named, nothing more is started, and its exit code is passed on."""
    pretend.codes = {stage: code}
    done = call("quickstart", "--text", text, "--dir", tmp_path / "home")
    assert done.code == expected
    assert len(pretend.started) == stage + 1
    name = ("plan", "plan", "train-tokenizer", "make-data", "train", "train", "infer")[stage]
    assert f"transformerlm-{name} ended with exit code {code}" in done.stderr
    assert ("what it said" in done.stderr) is (stage in (0, 1, 4, 6))  # what is quiet otherwise


def test_too_little_text_is_refused_before_anything_is_written(tmp_path):
    """A text of a few lines is answered with both numbers; no directory is made."""
    (tmp_path / "note.txt").write_text("A few words.\n")
    done = call("quickstart", "--text", tmp_path / "note.txt", "--dir", tmp_path / "home")
    assert (done.code, done.stderr) == (2, "error: text: expected at least 20,000 bytes to train on, found 13\n")
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_before_anything_is_written(tmp_path):
    """Three commands read the text, but a pipe can be read only once: the second would hang."""
    os.mkfifo(tmp_path / "pipe")
    done = call("quickstart", f"--dir={tmp_path / 'out'}", "--text", tmp_path / "pipe")
    assert (done.code, done.stdout) == (2, "")
    assert "found the pipe" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_text_is_one_line(tmp_path):
    """A missing file is named; no stage is started and no directory made."""
    done = call("quickstart", "--text", tmp_path / "nowhere.txt", "--dir", tmp_path / "home")
    assert done.code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere.txt" in done.stderr
    assert not (tmp_path / "home").exists()


def test_prompts_that_look_like_options_reach_the_command(pretend, text, tmp_path):
    """The prompts are passed on unchanged."""
    call("quickstart", "--text", text, "--dir", tmp_path / "home", "--prompt=-x", "--device=cpu")
    checked = call("infer", *pretend.started[-1][4:], "--print-config")
    assert checked.code == 0, checked.stderr
    assert 'prompt = [\n    "-x",\n]' in checked.stdout


@pytest.mark.slow
def test_the_whole_of_it_on_a_small_text(tmp_path):
    """The real commands on a small text in a few seconds: picture, samples on stdout, and next steps that work."""
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"The {word} sat on the mat, and the {word} was glad.\n\n" for word in ("cat", "dog") * 4000)
    )
    done = subprocess.run(
        [sys.executable, "-m", "cli.quickstart", "--text", text, "--time=5s", "--dir", tmp_path / "home"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "home/run"
    assert (run / "loss.svg").is_file()
    assert (run / "report.html").is_file()
    assert (run / "checkpoints/latest/model.safetensors").is_file()
    samples = done.stdout.split("-" * 72)
    assert len(samples) == 3
    assert all(sample.strip() for sample in samples)  # what they say depends on how many steps fitted into the time
    assert "Traceback" not in done.stderr
    assert "val loss" in done.stderr
    assert "bits/byte" in done.stderr
    hints = [line for line in done.stderr.split("Next:\n")[1].splitlines() if line and not line.startswith("# ")]
    assert len(hints) == 6
    assert "transformerlm-serve --checkpoint=" in hints[-1]
    for line in hints:
        words = shlex.split(line)
        verb = next(word for word in words if "transformerlm-" in word).rpartition("transformerlm-")[2]
        arguments = words[words.index(next(word for word in words if "transformerlm-" in word)) + 1 :]
        checked = call(verb, *arguments, "--print-config")
        assert checked.code == 0, (line, checked.stderr)


def test_stories_are_predicted_from_past_stories(pretend, text, tmp_path, monkeypatch):
    """A grammar falls to a small part of the probe's bits, text by people does not; each has past runs of its kind."""
    monkeypatch.setattr(quickstart, "CORPUS_BYTES", 100_000)
    said = {}
    for name, source, repeats in (("stories", [], 0.65), ("text", ["--text", text], 0.05)):
        monkeypatch.setattr(yardsticks, "share_seen", lambda *_, found=repeats: found)
        call("quickstart", *source, "--dir", tmp_path / name)
        said[name] = json.loads((tmp_path / name / "prediction.json").read_text())["bits_per_byte"]["middle"]
    assert said["stories"] < said["text"] / 3
