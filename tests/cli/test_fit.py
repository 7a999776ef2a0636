"""`transformerlm-fit` chooses, says beforehand what will come of it, trains and judges; nothing is lost on the way."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli import fitting
from tests.cli.commands import ROOT, call
from tests.cli.pretended import settings_of
from tests.training.tiny_run import END
from transformerlm.experiments.fit.choice import BYTES_PER_TOKEN_OF_VOCAB
from transformerlm.experiments.fit.prediction import PAST_RUNS, Row, read_rows


@pytest.fixture
def text(tmp_path) -> Path:
    """Return a text file with documents."""
    path = tmp_path / "my text.txt"
    path.write_text(END.join(["Some words.\n" * 40] * 50))
    return path


def past_runs(folder, *, share):
    """Write a file of past runs that all ended at about a share of what their probes reached."""
    row = Row("a", 10**6, 250_000, 2000, 10**6, 3.1, 0.18, 1000, 100, 1.0, 3.0, 3.0)
    rows = [{**vars(row), "corpus": str(number), "bits_per_byte": 3 * share + number / 1000} for number in range(20)]
    path = folder / "rows.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


def read(path):
    """Return what a JSON file holds."""
    return json.loads(path.read_text())


def test_the_prediction_is_said_and_written_before_the_run(pretend, text, tmp_path, monkeypatch):
    """When the training begins, the interval is in the file, and the same numbers are on the screen."""
    home, seen = tmp_path / "home", {}

    def look(command, *, quiet):
        if command[4:] == [f"--config={home / 'train.toml'}"]:
            seen["prediction"] = read(home / "prediction.json")
        return pretend(command, quiet=quiet)

    monkeypatch.setattr("cli.stages.wait_for", look)
    done = call("fit", text, "--dir", home, "--time=10m")
    assert done.code == 0, done.stderr
    said = seen["prediction"]["bits_per_byte"]
    assert seen["prediction"] == read(home / "prediction.json")
    assert 0 < said["low"] < said["middle"] < said["high"]
    line = f"expected: {said['middle']:.3f} bits per byte on the validation text, between {said['low']:.3f} and "
    assert f"{line}{said['high']:.3f} in 9 of 10 cases" in done.stderr
    assert "3.000 after the short run, 3.100 by gzip, 3.300 by the tokens' frequencies" in done.stderr


def test_each_chosen_setting_is_in_the_toml_and_on_the_screen_with_its_reason(pretend, text, tmp_path):
    """The TOML trains alone, without another file, and its comments are the reasons."""
    home = tmp_path / "home"
    done = call("fit", text, "--dir", home, "--time=10m", "--seed=7", "--prompt=A", "--prompt=B")
    settings, toml = settings_of(pretend.started[-1]), (home / "train.toml").read_text()
    assert call("train", "--config", home / "train.toml", "--print-config").code == 0
    assert settings["training.seed"] == 7
    assert settings["samples.prompts"] == ["A", "B"]
    lines = toml.splitlines()
    for key in ("d_model", "batch_size", "learning_rate", "max_steps", "max_time", "vocab_size"):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
        assert lines[at - 1].startswith("# "), key
    assert f"model.d_model = {settings['model.d_model']}" in done.stderr
    assert f"training.max_steps = {settings['training.max_steps']}" in done.stderr


@pytest.mark.parametrize(("reached", "words"), [(2.53, "inside"), (9.0, "outside"), (0.1, "outside")])
def test_the_outcome_is_held_against_the_prediction(reached, words, pretend, text, tmp_path):
    """The last lines say whether it came as expected, and the file keeps it with a row for later predictions."""
    pretend.reached["run"] = reached
    home = tmp_path / "home"
    done = call("fit", text, "--dir", home, "--time=10m", "--past_runs", past_runs(tmp_path, share=0.8))
    found, said = read(home / "outcome.json"), read(home / "prediction.json")["bits_per_byte"]
    assert found["inside"] is (words == "inside")
    side = "above" if reached > said["middle"] else "below"
    share = abs(reached / said["middle"] - 1)
    assert f"it came to {reached:.3f} bits per byte: {words} the interval, {share:.1%} {side} what was" in done.stderr
    row = Row(**found["row"])
    assert (row.corpus, row.bits_per_byte, row.probe_bits_per_byte) == (f"{tmp_path.name}/my text.txt", reached, 3.0)
    assert row.num_bytes == text.stat().st_size
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [found["row"]]}))
    assert read_rows(tmp_path / "rows.json") == [row]


def test_a_dry_run_ends_before_the_training(pretend, text, tmp_path):
    """All is chosen and predicted; the line that trains is shown, and works."""
    home = tmp_path / "home"
    done = call("fit", text, "--dir", home, "--time=10m", "--dry-run")
    assert done.code == 0
    names = [command[3].removeprefix("cli.") for command in pretend.started]
    assert names == ["plan", "plan", "train_tokenizer", "make_data", "train"]  # the last is the probe
    assert (home / "prediction.json").exists()
    words = shlex.split(done.stderr.splitlines()[-1])
    assert words[-1] == f"--resume={home}"
    assert call("fit", words[-1]).code == 0
    assert [command[4:] for command in pretend.started[5:]] == [[f"--config={home / 'train.toml'}"]]
    assert (home / "outcome.json").exists()


def test_a_directory_that_was_copied_is_trained_itself(pretend, text, tmp_path):
    """Its settings name the first one, which stays as it is."""
    assert call("fit", text, "--dir", tmp_path / "first", "--time=10m", "--dry-run").code == 0
    home = tmp_path / "copy"
    shutil.copytree(tmp_path / "first", home)
    assert call("fit", f"--resume={home}").code == 0
    assert pretend.started[-1][4:] == [
        f"--config={home / 'train.toml'}",
        f"--runs_dir={home}",
        f"--data.train={home / 'train.npy'}",
        f"--data.valid={home / 'valid.npy'}",
        f"--data.tokenizer={home / 'tokenizer'}",
    ]
    assert (home / "outcome.json").exists()
    assert not (tmp_path / "first/outcome.json").exists()


@pytest.mark.parametrize("code", [1, 130, -9])
def test_a_training_that_ended_early_goes_on_and_is_judged(code, pretend, text, tmp_path):
    """The line that is shown ends as the fit would have: with the same judgement, row and hints."""
    whole, home = tmp_path / "whole", tmp_path / "home"
    expected = call("fit", text, "--dir", whole, "--time=10m").stderr
    pretend.codes = {2 * len(pretend.started) - 1: code}
    done = call("fit", text, "--dir", home, "--time=10m")
    assert done.code == (1 if code < 0 else code)
    words = shlex.split(done.stderr.splitlines()[-1])
    assert words[-1] == f"--resume={home}"
    done = call("fit", words[-1])
    assert done.code == 0, done.stderr
    assert read(home / "outcome.json") == read(whole / "outcome.json")
    end = expected[expected.index("it came to ") :].replace(str(whole), str(home))
    assert done.stderr.endswith(end)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (None, "resume: expected the directory of a fit that has come to its training, found no prediction.json in"),
        ("{", "prediction.json:1: expected JSON"),
        ('{"corpus": "a"}', "prediction.json: written: expected what transformerlm-fit wrote, found: Field required"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(written, words, pretend, tmp_path):
    """A directory without a prediction, or with a broken one, is named in one line, and nothing is started."""
    if written is not None:
        (tmp_path / "prediction.json").write_text(written)
    done = call("fit", f"--resume={tmp_path}")
    assert (done.code, len(done.stderr.splitlines()), pretend.started) == (2, 1, [])
    assert words in done.stderr


def test_another_key_beside_resume_is_refused(text, tmp_path):
    """All has been chosen; another time would change nothing."""
    done = call("fit", text, f"--resume={tmp_path}", "--time=5m")
    assert done.code == 2
    assert f"expected no other key, for everything has been chosen in {tmp_path}, found text, time" in done.stderr


def test_a_printed_configuration_can_be_read_back(tmp_path):
    """All keys are in it, with their defaults, which are no other keys beside `resume`."""
    printed = call("fit", f"--resume={tmp_path}", "--print-config")
    (tmp_path / "fit.toml").write_text(printed.stdout)
    again = call("fit", "--config", tmp_path / "fit.toml", "--print-config")
    assert (again.code, again.stdout) == (0, printed.stdout), again.stderr


def test_own_past_runs_decide_the_prediction(pretend, text, tmp_path):
    """Runs that ended at half of their probes predict less than runs that ended at the same; a bad file is refused."""
    for name, share in (("a", 0.5), ("b", 1.0)):
        path = past_runs(tmp_path, share=share)
        call("fit", text, "--dir", tmp_path / name, "--time=10m", "--past_runs", path, "--dry-run")
    halved, equal = (read(tmp_path / name / "prediction.json")["bits_per_byte"] for name in "ab")
    assert halved["middle"] < 2 < 2.8 < equal["middle"]
    path.write_text("{}")
    done = call("fit", text, "--dir", tmp_path / "c", "--past_runs", path)
    assert (done.code, len(done.stderr.splitlines())) == (2, 1)
    assert "rows.json" in done.stderr
    assert not (tmp_path / "c").exists()


def test_a_text_too_long_for_the_time_is_cut_and_it_is_said(pretend, tmp_path):
    """What no model could read in the time is not encoded; whole documents are taken from all over the text."""
    text = tmp_path / "long.txt"
    text.write_text(END.join(f"Document {number}. " + "Words and more words. " * 400 for number in range(700)))
    pretend.plan["tokens_per_second"] = 100.0
    home = tmp_path / "home"
    done = call("fit", text, "--dir", home, "--time=10s", "--dry-run")
    assert done.code == 0, done.stderr
    part = home / "part.txt"
    assert settings_of(pretend.started[2])["input"] == settings_of(pretend.started[3])["input"] == [str(part)]
    assert part.stat().st_size == pytest.approx(1_000_000, rel=0.1)
    numbers = [int(one.split()[1].rstrip(".")) for one in part.read_text().split(END) if one.strip()]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 690
    assert f"of {text.stat().st_size / 1e6:.3g} MB" in done.stderr
    call("fit", text, "--dir", home, "--time=10h", "--dry-run")
    assert settings_of(pretend.started[7])["input"] == [str(text)]


def test_a_part_of_few_long_documents_is_cut_into_short_ones(pretend, tmp_path):
    """Two of forty books would be one for training and one for validation."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("A line of a book that goes on for a while.\n\n" * 12_000)
    pretend.plan["tokens_per_second"] = 100.0
    home = tmp_path / "home"
    done = call("fit", *tmp_path.glob("*.txt"), "--dir", home, "--time=10s", "--dry-run")
    assert done.code == 0, done.stderr
    text = (home / "part.txt").read_text()
    assert len(text) == pytest.approx(1_000_000, rel=0.1)
    assert max(map(len, text.split(END))) < 10_000
    size = len(text.encode())
    assert settings_of(pretend.started[2])["tokenizer.vocab_size"] == size // BYTES_PER_TOKEN_OF_VOCAB


