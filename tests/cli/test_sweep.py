"""`transformerlm-sweep`: what is planned, what is refused, what comes out, and what a stop leaves."""

from __future__ import annotations

import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cli import sweep as command
from config.io import SHIPPED, dump_toml, load_config
from config.sweep import SweepConfig
from config.train import TrainConfig
from tests.cli.commands import ROOT, call
from tests.experiments.sweep.helpers import BASE, FAKE
from tests.training.tiny_run import read_records, tiny_config, write_tiny_files
from transformerlm.experiments.sweep import scheduler
from transformerlm.experiments.sweep.follow import RunFollower
from transformerlm.experiments.sweep.plan import Planner
from transformerlm.experiments.sweep.points import axes_of, grid

SWEEP = """\
base = "base.toml"
dir = "sweep"
seeds = [0, 1]
[[axes]]
key = "optimizer.learning_rate"
values = [1e-3, 1e-2, 1e-1]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return a working directory with a sweep whose trainings are those of the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(scheduler, "train_command", lambda path: [sys.executable, str(FAKE), str(path)])
    for name in ("train.npy", "valid.npy", "tokenizer"):
        Path(name).touch()
    Path("base.toml").write_text(BASE)
    Path("sweep.toml").write_text(SWEEP)
    return tmp_path


def test_a_sweep_ends_with_the_best_setting(here):
    """Lines of JSON, a table, a picture, and a TOML file that transformerlm-train takes; again, it trains nothing."""
    done = call("sweep", "--config", "sweep.toml", "--parallel=3")
    assert done.code == 0, done.stderr
    ended = [record for record in done.records if record["event"] == "ended"]
    assert [record["state"] for record in ended] == ["finished"] * 6
    results = [record for record in done.records if record["event"] == "result"]
    assert [record["settings"]["learning_rate"] for record in results] == ["0.01", "0.001", "0.1"]
    assert [json.loads(line) for line in Path("sweep/results.jsonl").read_text().splitlines()] == results
    assert "6/6" in done.stderr
    compared = [record for record in done.records if record["event"] == "compared"]
    assert len(compared) == 3
    assert "best: learning_rate = 0.01; its settings are in sweep/best.toml" in done.stderr
    best = load_config(TrainConfig, Path("sweep/best.toml"))
    assert (best.optimizer.learning_rate, best.runs_dir, best.logging.run_name) == (1e-2, Path(), "sweep-best")
    assert Path("sweep/effects.png").read_bytes()[:4] == b"\x89PNG"
    again = call("sweep", "--config", "sweep.toml")
    assert {record["event"] for record in again.records} == {"skipped", "result", "compared", "best"}
    assert again.stderr.count("as trained before") == 6


def test_a_closed_stdout_ends_no_sweep(here, monkeypatch):
    """`| head -1`: the runs go on to their ends, and what came of them is in the files."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    config = load_config(SweepConfig, Path("sweep.toml"), {"parallel": "3", "output.format": "json"})
    assert command.sweep(config) == 0
    assert len(Path("sweep/results.jsonl").read_text().splitlines()) == 3
    assert Path("sweep/best.toml").exists()


