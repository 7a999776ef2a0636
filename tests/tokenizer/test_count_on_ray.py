"""Training on parts that a Ray cluster of two nodes counts, on this machine, while workers, a driver and a node die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from config.schemas import ClusterConfig
from tests.tokenizer.test_count_parts import EOT, VOCAB_SIZE, _text, one_pass
from transformerlm.distributed.work import UNFINISHED
from transformerlm.tokenizer.count_parts import Means, Request, Trained, trained_by_parts

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

PART_BYTES = 4000
# What a driver runs that is killed: this file's `train`, in a process of its own.
DRIVER = "import sys; from tests.tokenizer.test_count_on_ray import train; train(*sys.argv[1:])"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Return a cluster of two nodes with a processor each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(**options)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of some hundred parts."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(_text(seed) for seed in range(80)), newline="")
    return path


def train(address: str, text: str | Path, folder: str | Path) -> Trained | None:
    """Return what a training on the cluster gives to the block that saves it."""
    means = Means(ClusterConfig(on="ray", address=address), part_bytes=PART_BYTES, engine="reference")
    with trained_by_parts(
        [str(text)], VOCAB_SIZE, Request([EOT]), folder=Path(folder), means=means, is_saved=bool
    ) as trained:
        return trained


def _wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.002)
    return found


def _num_done(folder: Path) -> int:
    return len(list(folder.glob("counts-??????")))


def _worker_of(folder: Path, killed: list[int]) -> int | None:
    """Return the number of a process that has begun a part; it is in the name of the unfinished folder."""
    here = f"{UNFINISHED}{socket.gethostname()}-"
    workers = [int(name.split(here)[1].split("-")[0]) for name in _names(folder) if here in name]
    return next((worker for worker in workers if worker not in killed), None)  # killed ones leave their folders


def _names(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith("counts-")] if folder.exists() else []


def test_a_killed_worker_costs_the_part_in_hand(cluster: Any, text: Path, tmp_path: Path) -> None:
    """Ray does the part again in another worker, and the merges are those of one pass."""
    folder = tmp_path / "t.parts"
    killed: list[int] = []

    def kill() -> None:
        for number in (3, 10, 20):
            _wait_for(lambda number=number: _num_done(folder) >= number)
            killed.append(_wait_for(lambda: _worker_of(folder, killed)))
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    trained = train(cluster.address, text, folder)
    killer.join()
    assert trained == one_pass([str(text)], Request([EOT]), "reference")[0]
    assert len(killed) == 3
    assert os.getpid() not in killed
    assert not folder.exists()


def test_a_killed_driver_is_gone_on_with(cluster: Any, text: Path, tmp_path: Path) -> None:
    """The parts that are done stay as they are."""
    folder = tmp_path / "t.parts"
    command = [sys.executable, "-c", DRIVER, cluster.address, str(text), str(folder)]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    _wait_for(lambda: _num_done(folder) >= 5)
    driver.kill()
    driver.wait()
    time.sleep(1)  # until Ray has noticed, too
    before = {name: (folder / name / "part.json").stat().st_mtime_ns for name in _names(folder) if "." not in name}
    seen: dict[str, int] = {}

    def look() -> None:
        _wait_for(lambda: _num_done(folder) > len(before) + 5)
        seen.update({name: (folder / name / "part.json").stat().st_mtime_ns for name in before})

    looker = threading.Thread(target=look)
    looker.start()
    assert train(cluster.address, text, folder) == one_pass([str(text)], Request([EOT]), "reference")[0]
    looker.join()
    assert len(before) >= 5
    assert seen == before


def test_a_lost_node_costs_its_parts_in_hand(cluster: Any, text: Path, tmp_path: Path) -> None:
    """The other node does them; last in this file, as the cluster has one node afterwards."""
    folder = tmp_path / "t.parts"

    def lose() -> None:
        _wait_for(lambda: _num_done(folder) >= 5)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    loser = threading.Thread(target=lose)
    loser.start()
    trained = train(cluster.address, text, folder)
    loser.join()
    assert trained == one_pass([str(text)], Request([EOT]), "reference")[0]