def test_a_document_that_is_much_of_the_text_is_cut(pretend, tmp_path):
    """It would be all of the validation text, or none of it."""
    (tmp_path / "book.txt").write_text("A line of a book that goes on for a while.\n\n" * 3000)
    for number in range(30):
        (tmp_path / f"note {number}.txt").write_text("Some words of a note.\n" * 40)
    home = tmp_path / "home"
    assert call("fit", tmp_path / "book.txt", *tmp_path.glob("note*"), "--dir", home, "--dry-run").code == 0
    assert settings_of(pretend.started[2])["input"] == [str(home / "corpus.txt")]


def test_the_probes_and_the_training_share_the_time(pretend, text, tmp_path):
    """What the probes took is taken from the training, and is at most a tenth where the time allows it."""
    pretend.plan |= {"calibration.steps": 6, "calibration.seconds_per_step": 1.0, "calibration.first_step_seconds": 2.0}
    for name, seconds in (("a", 600), ("b", 10)):
        call("fit", text, "--dir", tmp_path / name, f"--time={seconds}s", "--dry-run")
        train = read(tmp_path / name / "prediction.json")["seconds"]
        assert train == pytest.approx(max(seconds / 2, seconds - 2 * 8.0 - 1.5))
        probe = settings_of(pretend.started[-1])
        limit = float(probe["training.max_time"].removesuffix("s"))
        assert seconds == 10 or 2 * 8.0 + limit <= 0.1 * seconds


