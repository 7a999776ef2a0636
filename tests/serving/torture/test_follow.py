"""A real training that is followed while it saves, and checkpoints that are damaged: no request notices."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from config.io import dump_toml
from tests.checkpoints.helpers import flip_bit, truncate
from tests.serving.command import ENVIRONMENT, WAIT, Server, save_random_model, serving, wait_until
from tests.training.tiny_run import TinyFiles, tiny_config

FOLLOW = ("--follow.checkpoint=newest", "--follow.interval=0.5s")


@contextmanager
def training(files: TinyFiles, folder: Path) -> Iterator[Path]:
    """Give the run of a training that goes on until the end of the block; it saves every few steps."""
    changes = {"training.max_steps": 10**6, "checkpoint.interval": 25, "model.context_length": 128}
    toml = folder / "train.toml"
    toml.write_text(dump_toml(tiny_config(files, folder, changes)), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "cli.train", "--config", str(toml)]
    with (folder / "train.err").open("wb") as err:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=err)
    try:
        yield folder / "run"
        assert process.poll() is None, (folder / "train.err").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 143
    finally:
        process.kill()
        process.wait(WAIT)


@pytest.mark.slow
def test_a_training_is_followed_and_no_request_fails(files, tmp_path):
    """A minute of 4 streams beside a training that saves and prunes: none fails, each text is of one step."""
    seen: set[tuple[int, str]] = set()
    is_over = threading.Event()

    def ask_on(server: Server, number: int) -> int:
        count = 0
        while not is_over.is_set():
            body: dict[str, Any] = {"prompt": "Ada sees", "max_tokens": 30, "seed": number, "ignore_eos": True}
            answer = server.complete(**body, stream=number % 2 == 0)
            assert answer.status_code == 200, answer.text
            assert '"error"' not in answer.text
            steps = {int(one) for one in re.findall(r'"step":\s?(\d+)', answer.text)}
            prints = set(re.findall(r'"system_fingerprint":\s?"([^"]+)"', answer.text))
            assert len(steps) == len(prints) == 1, (steps, prints)
            seen.add((steps.pop(), prints.pop()))
            count += 1
        return count

    with training(files, tmp_path) as run:
        wait_until(run.is_dir)
        with serving(run, tmp_path / "server", *FOLLOW) as server, ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask_on, server, number) for number in range(4)]
            end = time.monotonic() + 60
            while time.monotonic() < end or server.health()["reloads"] < 5:
                time.sleep(0.2)
                assert not any(one.done() for one in asked), [one.result() for one in asked if one.done()]
                assert time.monotonic() < end + WAIT
            is_over.set()
            assert all(one.result(WAIT) > 0 for one in asked)
            assert server.health()["restarts"] == 0
            assert len({step for step, _ in seen}) > 3
            assert len(seen) == len({step for step, _ in seen})  # one set of weights has one step
            assert server.terminate() == 143
            assert "Traceback" not in server.stderr
    assert not list(run.rglob("*.bad*"))


def tree(run: Path) -> dict[str, tuple[int, int, int]]:
    """Return what is in a run, with what changes when a file is written or replaced."""
    return {
        str(path.relative_to(run)): (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for path in sorted(run.rglob("*"))
        if (stat := path.lstat())
    }


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_a_damaged_checkpoint_changes_nothing(damage, files, tmp_path):
    """The newest one is damaged: served on with the old one, said once, and nothing in the run is touched."""
    run = save_random_model(tmp_path / "run", files, step=1)
    with serving(run, tmp_path / "server", *FOLLOW) as server:
        expected = server.texts(prompt="Ada", max_tokens=20, seed=1)
        other = save_random_model(tmp_path / "other", files, step=2) / "checkpoints" / "step-00000002"
        damage(other / "model.safetensors")
        os.rename(other, run / "checkpoints" / other.name)
        before = tree(run)
        wait_until(lambda: server.events("checkpoint_skipped"))
        time.sleep(2)  # four more looks
        assert len(server.events("checkpoint_skipped")) == 1
        assert server.texts(prompt="Ada", max_tokens=20, seed=1) == expected
        assert server.complete(prompt="Ada", model="run@step-00000002").status_code == 404
        assert tree(run) == before
        save_random_model(run, files, step=3)
        wait_until(lambda: server.health()["step"] == 3)
        assert server.texts(prompt="Ada", max_tokens=20, seed=1) != expected
        assert server.health()["restarts"] == 0
        assert server.terminate() == 143
        assert "Traceback" not in server.stderr
    assert {name for name in tree(run) if "step-00000002" in name} == {
        name for name in before if "step-00000002" in name
    }
