"""W&B at arm's length: the real package offline, and fake ones that are down, slow or raise errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from logger import WandbLogger, create_logger

pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")

# Every call to it goes to a file as one JSON line.
FAKE = """
import json, os, re, sys, time

def note(*call):
    with open(os.environ["FAKE_WANDB_CALLS"], "a") as file:
        file.write(json.dumps(call, allow_nan=True) + "\\n")

class Artifact:
    def __init__(self, name, type):
        if not re.fullmatch("[a-zA-Z0-9_.-]+", name) or len(name) > 128 or type == "job":
            raise ValueError("refused: " + name)
        self.files = [name, type]
    def add_dir(self, path): self.files.append(["dir", path])
    def add_file(self, path): self.files.append(["file", path])

class Run:
    def define_metric(self, name, step_metric): pass
    def log(self, record):
        note("log", record)
        {log}
    def log_artifact(self, artifact): note("artifact", *artifact.files)
    def finish(self):
        {finish}
        note("finish")

def init(**options):
    print("chatter on stdout")
    note("init", options)
    {init}
    return Run()
"""


HANGS = 300  # seconds; half as long as what hangs in a test would hang for


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """W&B may be slow on a busy machine if a test is not about that."""
    defaults = WandbLogger.__init__.__kwdefaults__
    for name in ("init_timeout", "close_timeout"):
        monkeypatch.setitem(defaults, name, float(HANGS))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Returns a function that puts a fake `wandb` on the process's path; that returns a reader of its calls."""
    calls = tmp_path / "calls.jsonl"
    monkeypatch.setenv("FAKE_WANDB_CALLS", str(calls))

    def install(*, init="pass", log="pass", finish="pass"):
        package = tmp_path / "fake" / "wandb"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(FAKE.format(init=init, log=log, finish=finish))
        monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return install


def _messages(caplog):
    return [record.getMessage() for record in caplog.records]


def _train(logger, *, steps=5):
    """A run whose losses must not depend on what its logger does; returns them and the slowest step's time."""
    losses, slowest = [], 0.0
    for step in range(steps):
        begin = time.perf_counter()
        losses.append(1 / (step + 1))
        logger.log_metrics(step, {"loss": losses[-1]})
        slowest = max(slowest, time.perf_counter() - begin)
    return losses, slowest


LOSSES = [1 / (step + 1) for step in range(5)]


def test_records_and_artifacts_arrive_in_order(fake, tmp_path, capfd):
    """Init gets the names, config and id; records and artifacts follow in order; the end finishes the run."""
    calls = fake()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    logger = create_logger(
        "wandb",
        run_name="first",
        run_id="abcd1234",
        wandb_entity="team",
        wandb_project="project",
        config={"model": {"d_model": 8}, "path": Path("a")},
        tags=["t"],
    )
    assert logger.run_id == "abcd1234"
    logger.log_metrics(1, {"loss": float("nan")})
    logger.log_event("checkpoint_saved", step=1)
    logger.log_artifact(folder, name="model", type="model")
    logger.log_artifact(__file__, name="test", type="code")
    logger.close()
    (_, options), *rest = calls()
    assert options.pop("settings") == {}
    assert options == {
        "id": "abcd1234",
        "resume": "allow",
        "name": "first",
        "entity": "team",
        "project": "project",
        "config": {"model": {"d_model": 8}, "path": "a"},
        "tags": ["t"],
    }
    assert str(rest) == str(
        [
            ["log", {"step": 1, "metrics.loss": float("nan")}],
            ["log", {"event": "checkpoint_saved", "step": 1}],
            ["artifact", "model", "model", ["dir", str(folder)]],
            ["artifact", "test", "code", ["file", str(Path(__file__).resolve())]],
            ["finish"],
        ]
    )
    assert capfd.readouterr().out == ""


