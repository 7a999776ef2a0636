"""Ranks that are killed or stopped at any moment: the launcher starts all again, and the run ends as if undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from config.io import dump_toml
from tests.torture.launch import PHASES, Launch, Strike, random_strikes, write_strikes
from tests.torture.process import Child, Surroundings, Zygote
from tests.training.tiny_run import read_records, step_lines, tiny_config, write_tiny_files
from transformerlm.checkpoints.directory import newest_whole, step_of
from transformerlm.distributed.launcher import started

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo on loopback is tested on Linux")

LIBRARIES = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "tests.torture.launch",
    "cli.train",
    "cli.prepare_run",
    "transformerlm.training.trainer",
    "transformerlm.training.planning.calibration",
    "transformerlm.inference.predictor",
    "matplotlib.pyplot",
)
STEPS = 24
CHANGES = {
    "training.max_steps": STEPS,
    "training.eval_tokens": 2048,
    "checkpoint.interval": 4,
    "samples.interval": 6,
    "samples.sampling": {"max_new_tokens": 4},
    "logging.backend": "console",
    "parallel.timeout": "60s",
}


class Ranks:
    """Starts runs of several ranks in folders of their own."""

    def __init__(self, zygote: Zygote, files, home: Path) -> None:
        self.zygote, self._files, self._home, self._count = zygote, files, home, 0

    def write(self, name: str, changes: dict[str, object]) -> Path:
        """Write the TOML of a run and return its runs_dir."""
        folder = self._home / name
        folder.mkdir()
        (folder / "train.toml").write_text(dump_toml(tiny_config(self._files, folder, CHANGES | changes)))
        return folder

    def start(
        self,
        folder: Path,
        strikes: list[Strike] | None = None,
        *,
        changes: dict[str, list[str]] | None = None,
        environment: dict[str, str] | None = None,
        **settings,
    ) -> Child:
        """Start an agent with its ranks on a run that was written, in `folder`."""
        self._count += 1
        place = folder / f"launch-{self._count}"
        place.mkdir()
        if strikes:
            write_strikes(place / "strikes", strikes)
            settings["strikes"] = str(place / "strikes")
        launch = Launch(["--config", str(folder / "train.toml")], changes or {}, **settings)
        (place / "launch.json").write_text(json.dumps(asdict(launch)))
        around = Surroundings({"GLOO_SOCKET_IFNAME": "lo", **(environment or {})})
        outputs = (place / "stdout", place / "stderr")
        module = "tests.torture.launch"
        return self.zygote.start([str(place / "launch.json")], folder, around, outputs, module=module)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """What starts ranks in a moment."""
    zygote = Zygote("tests.torture.launch", LIBRARIES)
    home = tmp_path_factory.mktemp("ranks")
    yield Ranks(zygote, write_tiny_files(home), home)
    zygote.close()


@pytest.fixture(scope="module")
def whole(ranks: Ranks) -> Path:
    """The folder of a run on two ranks that nobody disturbed."""
    folder = ranks.write("undisturbed", {})
    child = ranks.start(folder)
    assert child.wait() == 0, child.stderr
    return folder


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> list[dict]:
    """Its step lines."""
    return step_lines(whole / "run")


# One for each phase, then a stop; the others hit the other rank, and other moments.
STRIKES = [
    *[Strike(0, "join", delay=0.05), Strike(1, "start"), Strike(0, "step", step=3, delay=0.002)],
    *[Strike(1, "evaluation", step=4), Strike(0, "sample", step=6), Strike(0, "save", step=8, delay=0.005)],
    Strike(0, "step", step=18, signal="SIGSTOP"),
]
MORE_STRIKES = [
    *[Strike(1, "join"), Strike(0, "start", delay=0.05), Strike(1, "step", step=2)],
    *[Strike(0, "evaluation", step=4, delay=0.005), Strike(1, "save", step=4), Strike(1, "sample", step=6, delay=0.01)],
    *[Strike(0, "save", step=8), Strike(1, "step", step=10), Strike(0, "evaluation", step=12)],
    *[Strike(1, "sample", step=12), Strike(1, "save", step=16), Strike(1, "evaluation", step=20, delay=0.005)],
    *[Strike(0, "save", step=20), Strike(1, "step", step=23)],
]


def left_strikes(folder: Path) -> list[str]:
    """Return the strikes that have not come, of all launches in a folder."""
    return sorted(path.name for path in folder.glob("launch-*/strikes/*.json"))


@pytest.mark.parametrize(
    "strikes", [STRIKES[::3], pytest.param([*STRIKES, *MORE_STRIKES], marks=pytest.mark.slow)], ids=["three", "all"]
)
def test_a_run_survives_kills_of_any_rank_in_every_phase(strikes, ranks, undisturbed):
    """Kills and a stop, in every phase: the run ends with the undisturbed one's numbers, each step once."""
    folder = ranks.write(f"kills-{len(strikes)}", {"parallel.timeout": "8s"})
    # On a machine that is very busy 8 s may pass without a fault, too: that costs a start, not the result.
    child = ranks.start(folder, strikes, max_restarts=2 * len(strikes), shutdown_timeout=1)
    assert child.wait() == 0, child.stderr
    assert left_strikes(folder) == []
    assert step_lines(folder / "run") == undisturbed
    assert "\nTraceback" not in child.stderr
    assert 'rank 0 of 2: missing at "' in child.stderr
    assert "no sign of life" in child.stderr


