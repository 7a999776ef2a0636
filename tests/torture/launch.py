"""torchrun for tests: its own agent, which forks ranks that have everything imported, and strikes them on the way.

Run by a zygote (`tests.torture.process.Zygote`) as `launch.py SETTINGS.json`, with the keys of `Launch`.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_PR_SET_PDEATHSIG = 1
PHASES = ("join", "start", "step", "evaluation", "save", "sample")


@dataclass(frozen=True)
class Strike:
    """What befalls a rank: a signal, some milliseconds after it enters a phase at a step, or later."""

    rank: int
    phase: str
    step: int = 0
    signal: str = "SIGKILL"
    delay: float = 0.0


@dataclass(frozen=True)
class Launch:
    """A launch of `transformerlm-train` on several ranks.

    `changes` are the options of each rank, if ranks differ; `strikes` are files in a folder, taken in order, so that
    each comes once over all starts.
    """

    options: list[str]
    changes: dict[str, list[str]]
    num_ranks: int = 2
    max_restarts: int = 0
    shutdown_timeout: int = 30
    strikes: str = ""
    nodes: str = "1:1"
    endpoint: str = ""


def write_strikes(folder: Path, strikes: list[Strike]) -> None:
    """Write what is to befall the ranks, a file for each."""
    folder.mkdir()
    for number, strike in enumerate(strikes):
        (folder / f"{number:03d}.json").write_text(json.dumps(asdict(strike)))


def random_strikes(count: int, *, num_ranks: int, seed: int) -> list[Strike]:
    """Return strikes in every phase and on every rank, at moments that the seed decides."""
    rng = random.Random(seed)
    return [
        Strike(rng.randrange(num_ranks), PHASES[number % len(PHASES)], delay=rng.choice([0.0, rng.uniform(0, 0.2)]))
        for number in range(count)
    ]


# --- in a rank ---------------------------------------------------------------------------------------------------


def become_rank(launch: Launch) -> None:
    """Run the command as this rank."""
    rank = os.environ["RANK"]
    folder = Path(launch.strikes) if launch.strikes else None
    if folder:
        _strike(folder, "join", 0)
        _watch_phases(folder)
    sys.argv = ["transformerlm-train", *launch.options, *launch.changes.get(rank, [])]
    from cli import train
    from cli.entry import run
    from transformerlm.distributed import handshake

    handshake.LATE_SECONDS = 1.0  # the disk is this machine's own
    got: list[str] = []
    tell = train.StopSignals._receive
    train.StopSignals._receive = lambda self, *args: (got.append("a signal"), tell(self, *args))[1]  # type: ignore
    # Only ranks that multiprocessing starts, as here, get SIGINT when the launcher dies; torchrun's do not.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    try:
        run("cli.train")
    except SystemExit as done:
        if got:  # an agent that got a signal reads no result, for which a forked rank would wait
            sys.stdout.flush()
            os._exit(int(done.code or 0))
        raise


def _watch_phases(folder: Path) -> None:
    from cli import train
    from transformerlm.training.trainer import Trainer

    def watched(original: Callable[..., Any], phase: str, *args: Any, **settings: Any) -> Any:
        _strike(folder, phase, args[0].state.step if isinstance(args[0], Trainer) else 0)
        return original(*args, **settings)

    def method(original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        return lambda *args, **settings: watched(original, phase, *args, **settings)

    vars(train)["prepare_run"] = partial(watched, vars(train)["prepare_run"], "start")
    for name, phase in (("step", "step"), ("validate", "evaluation"), ("save", "save"), ("_run_hooks", "sample")):
        setattr(Trainer, name, method(getattr(Trainer, name), phase))


def _strike(folder: Path, phase: str, step: int) -> None:
    """Strike this rank if the next strike is for it, here and now."""
    left = sorted(folder.glob("*.json"))
    if not left:
        return
    strike = Strike(**json.loads(left[0].read_text()))
    if (strike.rank, strike.phase) != (int(os.environ["RANK"]), phase) or step < strike.step:
        return
    left[0].rename(left[0].with_suffix(".done"))
    strike_now = partial(os.kill, os.getpid(), getattr(signal, strike.signal))
    if strike.delay:
        threading.Timer(strike.delay, strike_now).start()
    else:
        strike_now()


# --- the agent ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Launch, and end as torchrun does: with 1 if a rank failed for good."""
    launch = Launch(**json.loads(Path(sys.argv[1]).read_text()))
    least, most = map(int, launch.nodes.split(":"))
    config = LaunchConfig(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=launch.num_ranks,
        max_restarts=launch.max_restarts,
        shutdown_timeout=launch.shutdown_timeout,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.endpoint or "127.0.0.1:0",
        run_id="none",
        local_addr="127.0.0.1",
        start_method="fork",
        monitor_interval=0.05,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGUSR1",
    )
    try:
        elastic_launch(config, become_rank)(launch)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"the agent: rank {rank} ended with {failure.exitcode}")


if __name__ == "__main__":
    main()