def test_hanging_init_delays_a_start_by_its_timeout_only(fake, caplog):
    """An init that never answers costs the start and the end their limits; the process is gone afterwards."""
    fake(init="time.sleep(600)")
    begin = time.perf_counter()
    logger = WandbLogger(run_name="a", init_timeout=0.5, close_timeout=0.5)
    assert 0.4 < time.perf_counter() - begin < HANGS
    losses, slowest = _train(logger)
    assert losses == LOSSES
    assert slowest < 60
    begin = time.perf_counter()
    logger.close()
    assert time.perf_counter() - begin < HANGS
    assert logger._process.returncode is not None
    assert _messages(caplog) == [
        "W&B has not answered within 0.5 s: the run goes on and its lines wait",
        "W&B has not finished within 0.5 s: its last lines are missing there",
    ]


def test_lines_wait_for_a_late_init(fake):
    """Records written before W&B is up are not lost."""
    calls = fake(init="time.sleep(1)")
    logger = WandbLogger(run_name="a", init_timeout=0.05)
    _train(logger)
    logger.close()
    assert [call[1]["step"] for call in calls() if call[0] == "log"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("where", "statement"),
    [("init", "raise OSError('down')"), ("log", "raise OSError('down')"), ("finish", "raise OSError('down')")],
)
def test_an_exception_is_reported_once_and_ends_wandb_only(fake, caplog, where, statement):
    """Wherever W&B raises, one warning says so and the run continues."""
    fake(**{where: statement})
    logger = WandbLogger(run_name="a")
    assert _train(logger)[0] == LOSSES
    logger.close()
    assert _messages(caplog) == ["W&B failed, the run goes on without it: OSError: down"]


def test_sudden_death_is_reported_once(fake, caplog):
    """A W&B process that dies silently is noticed, and later records are dropped."""
    fake(init="os._exit(3)")
    logger = WandbLogger(run_name="a")
    logger._ended.wait(HANGS)
    _train(logger)
    logger.close()
    assert _messages(caplog) == ["W&B failed, the run goes on without it: its process ended unexpectedly"]


def test_hanging_finish_is_left_behind(fake, caplog):
    """A finish that never returns costs the end its limit, after every record has been handed over."""
    calls = fake(finish="time.sleep(600)")
    logger = WandbLogger(run_name="a", close_timeout=1.0)
    _train(logger)
    begin = time.perf_counter()
    while sum(call[0] == "log" for call in calls()) < 5 and time.perf_counter() - begin < HANGS:
        time.sleep(0.05)
    begin = time.perf_counter()
    logger.close()
    assert time.perf_counter() - begin < HANGS
    assert sum(call[0] == "log" for call in calls()) == 5
    assert _messages(caplog) == ["W&B has not finished within 1 s: its last lines are missing there"]


def test_slow_wandb_drops_the_oldest_and_says_how_many(fake, caplog):
    """With W&B stuck, the newest records are kept, the step never waits, and the end says what was dropped."""
    fake(init="time.sleep(600)")
    logger = WandbLogger(run_name="a", init_timeout=0.05, close_timeout=0.05, queue_size=100)
    logger.write({"longer than a pipe holds": "x" * 2**22})
    while logger._lines:  # until the sender holds that record: then it is blocked, and only this test uses the queue
        time.sleep(0.01)
    _, slowest = _train(logger, steps=5000)
    assert slowest < 60
    kept = [json.loads(line)["log"]["step"] for line in logger._lines]
    assert kept == list(range(4900, 5000))
    logger.close()
    assert _messages(caplog)[-1] == "W&B was too slow: 4900 records were dropped"