# --- ranks that would not train the same run --------------------------------------------------------------------------


def test_ranks_that_differ_are_refused_before_anything_is_written(ranks, whole, tmp_path):
    """Another directory, setting, token file or checkpoint on rank 1: exit 2, a line with both, and no trace."""
    folder, other = whole, write_tiny_files(tmp_path, seed=1)
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    shutil.copytree(folder / "run", ours)
    shutil.copytree(folder / "run", theirs)
    (theirs / "checkpoints/step-00000024/state.json").write_text("{}")
    elsewhere, rate = tmp_path / "elsewhere", "optimizer.learning_rate"
    refusals = {
        "directory": ([f"--runs_dir={elsewhere}"], f"is {folder}/run on rank 0 on ", f"but {elsewhere}/run"),
        "setting": ([f"--{rate}=1e-4"], f"{rate} is 0.003 on", "but 0.0001 on rank 1 of 2"),
        "tokens": ([f"--data.train={other.train}"], "data.train: sha256 is ", " on rank 1 of 2 on "),
        "weights": ([f"--checkpoint.init_from={theirs}"], "init_from is step-00000024 (", "but step-00000024 ("),
    }
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.glob("run/**/*"))}
    for name, (options, mine, yours) in refusals.items():
        new = ["--logging.run_name=new"] if name != "directory" else []
        init = [f"--checkpoint.init_from={ours}"] if name == "weights" else []
        child = ranks.start(folder, changes={"0": new + init, "1": new + options})
        child.wait()
        (said,) = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
        assert said.startswith("error: the ranks would not train the same run: "), name
        assert mine in said, name
        assert yours in said, name
        assert "ended with 2" in child.stderr, name
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.glob("run/**/*"))} == before
    assert not (folder / "new").exists()
    assert not elsewhere.exists()


# --- which run goes on ------------------------------------------------------------------------------------------------


def test_a_restarted_run_without_a_name_goes_on_in_its_directory(ranks, undisturbed):
    """All starts of one launch leave one directory, and say so; another launch begins a run of its own."""
    folder = ranks.write("nameless", {"logging.run_name": None})
    child = ranks.start(folder, [Strike(1, "start"), Strike(0, "step", step=6)], max_restarts=2)
    assert child.wait() == 0, child.stderr
    (run,) = (path.parent for path in folder.glob("*/config.toml"))
    assert step_lines(run) == undisturbed
    assert f"{run}: this launch goes on with the run that it began" in child.stderr
    assert [path for path in folder.iterdir() if path.is_dir() and "launch" not in path.name] == [run]
    child = ranks.start(folder, num_ranks=1, changes={"0": ["--training.max_steps=4"]})
    assert child.wait() == 0, child.stderr
    assert len(list(folder.glob("*/config.toml"))) == 2


# --- signals and launchers --------------------------------------------------------------------------------------------


def ranks_of(child: Child) -> list[int]:
    """Return the processes that an agent has started, as Linux lists them."""
    found = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text()
    return [int(number) for number in found.split()]


def has_steps(child: Child, count: int) -> None:
    """Wait until a run has made some steps."""
    assert child.wait_until(lambda: f'"step": {count},' in child.stdout), child.stderr
    assert child.poll() is None, child.stderr


def test_the_launcher_passes_signals_on_and_ends_with_1(ranks):
    """SIGUSR1 to the launcher saves one step on all ranks, with the event for a requeue; the launcher ends with 1."""
    folder = ranks.write("signal", {"training.max_steps": 10**6})
    child = ranks.start(folder)
    has_steps(child, 3)
    child.signal(signal.SIGUSR1)
    assert child.wait() == 1
    records = read_records(folder / "run")
    assert [record["event"] for record in records[-2:]] == ["requeue", "finished"]
    assert records[-1]["signal"] == "SIGUSR1"
    assert step_of(newest_whole(folder / "run/checkpoints")) == records[-1]["step"]


