"""Whoever is killed while a build by parts runs, the same call goes on and gives the files of one pass."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.schemas import ClusterConfig
from databuilder import build_dataset
from transformerlm.distributed.work import UNFINISHED
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer

EOT = "<|endoftext|>"
BYTES = {number: bytes([number]) for number in range(256)} | {256: EOT.encode()}
TOKENIZER = Tokenizer(BYTES, [], [EOT], engine="reference")
PART_MB = 0.02
SECONDS = 300.0

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")

# One build in a process of its own; each part that is begun is a line in a log.
BUILD = """
import sys, os, json
from pathlib import Path
from config.schemas import ClusterConfig
from databuilder import build_dataset, parts_build
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    encode_part = parts_build.encode_part

    def encode_and_tell(place, **arguments):
        with open(options["log"], "a") as file:
            file.write(place.name.partition(".")[0] + "\\n")
        return encode_part(place, **arguments)

    if options["cluster"]["on"] != "ray":
        parts_build.encode_part = encode_and_tell
    eot = "<|endoftext|>"
    tokens = {number: bytes([number]) for number in range(256)} | {256: eot.encode()}
    report = build_dataset(
        folder / "in.txt",
        tokenizer=Tokenizer(tokens, [], [eot], engine="reference"),
        train_path=folder / options["train"],
        valid_path=folder / options["train"].replace("train", "valid"),
        valid_fraction=0.2,
        num_workers=options["workers"],
        cluster=ClusterConfig.model_construct(**{"address": "auto", "share": None, **options["cluster"]}),
    )
    unwanted = {"torch"} | ({"ray"} if options["cluster"]["on"] != "ray" else set())
    assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""


class Builds:
    """A text, the files that one pass makes of it, and processes that make them by parts."""

    def __init__(self, folder: Path, *, num_documents: int) -> None:
        rng = random.Random(0)
        words = [" one", " two", "\n\n", "é漢", "'s", "  x", "42"]
        texts = ["doc" + "".join(rng.choices(words, k=rng.randint(50, 500))) for _ in range(num_documents)]
        (folder / "in.txt").write_text(EOT.join(texts))
        self.folder = folder
        self.log = folder / "log"
        build_dataset(
            folder / "in.txt",
            tokenizer=TOKENIZER,
            train_path=folder / "expected.npy",
            valid_path=folder / "expected-valid.npy",
            valid_fraction=0.2,
        )
        self.parts = -(-(folder / "in.txt").stat().st_size // int(PART_MB * 1e6))

    def start(self, on: str, *, workers: int = 1, train: str = "train.npy", **keys: Any) -> subprocess.Popen[str]:
        """Start a build."""
        cluster = {"on": on, "part_mb": PART_MB, **keys}
        options = {"folder": str(self.folder), "log": str(self.log), "train": train, "workers": workers}
        program = [sys.executable, "-c", BUILD, json.dumps({**options, "cluster": cluster})]
        return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def num_done(self) -> int:
        """Return how many parts have been encoded."""
        return sum("." not in path.name for path in self.folder.glob("train.*.parts/encoded-*"))

    def wait_for(self, number: int, process: subprocess.Popen[str]) -> bool:
        """Wait until so many parts are done; return False if the build has ended before."""
        end = time.monotonic() + SECONDS
        while self.num_done() < number and process.poll() is None:
            assert time.monotonic() < end, self.num_done()
            time.sleep(0.01)
        return process.poll() is None

    def finish(self, process: subprocess.Popen[str]) -> None:
        """Wait for a build that must end well."""
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, errors[-3000:]

    def check(self, *, kills: int, log: bool = True) -> None:
        """Check the files, that nothing is left beside them, and that each kill cost one part at most."""
        for mine, expected in (("train", "expected"), ("valid", "expected-valid")):
            for suffix in (".npy", ".documents.npy"):
                assert (self.folder / (mine + suffix)).read_bytes() == (self.folder / (expected + suffix)).read_bytes()
            facts, others = (json.loads((self.folder / f"{name}.json").read_bytes()) for name in (mine, expected))
            if facts.pop("settings_sha256", None):  # which shares write; it changes the sidecar's own sha256
                del facts["sidecar_sha256"], others["sidecar_sha256"]
            assert facts == others
        left = {path.name for path in self.folder.iterdir()}
        known = {f"{name}.{kind}" for name in ("train", "valid") for kind in ("npy", "json", "documents.npy")}
        assert {name for name in left if not name.startswith("expected")} - {"in.txt", "log"} == known
        if log:
            begun = self.log.read_text().split()
            assert len(set(begun)) == self.parts
            assert len(begun) <= self.parts + kills


@pytest.fixture
def builds(tmp_path: Path) -> Builds:
    return Builds(tmp_path, num_documents=600)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the worker processes that a build has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and "spawn_main" in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found


def kill_local(builds: Builds, places: list[int]) -> None:
    """Kill the build after so many parts, each time, and let it finish."""
    for number in places:
        process = builds.start("local")
        builds.wait_for(number, process)
        kill(process)
    builds.finish(builds.start("local"))
    builds.check(kills=len(places))


def kill_shares(builds: Builds, places: list[int], *, num_shares: int) -> None:
    """Keep some shares at work, and kill one after the other; the next start does what is left."""
    shares = [builds.start("share", share=f"{number + 1}/{num_shares}") for number in range(num_shares)]
    for turn, number in enumerate(places):
        place = turn % num_shares
        builds.wait_for(number, shares[place])
        kill(shares[place])
        shares[place] = builds.start("share", share=f"{place + 1}/{num_shares}")
    for process in shares:
        builds.finish(process)
    builds.finish(builds.start("share", share=f"1/{num_shares}"))
    builds.check(kills=len(places))


def kill_workers(builds: Builds, places: list[int]) -> None:
    """Kill a worker process of the reference engine: the build says so, and the next one goes on."""
    for number in places:
        process = builds.start("local", workers=2)
        while builds.wait_for(number, process) and not (workers := workers_of(process)):
            time.sleep(0.01)
        for worker in workers[:1]:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 0 or "a worker process died" in errors
    builds.finish(builds.start("local"))
    builds.check(kills=len(places))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    "kills",
    [
        lambda builds: kill_local(builds, [0, 5]),
        lambda builds: kill_shares(builds, [4], num_shares=2),
        lambda builds: kill_workers(builds, [3]),
    ],
    ids=["build", "share", "worker"],
)
def test_a_kill_costs_the_part_in_hand(builds, kills):
    """Of the build, of one of two shares, of a worker process: equal files, and nothing is left over."""
    kills(builds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        lambda builds: kill_local(builds, list(range(0, 40, 2))),
        lambda builds: kill_shares(builds, list(range(0, 40, 2)), num_shares=3),
        lambda builds: kill_workers(builds, list(range(1, 41, 2))),
    ],
    ids=["build", "share", "worker"],
)
def test_twenty_kills_cost_the_parts_in_hand(tmp_path, kills):
    """The same twenty times over."""
    kills(Builds(tmp_path, num_documents=1200))


