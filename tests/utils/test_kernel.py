"""Behaviour of compiled functions: one process compiles them, the next ones call them without numba."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from transformerlm.utils.kernel import Instruction, Kernel, Packed, told_of_compiling

pytest.importorskip("numba")

MODULE = """
from __future__ import annotations
from typing import Any, NamedTuple
import sys
import numpy as np
from transformerlm.utils.kernel import Instruction, Kernel, Packed, told_of_compiling

class Table(NamedTuple):
    rows: Any
    shift: Any

def kernel(function):
    return Kernel(function, nogil=True, _nrt=False)

@kernel
def part(value):
    return value * 2.5

@kernel
def total(rows: Any, table: Table, more: int) -> int:
    result = 0
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            result += rows[row, column]
    table.rows[0] = part(result) + more
    return result << np.int64(table.shift)

rows, table = np.arange(6, dtype=np.int32).reshape(2, 3), Table(np.zeros(1), np.uint64(2))
result = total(rows[1:], table, -1)
print(result, table.rows[0], "numba" in sys.modules)
"""


def test_code_that_is_kept_runs_without_numba(tmp_path: Path) -> None:
    """The second process gets the same result without numba; where the file is damaged, the third compiles again."""
    (tmp_path / "module.py").write_text(MODULE)
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path / "kept"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def run() -> list[str]:
        command = [sys.executable, "module.py"]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )  # fmt: skip
        return result.stdout.split()

    assert run() == ["48", "29.0", "True"]
    assert run() == ["48", "29.0", "False"]
    (file,) = (tmp_path / "kept" / "transformerlm").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert run() == ["48", "29.0", "True"]


def _nothing(array: np.ndarray) -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    "wrong", [np.zeros(4)[::2], np.broadcast_to(np.zeros(1), (3,)), True, 1.0, np.int32(1), "a", None]
)
def test_what_compiled_code_would_misread_is_refused(wrong: object) -> None:
    """Arrays with gaps, arrays that may not be written and other types of numbers never reach machine code."""
    with pytest.raises(TypeError, match="expected"):
        Kernel(_nothing)(wrong)


def test_a_result_that_is_no_whole_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose annotation promises something else cannot be called from Python."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(_nothing.__annotations__, "return", "float")
    with pytest.raises(TypeError, match="returns int or None, found float"):
        Kernel(_nothing)(np.zeros(1))


def test_a_tuple_that_is_taken_apart_before_gives_the_same() -> None:
    """A kernel finds what the arrays hold when it is called; an array with gaps is refused when it is packed."""

    class Numbers(NamedTuple):
        rows: Any
        shift: int

    def total(numbers: Any, more: int) -> int:
        result = more
        for row in range(len(numbers.rows)):
            result += numbers.rows[row] << numbers.shift
        return result

    total.__annotations__["return"] = "int"
    kernel, rows = Kernel(total, _nrt=False), np.arange(4)
    packed = Packed(Numbers(rows, 1))
    assert kernel(packed, 5) == kernel(Numbers(rows, 1), 5) == 17
    rows[0] = 10
    assert kernel(packed, 5) == 37
    with pytest.raises(TypeError, match="array without gaps"):
        Packed(Numbers(rows[::2], 1))


def test_an_instruction_is_none_of_python() -> None:
    """Outside of compiled code it can do nothing."""
    with pytest.raises(TypeError, match="fetch: only compiled kernels can use it"):
        Instruction(lambda: sys, "fetch")(np.arange(3), 0)


def test_a_listener_hears_of_the_end_of_what_cannot_be_compiled() -> None:
    """The line that says what is compiled does not stay."""

    def broken(rows: Any) -> None:
        rows.nothing_of_that_name()

    broken.__annotations__["return"] = "None"
    heard: list[bool] = []
    kernel = Kernel(broken, _nrt=False)
    with told_of_compiling(lambda _, is_done: heard.append(is_done)), pytest.raises(Exception, match="nothing_of_that"):
        kernel(np.arange(3))
    assert heard == [False, True]
    assert not kernel.is_loaded
