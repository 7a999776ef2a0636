"""Who started this process, and what it says of the other ranks: torchrun, srun, or nobody. Needs no torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 1.0
_PROC = Path("/proc")


@dataclass(frozen=True)
class Launch:
    """The place that the launcher gave this process among the ranks.

    Args:
        rank: our number among all ranks.
        local_rank: our number among those of this machine.
        world_size: how many ranks there are.
        local_world_size: how many of them are on this machine.
        address: where the store is through which the ranks find each other; empty in a world of one.
        port: its port.
        holds_store: whether this process must open the store; under torchrun the launcher has done so.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = ""
    port: int = 0
    holds_store: bool = False


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return what the environment says: torchrun's variables, else those of a task of srun; without both, one process.

    Raises:
        ValueError: the variables are there only in part, or one of them has no usable value.
    """
    if "RANK" in environment:
        return _by_torchrun(environment)
    # SLURM gives the number of tasks to the script of a job, too, which is one process: only a step has an id.
    in_step = "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment
    if in_step and _number(environment, "SLURM_NTASKS", beside="SLURM_STEP_ID") > 1:
        return _by_srun(environment)
    return Launch()


def _by_torchrun(environment: Mapping[str, str]) -> Launch:
    rank, local_rank, world_size = (
        _number(environment, name, beside="RANK") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    if world_size == 1:
        return Launch()
    if rank >= world_size:
        found = f"expected less than WORLD_SIZE = {world_size}, found {rank}"
        raise ValueError(f"RANK: {found}; start the run with torchrun")
    port = _number(environment, "MASTER_PORT", beside="RANK")
    if not environment.get("MASTER_ADDR"):
        raise ValueError("MASTER_ADDR: expected the address of rank 0, found nothing; start the run with torchrun")
    # Launchers other than torchrun may not say how many ranks this machine has.
    here = _number(environment, "LOCAL_WORLD_SIZE", beside="RANK") if "LOCAL_WORLD_SIZE" in environment else world_size
    holds_store = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Launch(rank, local_rank, world_size, here, environment["MASTER_ADDR"], port, holds_store)


def _by_srun(environment: Mapping[str, str]) -> Launch:
    rank, local_rank, world_size, node = (
        _number(environment, name, beside="SLURM_STEP_ID")
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID")
    )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if not nodes or not tasks:
        missing = "SLURM_TASKS_PER_NODE" if nodes else "SLURM_JOB_NODELIST"
        raise ValueError(f"{missing}: expected it beside SLURM_STEP_ID, found nothing; start the run with srun")
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT", beside="SLURM_STEP_ID")
    else:  # the same on all nodes, and seldom that of another job
        port = 20_000 + (_number(environment, "SLURM_JOB_ID", beside="SLURM_STEP_ID") * 11) % 12_000
    return Launch(rank, local_rank, world_size, _tasks_of(node, tasks), address, port, holds_store=rank == 0)


def first_host(nodes: str) -> str:
    """Return the first machine of a list as SLURM writes it: `gpu[03-05,9],login` begins with `gpu03`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _tasks_of(node: int, tasks: str) -> int:
    """Return how many tasks a node has, by a list such as `8(x2),4`: 8 on nodes 0 and 1, 4 on node 2."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_TASKS_PER_NODE: expected a list such as 8(x2),4, found {tasks!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID: expected a number below {len(counts)}, by SLURM_TASKS_PER_NODE, found {node}")
    return counts[node]


def _number(environment: Mapping[str, str], name: str, *, beside: str) -> int:
    value = environment.get(name)
    if value is None or not value.isdecimal():
        found = "nothing" if value is None else repr(value)
        start = "torchrun" if beside == "RANK" else "srun"
        raise ValueError(f"{name}: expected a whole number beside {beside}, found {found}; start the run with {start}")
    return int(value)


# --- the launcher itself -------------------------------------------------------------------------------------------


def is_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun started this process, or one that this process comes from."""
    return "TORCHELASTIC_RUN_ID" in environment and "RANK" in environment


def launches(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return names of the launch that stay the same when the launcher starts its ranks again, and only then.

    torchrun's is the process that runs on this machine and outlives its ranks. SLURM's is the job, which keeps its
    number when it is queued again, and the step in it. A process that nothing starts again has none.
    """
    found = []
    if is_by_torchrun(environment) and (since := started(launcher := _launcher(environment))):
        found.append(f"torchrun {socket.gethostname()} {launcher} {since}")
    if job := environment.get("SLURM_JOB_ID"):
        step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "batch"))
        found.append(f"slurm {environment.get('SLURM_CLUSTER_NAME', '')} {job} {step}")
    return found


def was_requeued(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether SLURM has started this job before."""
    return environment.get("SLURM_RESTART_COUNT", "0") != "0"


def end_with_launcher(end: Callable[[str], object], environment: Mapping[str, str] = os.environ) -> None:
    """Call `end` with a line, from a thread, soon after the torchrun that started this process has died.

    Its ranks would hold their devices and wait for nobody. Under other launchers, and without one, nothing is watched:
    a shell may end before what it started.
    """
    if not is_by_torchrun(environment):
        return
    launcher = _launcher(environment)
    since = started(launcher)
    is_parent = launcher == os.getppid()

    def watch() -> None:
        while os.getppid() == launcher if is_parent else started(launcher) == since:
            time.sleep(_POLL_SECONDS)
        end(f"torchrun (process {launcher}) has died: rank {environment['RANK']} ends, too")

    if since is not None:
        threading.Thread(target=watch, name="launcher", daemon=True).start()


def _launcher(environment: Mapping[str, str]) -> int:
    """Return the process of torchrun: the nearest above us that does not have the variables it gives to its ranks.

    Between the two there may be a script, `uv run` or `numactl`.
    """
    process, mark = os.getppid(), f"TORCHELASTIC_RUN_ID={environment['TORCHELASTIC_RUN_ID']}".encode()
    while process > 1:
        try:
            if mark not in (_PROC / str(process) / "environ").read_bytes().split(b"\0"):
                break
            process = int(_fields(process)[1])
        except (OSError, IndexError):  # no /proc, or a process that is not ours
            break
    return process


def started(process: int) -> str | None:
    """Return when a process was started, in words that no later process of its number shares; None if it has ended."""
    if _PROC.joinpath("self/stat").exists():
        try:
            fields = _fields(process)
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    said = subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True, check=False)
    return said.stdout.strip() or None


def _fields(process: int) -> list[str]:
    """Return what Linux says of a process after its name: state, parent, ..., the 20th of them when it was started."""
    return (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