@pytest.mark.parametrize(
    ("rate", "stopped_by", "expected"), [(50.0, "max_time", 2), (None, "max_time", 5), (None, "max_steps", 1)]
)
def test_a_short_run_says_what_a_step_takes(rate, stopped_by, expected):
    """By its steps, if they are enough; if the time ended it before, by all its time; else as the steps were timed."""
    plan = SimpleNamespace(tokens_per_step=100, seconds_per_step=1)
    result = SimpleNamespace(tokens_per_second=rate, stopped_by=stopped_by, seconds=10, steps=2)
    assert fitting._seconds_per_step(plan, result) == expected


def test_steps_that_do_not_fit_are_an_error_with_both_numbers(pretend, text, tmp_path):
    """Nothing can be chosen without their speed; the error is one line, and no directory stays."""
    pretend.plan = {"device": "cpu", "memory.total_bytes": 2_500_000_000, "memory.available_bytes": 300_000_000}
    home = tmp_path / "home"
    done = call("fit", text, "--dir", home, "--time=10m")
    assert (done.code, home.exists()) == (2, False)
    assert done.stderr.splitlines()[-1].startswith(
        "error: memory: expected about 2.5 GB for the steps that are timed first, found 300 MB free on cpu; end other"
    )


@pytest.mark.parametrize("stage", range(6))
@pytest.mark.parametrize(("code", "expected"), [(130, 130), (143, 143), (-15, 143), (1, 1), (-9, 1)])
def test_a_stage_that_is_ended_ends_it_with_its_code(code, expected, stage, pretend, text, tmp_path):
    """Whatever ends a stage: nothing more is started, what there is stays, and its place and the stage are named."""
    pretend.codes = {stage: code}
    home = tmp_path / "home"
    done = call("fit", text, "--dir", home, "--time=10m")
    assert done.code == expected
    assert len(pretend.started) == stage + 1
    assert f"ended with exit code {code}; everything so far is in {home}" in done.stderr
    assert (home / "plan_128.toml").exists()
    assert (home / "outcome.json").exists() is False