# --- Ray ---------------------------------------------------------------------------------------------------------


def add_node(cluster: Any) -> None:
    """Add a node of one CPU with an address of its own, so that no driver takes it for its machine's."""
    cluster.add_node(num_cpus=1, object_store_memory=200_000_000, node_ip_address="127.0.0.2")


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each, on this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200_000_000},
    )
    add_node(cluster)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def ray_workers(builds: Builds, killed: list[int]) -> list[int]:
    """Return the processes that have begun a part; their numbers are in the names of the unfinished folders."""
    here = f"{UNFINISHED}{socket.gethostname()}-"
    names = [path.name for path in builds.folder.glob("train.*.parts/encoded-*") if here in path.name]
    workers = [int(name.partition(here)[2].split("-")[0]) for name in names]
    return [worker for worker in workers if worker not in killed]


@pytest.mark.slow
@needs_ray
def test_ray_does_the_parts_whoever_is_killed(tmp_path, ray_cluster):
    """Workers, the driver and a whole node are killed, twenty kills in all; the files are those of one pass."""
    builds = Builds(tmp_path, num_documents=1500)
    address = ray_cluster.address
    killed: list[int] = []

    def kill_worker(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not (workers := ray_workers(builds, killed)):
            time.sleep(0.002)
        for worker in workers[:1]:
            killed.append(worker)
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    def kill_driver(process: subprocess.Popen[str]) -> None:
        kill(process)

    def kill_node(process: subprocess.Popen[str]) -> None:
        ray_cluster.remove_node(next(iter(ray_cluster.worker_nodes)), allow_graceful=False)
        add_node(ray_cluster)

    turns: list[Callable[[subprocess.Popen[str]], None]] = [*[kill_worker] * 14, *[kill_driver] * 4, *[kill_node] * 2]
    random.Random(0).shuffle(turns)
    process = builds.start("ray", address=address)
    for number, turn in enumerate(turns):
        if not builds.wait_for(2 * number + 1, process):
            builds.finish(process) if turn is not kill_driver else process.communicate()
            process = builds.start("ray", address=address)
        turn(process)
        if process.poll() is not None:
            process = builds.start("ray", address=address)
    builds.finish(process)
    builds.check(kills=len(turns), log=False)


@pytest.mark.slow
@needs_ray
def test_ray_alone_gives_the_files_of_one_pass_and_shards(tmp_path):
    """Ray starts on this machine, and ends with the build; a part's error comes through as it is."""
    builds = Builds(tmp_path, num_documents=200)
    builds.finish(builds.start("ray", address="local"))
    builds.check(kills=0, log=False)
    builds.finish(builds.start("ray", address="local", train="train.shards"))
    shards = TokenDataset(builds.folder / "train.shards").tokens
    assert np.array_equal(shards[0 : len(shards)], np.load(builds.folder / "expected.npy"))
    (builds.folder / "in.txt").write_bytes(b"one \xff")
    cluster = ClusterConfig(on="ray", address="local")
    with pytest.raises(ValueError, match="expected UTF-8, found byte 0xff at offset 4"):
        build_dataset(
            builds.folder / "in.txt",
            tokenizer=TOKENIZER,
            train_path=tmp_path / "bad.npy",
            invalid_utf8="refuse",
            cluster=cluster,
        )
