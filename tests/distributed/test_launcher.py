"""What the environment says of the ranks, and what a rank does when its launcher dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transformerlm.distributed.launcher import Launch, first_host, launches, read_launch, started, was_requeued

ROOT = Path(__file__).parents[2]
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu3",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "12",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[03-04,9]",
    "SLURM_TASKS_PER_NODE": "4(x2),4",
}


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    """Return the environment without a variable."""
    return {key: value for key, value in environment.items() if key != name}


def test_torchrun_says_which_rank_this_is():
    """Rank, local rank and both sizes are torchrun's; the store is in torchrun, or in rank 0 of another launcher."""
    assert read_launch(TORCHRUN) == Launch(3, 1, 4, 2, "gpu3", 29500, holds_store=False)
    assert not read_launch(TORCHRUN | {"RANK": "0"}).holds_store
    assert read_launch(without(TORCHRUN | {"RANK": "0"}, "TORCHELASTIC_USE_AGENT_STORE")).holds_store


def test_srun_says_which_rank_this_is():
    """A task of a step is a rank; the first machine has the store, at a port that follows from the job's number."""
    launch = read_launch(SRUN)
    assert launch == Launch(9, 1, 12, 4, "gpu03", 20_000 + 1234 * 11 % 12_000, holds_store=False)
    assert read_launch(SRUN | {"SLURM_PROCID": "0"}).holds_store
    placed = read_launch(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (placed.address, placed.port) == ("10.0.0.1", 29500)
    of_step = read_launch(SRUN | {"SLURM_STEP_NODELIST": "gpu9,gpu11", "SLURM_STEP_TASKS_PER_NODE": "6(x3)"})
    assert (of_step.address, of_step.local_world_size) == ("gpu9", 6)


def test_a_rank_beyond_the_world_is_refused():
    """It would wait for ranks that never come."""
    with pytest.raises(ValueError, match="RANK: expected less than WORLD_SIZE = 2, found 5"):
        read_launch(TORCHRUN | {"RANK": "5", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "environment",
    [{}, SRUN | {"SLURM_NTASKS": "1"}, without(SRUN, "SLURM_STEP_ID"), TORCHRUN | {"WORLD_SIZE": "1"}],
    ids=["nobody", "one task", "the script of a job", "one rank"],
)
def test_one_process_is_a_world_of_one(environment):
    """Without a launcher, with one task, and in a job's script, which is no task, there is one process."""
    assert read_launch(environment) == Launch()


@pytest.mark.parametrize(
    "name",
    ["LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] + [name for name in SRUN if name != "SLURM_STEP_ID"],
)
def test_what_is_there_in_part_is_refused_by_name(name):
    """The error names the variable that is missing and the launcher that sets it."""
    environment, launcher = (SRUN, "srun") if name.startswith("SLURM") else (TORCHRUN, "torchrun")
    with pytest.raises(ValueError, match=rf"^{name}: expected .*found nothing; start the run with {launcher}$"):
        read_launch(without(environment, name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_TASKS_PER_NODE": "4(y2)"}, r"SLURM_TASKS_PER_NODE: expected a list .*found '4\(y2\)'"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID: expected a number below 3"),
        ({"SLURM_PROCID": "first"}, "SLURM_PROCID: expected a whole number beside SLURM_STEP_ID, found 'first'"),
    ],
)
def test_what_srun_would_not_say_is_refused(changes, words):
    """Values that cannot be right are quoted."""
    with pytest.raises(ValueError, match=words):
        read_launch(SRUN | changes)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("a,b", "a"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[3,7]", "gpu3"),
        ("r[1-2]n[03-04]x,b", "r1n03x"),
        ("a-b[10]", "a-b10"),
    ],
)
def test_the_first_machine_of_a_list(nodes, first):
    """SLURM's short form of a list of machines, with leading zeros and several brackets."""
    assert first_host(nodes) == first


def test_a_launch_keeps_its_name_over_restarts():
    """torchrun's name is that of its process; SLURM's is the job's and the step's; nobody's is none."""
    assert launches({}) == []
    assert not was_requeued({})
    assert was_requeued({"SLURM_RESTART_COUNT": "1"})
    first, again = (launches(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": count}) for count in "01")
    assert first == again
    assert str(os.getppid()) in first[0]
    assert launches(SRUN) == launches(SRUN | {"SLURM_RESTART_COUNT": "1"}) == ["slurm  1234 0"]
    assert launches({"SLURM_JOB_ID": "5"}) == ["slurm  5 batch"]


def test_a_process_is_told_from_a_later_one_of_its_number():
    """The name of a process holds when it was started, and an ended one has none, reaped or not."""
    process = subprocess.Popen(["sleep", "600"])
    name = started(process.pid)
    assert name
    assert started(process.pid) == name
    process.kill()
    until(lambda: started(process.pid) is None)
    process.wait()
    assert started(process.pid) is None


RANK = """
import os, sys, time
from transformerlm.distributed.launcher import end_with_launcher
def end(line):
    open(sys.argv[1] + "/ended", "w").write(line)
    os._exit(1)
end_with_launcher(end)
open(sys.argv[1] + "/began.tmp", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + "/began.tmp", sys.argv[1] + "/began")
time.sleep(600)
"""


def until(happened, seconds: float = 120.0) -> None:
    """Wait until something has happened, for minutes if need be."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("between", ["", "sh -c '\"$@\"; true' sh "], ids=["directly", "a shell between"])
def test_a_rank_ends_soon_after_its_launcher_was_killed(between, tmp_path):
    """A SIGKILL of the launcher ends the ranks it has started, through a script, too; the line names the launcher."""
    rank = f"env RANK=1 TORCHELASTIC_RUN_ID=none {between}{sys.executable} -c '{RANK}' {tmp_path}"
    launcher = subprocess.Popen(["bash", "-c", f"{rank} & wait"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    until((tmp_path / "began").exists)
    launcher.kill()
    launcher.wait()
    until((tmp_path / "ended").exists)
    assert (tmp_path / "ended").read_text() == f"torchrun (process {launcher.pid}) has died: rank 1 ends, too"
    until(lambda: started(int((tmp_path / "began").read_text())) is None)


def test_a_run_in_the_background_outlives_its_shell(tmp_path):
    """Without torchrun the process that started a run may end: a shell with `&`, `nohup`, a script."""
    program = RANK.replace("time.sleep(600)", "time.sleep(4)")
    command = f"{sys.executable} -c '{program}' {tmp_path} &"
    subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    until((tmp_path / "began").exists)
    until(lambda: started(int((tmp_path / "began").read_text())) is None)
    assert not (tmp_path / "ended").exists()