def test_a_killed_launcher_leaves_no_rank_behind(ranks):
    """SIGKILL of the launcher, as by a system short of memory, ends its ranks within moments; a line says why."""
    folder = ranks.write("orphans", {"training.max_steps": 10**6})
    child = ranks.start(folder)
    has_steps(child, 3)
    orphans = ranks_of(child)
    assert len(orphans) == 2
    assert child.kill()
    end = time.monotonic() + 120
    while any(started(pid) for pid in orphans):
        assert time.monotonic() < end, "a rank goes on without its launcher"
        time.sleep(0.05)
    assert f"torchrun (process {child.pid}) has died: rank " in child.stderr


def start_by_srun(ranks: Ranks, folder: Path, *options: str) -> list[Child]:
    """Start two tasks of a step as srun does, without torchrun; rank 0 holds the store."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in "01":
        around = Surroundings(step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        files = (folder / f"stdout-{rank}", folder / f"stderr-{rank}")
        arguments = ["--config", str(folder / "train.toml"), *options]
        started.append(ranks.zygote.start(arguments, folder, around, files, module="cli.train"))
    return started


def test_srun_alone_starts_ranks(ranks, undisturbed):
    """Tasks of srun find each other by SLURM's variables, and train as torchrun's ranks do."""
    folder = ranks.write("srun", {})
    children = start_by_srun(ranks, folder)
    assert [child.wait() for child in children] == [0, 0], [child.stderr for child in children]
    assert step_lines(folder / "run") == undisturbed


# --- slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "seed"), [(2, 1), (3, 2)])
def test_a_run_survives_fifty_kills_at_random(num_ranks, seed, ranks):
    """Fifty kills of any rank at random moments of every phase: the numbers of the undisturbed run, each step once."""
    changes = {"training.max_steps": 60, "training.batch_size": 12, "checkpoint.interval": 2, "samples.interval": 3}
    changes |= {"training.micro_batch_size": 12 // num_ranks}
    whole, torn = (ranks.write(f"{name}-{num_ranks}", changes) for name in ("whole", "torn"))
    child = ranks.start(whole, num_ranks=num_ranks)
    assert child.wait() == 0, child.stderr
    strikes = random_strikes(50, num_ranks=num_ranks, seed=seed)
    child = ranks.start(torn, strikes, num_ranks=num_ranks, max_restarts=2 * len(strikes))
    assert child.wait(3000) == 0, child.stderr
    assert step_lines(torn / "run") == step_lines(whole / "run")
    assert len(list(torn.glob("launch-*/strikes/*.done"))) > 30  # a fast run may end before all have come


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_others_by_the_timeout(rank, phase, ranks):
    """SIGSTOP of either rank in any phase: the other one names it and ends, and so does the launcher."""
    folder = ranks.write(f"stop-{rank}-{phase}", {"parallel.timeout": "20s"})  # a busy machine starts ranks slowly
    step = 0 if phase in ("join", "start") else 6
    child = ranks.start(folder, [Strike(rank, phase, step=step, signal="SIGSTOP")], shutdown_timeout=1)
    assert child.wait(600) == 1
    assert f"rank {rank} of 2: missing at " in child.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_task_of_srun_ends_the_other(stopped, ranks):
    """Without torchrun a stopped task, be it the one that holds the store, is named by the other, which ends with 1."""
    folder = ranks.write(f"stopped-task-{stopped}", {"training.max_steps": 10**6, "parallel.timeout": "8s"})
    children = start_by_srun(ranks, folder)
    has_steps(children[0], 3)
    children[stopped].signal(signal.SIGSTOP)
    assert children[1 - stopped].wait(600) == 1
    said = children[1 - stopped].stderr
    assert f"rank {stopped} of 2: missing at " in said if stopped else "rank 0, on " in said
    assert children[stopped].kill()


@pytest.mark.slow
def test_a_run_goes_on_without_a_lost_machine(ranks):
    """Of two machines one is killed whole, launcher and ranks: the other goes on alone in the same run, to its end."""
    folder = ranks.write("machines", {"logging.run_name": None, "training.max_steps": 400})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The first to come holds the meeting place of the launchers, and must stay.
    settings = {"num_ranks": 1, "nodes": "1:2", "endpoint": f"127.0.0.1:{port}", "max_restarts": 3}
    kept = ranks.start(folder, **settings)
    lost = ranks.start(folder, **settings)
    kept.wait_until(lambda: any('"step": 5,' in one.stdout for one in (kept, lost)))
    for pid in [lost.pid, *ranks_of(lost)]:
        os.kill(pid, signal.SIGKILL)
    lost.wait()
    assert kept.wait() == 0, kept.stderr
    (run,) = (path.parent for path in folder.glob("*/config.toml"))
    assert [line["step"] for line in step_lines(run)] == list(range(1, 401))