def test_more_time_is_offered_where_it_helps(pretend, text, tmp_path, monkeypatch):
    """A small text that was read as often as helps gets no such hint."""
    for name, most, is_offered in (("a", 1e9, True), ("b", 20.0, False)):
        monkeypatch.setattr("transformerlm.experiments.fit.choice.MAX_PASSES", most)
        done = call("fit", text, "--dir", tmp_path / name, "--time=1h")
        assert ("train it to twice the time" in done.stderr) == is_offered


def test_a_run_without_a_validation_loss_is_said_to_have_none(pretend, text, tmp_path):
    """A run that diverged has nothing to hold against the prediction; that is a line, no traceback."""
    pretend.reached["run"] = float("nan")
    done = call("fit", text, "--dir", tmp_path / "home", "--time=10m")
    assert done.code == 1
    assert "nothing to hold against the prediction" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [0, 13, 19_999])
def test_too_little_text_is_refused_before_anything_is_written(size, tmp_path):
    """Both numbers are in the error; no directory is made."""
    (tmp_path / "note.txt").write_text("x" * size)
    done = call("fit", tmp_path / "note.txt", "--dir", tmp_path / "home")
    assert (done.code, done.stderr) == (2, f"error: text: expected at least 20,000 bytes to train on, found {size:,}\n")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("words", [[], ["nowhere.txt"], ["--time=0s", "x"], ["--time=5", "x"]])
