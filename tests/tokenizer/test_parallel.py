"""Behaviour of the parallel map: order, laziness, and errors that surface instead of hanging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformerlm.tokenizer.parallel import default_num_workers, map_in_order, resolve_num_workers


def _square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def _name_of_thread(_: int) -> str:
    time.sleep(0.01)
    return threading.current_thread().name


def _fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is refused")
    return number


def _die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


WAYS = {
    "processes": {},
    "threads": {"threads": True},
    "threads and the caller": {"threads": True, "caller_works": True},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, bool]:
    """Return the keywords of each kind of worker."""
    return WAYS[request.param]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_results_come_in_order(num_workers: int, way: dict[str, bool]) -> None:
    """Later items that finish first wait for their turn."""
    found = list(map_in_order(_square, range(8), num_workers=num_workers, **way))
    assert found == [number**2 for number in range(8)]


def test_only_a_few_items_are_under_way(way: dict[str, bool]) -> None:
    """The source is read only a few items ahead of the workers."""
    taken = []
    results = map_in_order(_square, (taken.append(n) or n for n in range(1000)), num_workers=2, **way)
    assert next(results) == 0
    assert len(taken) <= 4
    results.close()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_exception_in_the_function_comes_through(num_workers: int, way: dict[str, bool]) -> None:
    """The caller sees the function's own error, after the results before it."""
    results = map_in_order(_fail_at_three, range(8), num_workers=num_workers, **way)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three is refused"):
        next(results)


def test_the_caller_works_while_it_waits() -> None:
    """With one thread beside it, it does what that has not begun; where it does not work, it does nothing."""
    for caller_works in (True, False):
        names = list(map_in_order(_name_of_thread, range(20), num_workers=2, threads=True, caller_works=caller_works))
        assert ("MainThread" in names) is caller_works
        assert len(set(names)) == 2


@pytest.mark.parametrize("caller_works", [True, False])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_an_error_of_the_items_comes_after_what_they_gave(num_workers: int, caller_works: bool) -> None:
    """A caller that needs only the first items never meets it, however far the items are read ahead."""

    def items() -> Iterator[int]:
        yield from range(4)
        raise ValueError("a bad line")

    results = map_in_order(_square, items(), num_workers=num_workers, threads=True, caller_works=caller_works)
    assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
    with pytest.raises(ValueError, match="a bad line"):
        next(results)


def test_a_killed_worker_is_an_error() -> None:
    """A worker that the system kills ends the map with a message, not in a hang."""
    with pytest.raises(RuntimeError, match="a worker process died"):
        list(map_in_order(_die_at_three, range(8), num_workers=2))


_SLEEPERS = """
import os, sys, time
from transformerlm.tokenizer.parallel import map_in_order
if __name__ == "__main__":
    tasks = ["__import__('os').getpid()"] * 2 + ["__import__('time').sleep(0.5)"] * 9
    for pid in map_in_order(eval, tasks, num_workers=2):
        print(pid, flush=True)
"""
_MEASURED = """
import os, time
from benchmarking.fresh_process import object_in_fresh_process
class Peer:
    pid = staticmethod(os.getpid)
    sleep = staticmethod(time.sleep)
if __name__ == "__main__":
    with object_in_fresh_process(Peer) as call:
        print(call("pid"), call("pid"), sep="\\n", flush=True)
        call("sleep", 300)
"""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def _signals_held_back(_: object) -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_workers_never_hear_ctrl_c() -> None:
    """SIGINT is blocked in workers from their first moment on, before they can ignore it, but not in the parent."""
    results = map_in_order(_signals_held_back, range(3), num_workers=2)
    assert all(signal.SIGINT in held for held in results)
    assert signal.SIGINT not in _signals_held_back(None)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
@pytest.mark.parametrize(
    ("program", "how"), [(_SLEEPERS, signal.SIGKILL), (_SLEEPERS, signal.SIGINT), (_MEASURED, signal.SIGTERM)]
)
def test_workers_leave_with_their_parent(program: str, how: signal.Signals, tmp_path: Path) -> None:
    """When the parent is killed, or stopped with Ctrl-C, its workers exit at once; so do those of a benchmark."""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        assert process.stdout is not None
        workers = {int(process.stdout.readline()) for _ in range(2)}
        process.send_signal(how)
        try:
            process.wait(timeout=300)
        finally:
            process.kill()
    deadline = time.monotonic() + 300
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


_AT_THE_WORST_MOMENT = """
import signal, sys, threading
from concurrent.futures import _base
from transformerlm.tokenizer.parallel import map_in_order

class Condition(threading.Condition):
    # The lock of a future; Ctrl-C comes when `result` has just taken it.
    def __enter__(self):
        super().__enter__()
        if begun and threading.current_thread() is threading.main_thread():
            begun.clear()
            signal.raise_signal(signal.SIGINT)

class Threading:
    Condition = Condition
    def __getattr__(self, name):
        return getattr(threading, name)

if __name__ == "__main__":
    begun = []
    _base.threading = Threading()
    tasks = ["1"] * 2 + ["__import__('time').sleep(0.2)"] * 9
    for result in map_in_order(eval, tasks, num_workers=2, threads=sys.argv[1] == "threads"):
        if result is None and not begun:
            begun.append(True)
"""


@pytest.mark.parametrize("workers", ["processes", "threads"])
def test_ctrl_c_at_the_worst_moment_ends_the_map(workers: str) -> None:
    """Ctrl-C right after the caller took a result's lock raises when the lock is free, so no worker waits for it."""
    command = [sys.executable, "-c", _AT_THE_WORST_MOMENT, workers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert done.returncode == -signal.SIGINT


def test_small_inputs_start_no_process() -> None:
    """Below some megabytes one process does the work; a number asked for is kept."""
    assert default_num_workers(100_000) == 1
    assert default_num_workers(1 << 30) >= 1
    assert resolve_num_workers(3, 10) == 3
    with pytest.raises(ValueError, match="num_workers: expected at least 1, found 0"):
        resolve_num_workers(0, 10)
