"""`transformerlm-quickstart` is the other commands in order: what it shows is what it runs, and all of it is valid."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cli import budget, quickstart
from databuilder.stories import tell_stories
from tests.cli.commands import ROOT, call
from tests.training.tiny_run import END

PLAN = {
    "flops.per_token": 14_000_000,
    "tokens.per_step": 2048,
    "tokens_per_second": 2048.0,
    "calibration.seconds_per_validation": 4.0,
    "data.tokens": 1_000_000,
}
STORY = next(tell_stories())


def settings_of(command):
    """Return the settings in the TOML of a started command, by dotted keys."""
    assert [word.partition("=")[0] for word in command[4:]] == ["--config", "--config"]

    def flat(tree, prefix=""):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    return dict(flat(tomllib.loads(Path(command[5].partition("=")[2]).read_text(encoding="utf-8"))))


@pytest.fixture
def pretend(monkeypatch):
    """Replace the commands by ones that only leave the files that the next stage reads; return what was started."""
    started: list[list[str]] = []

    def run(command, *, quiet):
        started.append(command)
        values, out = settings_of(command), ""
        if command[3] == "cli.train_tokenizer":
            folder = Path(values["output_dir"])
            folder.mkdir(parents=True)
            (folder / "vocab.json").write_text(json.dumps({str(number): number for number in range(300)}))
        if command[3] == "cli.make_data":
            for name, number in (("train", 20_000), ("valid", 1_000)):
                Path(values[name]).with_suffix(".json").write_text(json.dumps({"tokens": number}))
        if command[3] == "cli.plan":
            out = json.dumps(PLAN)
        if command[3] == "cli.train":
            folder = Path(values["runs_dir"]) / values["logging.run_name"]
            folder.mkdir(parents=True)
            lines = [{"step": step, "metrics.loss": 6.0 - step, "metrics.tokens": 2048 * step} for step in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if command[3] == "cli.infer":
            sample = {"event": "sample", "text.prompt": "", "text.output": STORY}
            out = "".join(json.dumps({**sample, "number": number}) + "\n" for number in range(4))
        return 0, out, ""

    monkeypatch.setattr(quickstart, "_wait_for", run)
    return started


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
    assert names == ["train_tokenizer", "make_data", "plan", "train", "infer"]
    for name, words, command in zip(names, shown, pretend, strict=True):
        assert command == [sys.executable, "-P", "-m", f"cli.{name}", *words[1:]]
        checked = call(name, *words[1:], "--print-config")
        assert checked.code == 0, checked.stderr


def test_the_run_is_what_was_planned(pretend, text, tmp_path):
    """Size, steps and validations are those of the budget, in the time that was asked for, by the fast recipe."""
    call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=1000s")
    plan, train = settings_of(pretend[2]), settings_of(pretend[3])
    assert pretend[3][4].endswith("recipes/fast.toml")
    assert train["training.max_time"] == "1000s"
    assert train["training.max_steps"] > 500
    assert train["checkpoint.interval"] % train["training.eval_interval"] == 0  # no validation of its own
    assert plan["training.eval_tokens"] >= train["training.eval_tokens"] >= budget.MIN_EVAL_TOKENS
    assert {plan["model.vocab_size"], train["model.vocab_size"]} == {300}
    assert plan["model.context_length"] == train["model.context_length"] == 256


def test_the_stories_are_checked_by_their_grammar(pretend, tmp_path, monkeypatch):
    """Beside the texts is how many of them keep their hero and are grammatical, but not with other prompts."""
    monkeypatch.setattr(quickstart, "CORPUS_BYTES", 100_000)
    done = call("quickstart", "--dir", tmp_path / "home")
    assert "Of 4 new stories, 100% keep their hero's name and 100% are grammatical" in done.stderr
    assert settings_of(pretend[-1])["num_samples"] == quickstart.NUM_STORIES
    done = call("quickstart", "--dir", tmp_path / "home", "--prompt=A dog")
    assert "new stories" not in done.stderr


def test_many_passes_over_a_small_text_are_told(pretend, text, tmp_path, monkeypatch):
    """Long training on little text gets a note that more text would help more."""
    monkeypatch.setitem(PLAN, "data.tokens", 30_000)
    done = call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=1h")
    assert " times through the text: more text would help more than more time" in done.stderr
    monkeypatch.setitem(PLAN, "data.tokens", 10**9)
    done = call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=1h")
    assert "times through the text" not in done.stderr


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


def test_a_short_time_still_trains(pretend, text, tmp_path, monkeypatch):
    """However short the time and slow the machine, there are steps; every interval is at least 1."""
    monkeypatch.setitem(PLAN, "tokens_per_second", 1.0)
    assert call("quickstart", "--text", text, "--dir", tmp_path / "home", "--time=1s").code == 0
    assert settings_of(pretend[3])["training.max_steps"] >= 2


@pytest.mark.parametrize(("code", "is_kept"), [(2, False), (1, True), (130, True)])
def test_a_text_that_is_refused_leaves_nothing_behind(code, is_kept, pretend, text, tmp_path, monkeypatch):
    """If a command refuses, the directory and the parents made for it are removed; after any other end they stay."""
    run = quickstart._wait_for

    def fails_second(command, *, quiet):
        done = run(command, quiet=quiet)
        return (code, "", "") if len(pretend) == 2 else done

    monkeypatch.setattr(quickstart, "_wait_for", fails_second)
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
    assert settings_of(pretend[0])["input"] == [str(corpus)]
    assert corpus.read_text().count(END) > 10
    assert str(corpus) in done.stderr


def test_files_without_number_become_one(pretend, tmp_path, monkeypatch):
    """A folder of more files than a TOML should name is written into one corpus."""
    monkeypatch.setattr(quickstart, "MAX_FILES", 29)
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("Some words of a page.\n" * 40)
    assert call("quickstart", "--text", tmp_path, "--dir", tmp_path / "home").code == 0
    assert settings_of(pretend[0])["input"] == [str(tmp_path / "home/corpus.txt")]


def test_a_text_with_documents_is_used_as_it_is(pretend, text, tmp_path):
    """The user's own files go to the commands, untouched."""
    call("quickstart", "--text", text, "--dir", tmp_path / "home")
    assert settings_of(pretend[0])["input"] == [str(text)]
    assert not (tmp_path / "home/corpus.txt").exists()


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (130, 130), (-9, 1)])
def test_a_stage_that_fails_ends_it_with_its_code(code, expected, text, tmp_path, monkeypatch):
    """The first command that fails is named, nothing more is started, and its exit code is passed on."""
    started = []

    def run(command, *, quiet):
        started.append(command)
        return code, "", ""

    monkeypatch.setattr(quickstart, "_wait_for", run)
    done = call("quickstart", "--text", text, "--dir", tmp_path / "home")
    assert done.code == expected
    assert len(started) == 1
    assert f"transformerlm-train-tokenizer ended with exit code {code}" in done.stderr


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
    checked = call("infer", *pretend[-1][4:], "--print-config")
    assert checked.code == 0, checked.stderr
    assert 'prompt = [\n    "-x",\n]' in checked.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_the_last_word_to_the_running_command(monkeypatch, tmp_path):
    """SIGINT reaches the command that runs; quickstart waits for it to save instead of killing it."""
    marker = tmp_path / "saved"
    child = (
        "import signal, sys, time, os, pathlib\n"
        "def save(*_):\n    time.sleep(0.6); pathlib.Path(sys.argv[1]).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
    )
    code, *_ = quickstart._wait_for([sys.executable, "-c", child, marker], quiet=True)
    assert code == 130
    assert marker.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_request_to_end_is_passed_on():
    """SIGTERM to quickstart alone, as a batch system sends it, ends the command that runs, and leaves no orphan."""
    child = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)\n"
    )
    code, *_ = quickstart._wait_for([sys.executable, "-c", child], quiet=True)
    assert code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


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