def test_files_are_written_before_results_are_printed(here, monkeypatch):
    """Whatever ends the command while it prints takes none of them."""
    files = [Path("sweep") / name for name in ("results.jsonl", "best.toml", "effects.png")]
    are_there = []
    monkeypatch.setattr(command, "print_record", lambda record: are_there.append(all(one.exists() for one in files)))
    done = call("sweep", "--config", "sweep.toml", "--parallel=3")
    assert done.code == 0, done.stderr
    assert set(are_there) == {True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SWEEP.replace("1e-2", "-1"), "sweep.toml:6: axes.0.values: optimizer.learning_rate: expected a number > 0"),
        (SWEEP.replace("learning_rate", "rate"), "sweep.toml:5: axes.0.key: optimizer.rate is not a key of"),
        (SWEEP + '[[axes]]\nkey = "model.num_heads"\nvalues = [2, 3]\n', "base.toml:4 with --model.num_heads: model: "),
        (SWEEP.replace("base.toml", "bse.toml"), "bse.toml: no such file"),
        (
            SWEEP.replace("dir", 'set = ["data.train=a.npy"]\ndir'),
            "data.train: a.npy: no such file; base or set names it",
        ),
    ],
)
def test_an_error_is_reported_before_any_run(text, expected, here):
    """Exit code 2, the file and the key, and nothing is written."""
    Path("sweep.toml").write_text(text)
    done = call("sweep", "--config", "sweep.toml")
    assert (done.code, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("sweep").exists()


def test_a_dry_run_says_what_would_run(here, monkeypatch):
    """A line for each run with settings, steps, FLOPs and time; nothing is written."""
    monkeypatch.setattr(command, "flops_per_second", lambda run: 1e8)
    done = call("sweep", "--config", "sweep.toml", "--dry-run", "--match=flops", "--budget=1e9")
    assert done.code == 0, done.stderr
    assert [record["settings"]["training.seed"] for record in done.records] == ["0", "1"] * 3
    for record in done.records:
        assert abs(record["flops"] - 1e9) <= record["flops"] / record["steps"] / 2
        assert record["seconds"] == record["flops"] / 1e8
    assert "6 runs: about 1:00 on this machine" in done.stderr
    assert not Path("sweep").exists()


def test_commands_for_another_scheduler(here):
    """One line a run; a sweep of the same file later takes what they have trained."""
    done = call("sweep", "--config", "sweep.toml", "--print-commands", "--seeds=3")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert (done.code, len(lines)) == (0, 3)
    assert all(Path(line[-3]).name == "transformerlm-train" and line[-2] == "--config" for line in lines)
    seeds = [load_config(TrainConfig, Path(line[-1])).training.seed for line in lines]
    assert seeds == [3] * 3
    subprocess.run([sys.executable, str(FAKE), lines[1][-1]], check=True)
    rest = call("sweep", "--config", "sweep.toml", "--parallel=3", "--seeds=3")
    assert [record["event"] for record in rest.records].count("skipped") == 1
    assert [record["event"] for record in rest.records].count("began") == 2


def test_a_failed_run_is_shown_with_its_last_lines(here, monkeypatch):
    """The others go on, and the exit code is 1."""
    monkeypatch.setattr(
        scheduler, "train_command", lambda path: [sys.executable, str(FAKE), str(path), "--fail", "0.1-"]
    )
    done = call("sweep", "--config", "sweep.toml", "--retries=0", "--parallel=3", "--seeds=0")
    assert done.code == 1
    assert done.stderr.count("error: no luck") == 2  # when it happens, and at the end
    assert [record["state"] for record in done.records if record["event"] == "result"] == ["finished"] * 2 + ["failed"]
    assert "best: learning_rate = 0.01" in done.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_stops_the_runs_and_the_sweep(name, code, here, monkeypatch):
    """The exit code says which; the same command goes on where the runs were."""
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    made = Path("sweep")

    def stop() -> None:
        while not any(made.glob("*/made.txt")):
            time.sleep(0.02)
        os.kill(os.getpid(), getattr(signal, name))

    thread = threading.Thread(target=stop)
    thread.start()
    done = call("sweep", "--config", "sweep.toml", "--seeds=0")
    thread.join()
    assert done.code == code, done.stderr
    assert f"{name}: 0 of 3 runs have finished; the same command goes on" in done.stderr
    monkeypatch.setenv("FAKE_SECONDS", "0")
    rest = call("sweep", "--config", "sweep.toml", "--parallel=3", "--seeds=0")
    assert rest.code == 0
    assert "goes_on" in [record["event"] for record in rest.records]


def test_halving_leaves_the_best_to_finish(here, monkeypatch):
    """The others make no steps that nobody needs; the table says that they stopped early, and none of them is best."""
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    Path("sweep.toml").write_text(SWEEP + "[halving]\nrungs = [2]\nfactor = 3\n")
    done = call("sweep", "--config", "sweep.toml", "--parallel=3", "--seeds=0")
    results = [record for record in done.records if record["event"] == "result"]
    assert [record["state"] for record in results] == ["finished", "stopped", "stopped"]
    made = [len(Path(f"sweep/{record['runs']}-0/made.txt").read_text().splitlines()) for record in results]
    assert made[0] == 12
    assert all(2 <= steps < 12 for steps in made[1:])
    assert done.stderr.count("stopped early") == 2
    assert "best: learning_rate = 0.01" in done.stderr


def test_a_guided_search_tries_as_many_points_as_asked(here):
    """Each is a run a seed; again, all are there."""
    pytest.importorskip("optuna")
    text = SWEEP.replace("values = [1e-3, 1e-2, 1e-1]", 'low = 1e-3\nhigh = 1e-1\nscale = "log"')
    Path("sweep.toml").write_text(f'method = "tpe"\ntrials = 2\n{text}')
    done = call("sweep", "--config", "sweep.toml")
    assert done.code == 0, done.stderr
    assert [record["event"] for record in done.records].count("ended") == 4
    assert "4/4" in done.stderr
    assert len(Path("sweep/trials.jsonl").read_text().splitlines()) == 4
    again = call("sweep", "--config", "sweep.toml", "--trials=2")
    assert {record["event"] for record in again.records} == {"skipped", "result", "compared", "best"}


def test_a_second_sweep_is_refused(here):
    """It says who holds the directory."""
    from transformerlm.experiments.sweep.queue import SweepDirectory

    with SweepDirectory(Path("sweep")).hold():
        done = call("sweep", "--config", "sweep.toml")
    assert done.code == 2
    assert f"sweep: expected to be the only sweep here, found process {os.getpid()}" in done.stderr


def test_runs_share_the_cores(monkeypatch):
    """One run has what the user gave; several have equal parts of the cores, at least one each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in command._environment(1)
    assert [command._environment(parallel)["OMP_NUM_THREADS"] for parallel in (2, 3, 16)] == ["4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [command._environment(parallel)["OMP_NUM_THREADS"] for parallel in (1, 2, 8)] == ["3", "3", "1"]


@pytest.mark.parametrize("path", sorted((SHIPPED / "ablations").glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_ablation_changes_what_its_name_says(path):
    """Each compares the shipped model with the variants that differ from it in that choice, three seeds each."""
    config = load_config(SweepConfig, path)
    runs = Planner(config, SHIPPED / "train.toml", lambda config: 1).runs(grid(axes_of(config)))
    assert len(runs) == 3 * len(config.variants)
    base = load_config(TrainConfig, SHIPPED / "train.toml").model.model_dump()
    changed = {key for run in runs for key, value in run.config.model.model_dump().items() if value != base[key]}
    expected = {"norm": "norm_position", "post_norm": "norm_position", "no_position": "position", "silu": "ffn"}
    assert changed == {expected[path.stem]}
    assert runs[0].config.model.model_dump() == base
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()


@pytest.mark.slow
def test_the_speed_is_measured(here):
    """A dry run times a few steps of the real training on random tokens, for a micro-batch that is chosen, too."""
    done = call("sweep", "--config", "sweep.toml", "--dry-run", "--set", "training.micro_batch_size=auto")
    assert done.code == 0, done.stderr
    assert all(record["seconds"] > 0 for record in done.records)


@pytest.mark.parametrize(("given", "found"), [("steps", 12), ("seconds", None)])
def test_a_dry_run_of_a_budget_of_time_knows_no_steps(given, found, here, monkeypatch):
    """Nor FLOPs: they depend on the machine."""
    monkeypatch.setattr(command, "flops_per_second", lambda run: 1e8)
    done = call("sweep", "--config", "sweep.toml", "--dry-run", f"--match={given}", "--budget=12")
    assert {record["steps"] for record in done.records} == {found}
    assert (done.records[0]["seconds"] == 12) == (given == "seconds")


def test_a_dry_run_of_guided_search_knows_how_many_runs_it_makes_at_a_time(here, monkeypatch):
    """Sixteen runs of 12 seconds, four at a time."""
    monkeypatch.setattr(command, "flops_per_second", lambda run: 1e8)
    text = SWEEP.replace("values = [1e-3, 1e-2, 1e-1]", "low = 1e-3\nhigh = 1e-1")
    Path("sweep.toml").write_text(f'method = "tpe"\ntrials = 8\n{text}')
    done = call("sweep", "--config", "sweep.toml", "--dry-run", "--match=seconds", "--budget=12", "--parallel=4")
    assert done.code == 0, done.stderr
    assert "guided search would try 16 runs" in done.stderr
    assert "about 0:48 on this machine" in done.stderr


def test_guided_search_takes_options_that_fit_some_others(here, monkeypatch):
    """Six heads fit a width of 96 alone; five fit none, and are refused before any run."""
    monkeypatch.setattr(command, "flops_per_second", lambda run: 1e8)
    axes = '[[axes]]\nkey = "model.d_model"\nvalues = [64, 96]\n[[axes]]\nkey = "model.num_heads"\nvalues = [4, 6]\n'
    Path("sweep.toml").write_text(f'method = "tpe"\ntrials = 8\n{SWEEP.partition("[[axes]]")[0]}{axes}')
    done = call("sweep", "--config", "sweep.toml", "--dry-run")
    assert done.code == 0, done.stderr
    wrong = Path("sweep.toml").read_text().replace("[4, 6]", "[4, 5]")
    Path("sweep.toml").write_text(wrong)
    done = call("sweep", "--config", "sweep.toml", "--dry-run")
    assert done.code == 2
    assert "d_model (64) is not divisible by num_heads (5)" in done.stderr


# --- real trainings ------------------------------------------------------------------------------------------------


def real_sweep(folder: Path, *, rates: str, seeds: str, steps: int = 30, interval: int = 4) -> Path:
    """Write a sweep of tiny real trainings of some steps, with checkpoints on the way."""
    if not (folder / "base.toml").exists():
        files = write_tiny_files(folder)
        config = tiny_config(files, folder, {"training.max_steps": steps, "checkpoint.interval": interval})
        (folder / "base.toml").write_text(dump_toml(config))
    path = folder / "sweep.toml"
    path.write_text(
        f'base = "{folder / "base.toml"}"\ndir = "{folder / "sweep"}"\nseeds = {seeds}\nretries = 1000\n'
        f'[[axes]]\nkey = "optimizer.learning_rate"\nvalues = {rates}\n'
    )
    return path


def losses_of(folder: Path) -> dict[str, dict[int, float]]:
    """Return the losses of each run's steps; each run has ended once, by its last step."""
    found = {}
    for run in sorted((folder / "sweep").glob("*-[01]")):
        records = read_records(run)
        assert [record["reason"] for record in records if record.get("event") == "finished"] == ["max_steps"]
        found[run.name] = {record["step"]: record["metrics.loss"] for record in records if "metrics.loss" in record}
    return found


@pytest.mark.slow
def test_a_real_training_is_what_the_command_alone_makes(tmp_path):
    """The losses of a run of the sweep are those of transformerlm-train with its TOML file, bit for bit."""
    done = call("sweep", "--config", real_sweep(tmp_path, rates="[1e-2]", seeds="[1]"))
    assert done.code == 0, done.stderr
    [(name, losses)] = losses_of(tmp_path).items()
    alone = ("--runs_dir", tmp_path, "--logging.run_name=alone")
    assert call("train", "--config", tmp_path / "sweep" / "queue" / f"{name}.toml", *alone).code == 0
    records = read_records(tmp_path / "alone")
    assert losses == {record["step"]: record["metrics.loss"] for record in records if "metrics.loss" in record}


@pytest.mark.slow
def test_real_trainings_survive_thirty_kills(tmp_path):
    """Eight runs: sweep, trainings or both are killed at random; all end once, as in an undisturbed sweep."""
    rng, kills = random.Random(0), 0
    eight: dict[str, Any] = {"rates": "[1e-3, 3e-3, 1e-2, 3e-2]", "seeds": "[0, 1]", "steps": 500, "interval": 50}
    path = real_sweep(tmp_path, **eight)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "cli.sweep", "--parallel=2", "--config", str(path)]
    sweep, log = None, (tmp_path / "said.txt").open("wb")
    while kills < 30:
        if sweep is None or sweep.poll() is not None:
            sweep = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        _wait_for_work(tmp_path, steps=rng.randint(-100, 100))
        assert sum(_steps_of(tmp_path)) < 8 * 500  # there is work left to disturb
        at_work = [int(one) for one in _trainings_of(tmp_path)]
        for pid in rng.choice([[sweep.pid], at_work, [sweep.pid, *at_work], [*at_work, sweep.pid]]):
            kills += _kill(pid)
        with suppress(subprocess.TimeoutExpired):
            sweep.wait(0.5)  # a signal takes a moment
    sweep.kill()
    sweep.wait()
    assert subprocess.run(words, env=environment, stdout=log, stderr=log, check=False).returncode == 0
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "base.toml").write_text((tmp_path / "base.toml").read_text())
    words[-1] = str(real_sweep(undisturbed, **eight))
    assert subprocess.run(words, env=environment, stdout=log, stderr=log, check=False).returncode == 0
    assert losses_of(tmp_path) == losses_of(undisturbed)
    assert len(losses_of(tmp_path)) == 8
    assert {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()} == {
        *losses_of(tmp_path),
        "queue",
        "logs",
    }


def _steps_of(folder: Path) -> list[int]:
    """Return how far each run is."""
    followers = [RunFollower(path.parent) for path in (folder / "sweep").glob("*/metrics.jsonl")]
    for follower in followers:
        follower.update()
    return [follower.step for follower in followers]


def _wait_for_work(folder: Path, *, steps: int) -> None:
    """Wait until a training is there and some steps were made, however fast the machine is."""
    end, low = time.monotonic() + 300, sum(_steps_of(folder))
    while (made := sum(_steps_of(folder))) < low + steps or not _trainings_of(folder):
        assert time.monotonic() < end
        low = min(low, made)  # a resume takes some back
        time.sleep(0.1)


def _kill(pid: int) -> bool:
    """Kill a process; return whether it was at work: one that has ended may still wait for its parent."""
    with suppress(OSError):
        is_at_work = "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        os.kill(pid, signal.SIGKILL)
        return is_at_work
    return False


def _trainings_of(folder: Path) -> list[str]:
    """Return the numbers of the processes that train runs of a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().decode("utf-8", "replace")
            if "cli.train" in words and str(folder) in words:
                found.append(entry.parent.name)
    return found