def test_a_wrong_command_line_is_refused(words, tmp_path, monkeypatch):
    """Without a text, with a missing one, or with a time that is none, the command ends at once."""
    monkeypatch.chdir(tmp_path)
    done = call("fit", *words)
    assert done.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_second_fit_takes_the_next_directory(pretend, text, tmp_path):
    """The first one's files stay as they are."""
    for _ in range(2):
        assert call("fit", text, "--dir", tmp_path / "home", "--time=10m").code == 0
    first, second = tmp_path / "home", tmp_path / "home-2"
    assert str(first / "run") not in (second / "train.toml").read_text()
    assert (first / "outcome.json").exists()
    assert (second / "outcome.json").exists()


def test_past_runs_that_are_shipped_have_been_measured():
    """The shipped file has rows, so that nobody gets a guess alone."""
    assert len({row.corpus for row in read_rows(PAST_RUNS)}) >= 3


# --- real ones -----------------------------------------------------------------------------------------------------


def write_text(path: Path) -> Path:
    """Write a small text of a simple law."""
    lines = (f"The {word} sat on the mat, and the {word} was glad.\n\n" for word in ("cat", "dog") * 4000)
    path.write_text("".join(lines))
    return path


def start(text: Path, home: Path) -> subprocess.Popen[str]:
    """Start a real fit in a session of its own, so that a signal to it is as one from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "cli.fit", text, "--time=8s", "--dir", home],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_whole_of_it_on_a_small_text(tmp_path):
    """The real commands: a prediction, a run that reaches what its text allows, a judgement, and hints that work."""
    home = tmp_path / "home"
    child = start(write_text(tmp_path / "text.txt"), home)
    out, _ = child.communicate(timeout=900)
    assert child.returncode == 0, out[-3000:]
    said, found = read(home / "prediction.json"), read(home / "outcome.json")
    assert found["bits_per_byte"] < said["probe"]["bits_per_byte"] * 1.05
    assert read_rows_of(found)[0].steps == found["steps"]
    assert "expected: " in out
    assert "it came to " in out
    assert "Traceback" not in out
    hints = [line for line in out.split("Next:\n")[1].splitlines() if line and not line.startswith("# ")]
    assert len(hints) == 4
    for line in hints:
        words = shlex.split(line)
        at = next(number for number, word in enumerate(words) if "transformerlm-" in word)
        verb = words[at].rpartition("transformerlm-")[2]
        checked = call(verb, *words[at + 1 :], "--print-config")
        assert checked.code == 0, (line, checked.stderr)


def read_rows_of(outcome):
    """Return the row of an outcome as the reader of past runs returns it."""
    return [Row(**outcome["row"])]


STAGES = {  # the file that a stage has written as soon as it begins
    "plan": "plan_128.toml",
    "train-tokenizer": "train_tokenizer.toml",
    "make-data": "make_data.toml",
    "probe": "probe.toml",
    "train": "run/metrics.jsonl",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_during_any_stage_ends_it_and_its_child(stage, number, tmp_path):
    """Ctrl-C, or SIGTERM to the command alone: it ends with the signal's code, keeps what there is, no orphan."""
    home = tmp_path / "home"
    child = start(write_text(tmp_path / "text.txt"), home)
    deadline = time.monotonic() + 600
    while not (home / STAGES[stage]).exists():
        assert child.poll() is None, child.communicate()[0][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(child.pid, number)  # as a terminal does
    else:
        child.send_signal(number)
    out, _ = child.communicate(timeout=600)
    assert child.returncode in (128 + number, -number), out[-2000:]
    assert "Traceback" not in out
    assert home.exists()
    assert not (home / "outcome.json").exists()
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(child.pid, 0)
