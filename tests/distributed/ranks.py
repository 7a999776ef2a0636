"""Gloo ranks for tests: processes that fork from one that has imported torch, so that a world starts in a moment."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 120.0
_PRELOADED = [
    "torch",
    "torch._dynamo",  # recomputed activations need it
    "torch.distributed.fsdp",
    "pytest",
    "cli.prepare_run",
    "cli.train",
    "tests.training.tiny_run",
    "transformerlm.training.trainer",
]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """Call `function(world, *args)` in each rank of a new world and return the results in the order of the ranks.

    `function` is at the top level of a test module; what it returns can be pickled. A rank that raises, ends or takes
    longer than `seconds` fails the test with its traceback, and all ranks are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port = _free_port()
    ranks = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        target = (function, rank, world_size, port, sender, args)
        process = context.Process(target=_run_one, args=target, daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))
    try:
        return [_result(rank, receiver, seconds) for rank, (_, receiver) in enumerate(ranks)]
    finally:
        for process, _ in ranks:
            process.join(0.5)
            process.kill()
            process.join()


def _result(rank: int, receiver: Any, seconds: float) -> Any:
    assert receiver.poll(seconds), f"rank {rank}: no result after {seconds} s"
    try:
        failed, result = receiver.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} ended without a result") from None
    assert not failed, f"rank {rank}: {result}"
    return result


def _run_one(
    function: Callable[..., Any], rank: int, world_size: int, port: int, sender: Any, args: tuple[Any, ...]
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    import torch

    from transformerlm.distributed.world import init_from_env, shutdown

    torch.set_num_threads(1)
    try:
        world = init_from_env()
        sender.send((False, function(world, *args)))
        shutdown(world)
    except BaseException:
        sender.send((True, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
