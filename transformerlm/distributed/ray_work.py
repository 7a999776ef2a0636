"""Parts done by the workers of a Ray cluster, or by Ray on this machine. The only file that imports ray.

Ray brings a part's function and arguments to a worker, and back comes its name: texts and ids are in files that all
machines see. A part whose worker or machine was lost is done again. An error of the part itself ends the work.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from config.extras import how_to_install
from transformerlm.distributed.work import Part

MAX_RETRIES = 10  # of a part whose worker or machine was lost
PARTS_PER_CPU = 2  # in flight
_TRIES = 3  # to reach a cluster, each of several seconds


def check_ray() -> None:
    """Raise ValueError if ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f'cluster.on = "ray": expected ray, found none: {how_to_install("ray")}')


def do_on_ray(do: Callable[[Part], str], parts: Sequence[Part], *, address: str, num_cpus: int) -> Iterator[str]:
    """Do the parts on Ray and yield their names in any order; what a part raises comes through.

    Raises:
        ConnectionError: no cluster at `address`.
        RuntimeError: a part's worker was lost again and again.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not parts:
        return
    import ray

    mine = not ray.is_initialized()
    if mine:
        _connect(address)
    try:

        def task(part: Part) -> str:
            return do(part)

        remote = ray.remote(num_cpus=num_cpus, max_retries=MAX_RETRIES, retry_exceptions=False)(task)
        waiting = list(reversed(parts))
        pending: list[Any] = []
        while waiting or pending:
            room = max(2, int(PARTS_PER_CPU * _num_cpus() / num_cpus))
            while waiting and len(pending) < room:
                pending.append(remote.remote(waiting.pop()))
            done, pending = ray.wait(pending, num_returns=1, timeout=None)
            for reference in done:
                yield _result(reference)
    finally:
        if mine:
            ray.shutdown()


def _num_cpus() -> float:
    import ray

    return float(ray.cluster_resources().get("CPU", 0))


def _connect(address: str) -> None:
    import ray

    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        ray.init(address, **options)
        return
    if address == "auto":
        try:
            _init(address, **options)
        except ConnectionError:
            ray.init("local", **options)
        return
    for tries_left in reversed(range(_TRIES)):
        try:
            _init(address, **options)
            return
        except ConnectionError:  # a head that is busy, or still starting
            if not tries_left:
                raise


def _init(address: str, **options: Any) -> None:
    import ray

    del options["include_dashboard"]  # the cluster has one or not
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConnectionError(f"cluster.address: expected a Ray cluster at {address}, found none ({reason})") from error


def _result(reference: Any) -> str:
    import ray

    try:
        name: str = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.LocalRayletDiedError as error:
        raise RuntimeError("Ray has ended on this machine; give the same command again, which goes on") from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise RuntimeError(
            f"a part's Ray worker was lost {MAX_RETRIES + 1} times: killed (out of memory?), or without this package "
            f"({reason})"
        ) from error
    return name