def test_missing_artifact_is_left_out(fake, tmp_path, caplog):
    """A checkpoint that was pruned before its upload is reported, and W&B continues."""
    calls = fake()
    with WandbLogger(run_name="a") as logger:
        logger.log_artifact(tmp_path / "gone", name="model", type="model")
        logger.log_event("after")
    assert [call[0] for call in calls()] == ["init", "log", "finish"]
    assert _messages(caplog) == [f"W&B: {tmp_path / 'gone'} was gone before it could be uploaded as model"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base lr=0.001 + @home/é-checkpoint", "base-lr-0.001----home---checkpoint"),
        (f"{'x' * 200}=1-checkpoint", f"{'x' * 115}-1-checkpoint"),
    ],
)
def test_an_artifact_has_a_name_that_wandb_takes(fake, tmp_path, caplog, name, expected):
    """A run may have any name: what its artifact may not contain becomes a dash, and a long name keeps its end."""
    calls = fake()
    with WandbLogger(run_name="a") as logger:
        logger.log_artifact(tmp_path, name=name, type="model")
    assert calls()[1:] == [["artifact", expected, "model", ["dir", str(tmp_path)]], ["finish"]]
    assert len(expected) <= 128
    assert _messages(caplog) == []


def test_an_artifact_that_wandb_refuses_is_left_out(fake, tmp_path, caplog):
    """W&B goes on with the lines; one warning says which artifact is missing there, and why."""
    calls = fake()
    with WandbLogger(run_name="a") as logger:
        logger.log_artifact(tmp_path, name="model", type="job")
        logger.log_event("after")
    assert [call[0] for call in calls()] == ["init", "log", "finish"]
    assert _messages(caplog) == [f"W&B: {tmp_path} could not be uploaded as model: refused: model"]


def test_run_id_is_known_without_the_network(fake):
    """Each logger chooses an id of eight characters itself, or continues under the given one."""
    fake()
    ids = []
    for given in (None, None, "given"):
        with WandbLogger(run_name="a", run_id=given) as logger:
            ids.append(logger.run_id)
    assert [len(each) for each in ids[:2]] == [8, 8]
    assert len(set(ids)) == 3
    assert ids[2] == "given"


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)])
def test_missing_package_is_one_line(monkeypatch, spec):
    """Without the package, or with only a folder of its name, the error says how to install it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(
        ValueError,
        match=r'^wandb is not installed: in the clone, pip install -e ".\[wandb\]"',
    ):
        create_logger("wandb", run_name="a")


def test_real_package_offline(tmp_path, monkeypatch, caplog, capfd):
    """The real W&B, offline, takes metrics, events and artifacts, leaves a run to sync, and keeps off stdout."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    logger = create_logger("wandb", run_name="a", jsonl_path=tmp_path / "m.jsonl", config={"model": {"d_model": 8}})
    assert _train(logger)[0] == LOSSES
    logger.log_event("checkpoint_saved", step=4)
    logger.log_record({"text.prompt": "a", "text.output": "é"})
    logger.log_artifact(tmp_path / "vocab.json", name=f"{'long ' * 30}lr=0.1-tokenizer", type="tokenizer")
    logger.close()
    assert caplog.records == []
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert run.name.endswith(logger.run_id)
    stored = (run / f"run-{logger.run_id}.wandb").read_bytes()
    for part in (b"metrics.loss", b"checkpoint_saved", b"text.prompt", b"vocab.json", b"d_model", b"lr-0.1-tokenizer"):
        assert part in stored
    assert capfd.readouterr().out == ""
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 7


def test_process_finishes_when_the_run_is_killed(fake, tmp_path):
    """A run that dies without closing leaves its W&B run finished, not open."""
    calls = fake()
    program = textwrap.dedent(
        """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from logger import WandbLogger
        logger = WandbLogger(run_name="a", init_timeout=300.0)
        logger.log_event("a")
        while '"log"' not in open(os.environ["FAKE_WANDB_CALLS"]).read(): pass
        os._exit(9)
        """
    )
    subprocess.run([sys.executable, "-c", program, str(Path(__file__).parents[2])], timeout=600, check=False)
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline and calls()[-1:] != [["finish"]]:
        time.sleep(0.05)
    assert [call[0] for call in calls()] == ["init", "log", "finish"]
