"""Functions over arrays that numba compiles, called from Python without numba where their machine code is kept.

`Kernel` takes arrays, whole numbers, and named tuples of them; `Packed` takes a tuple apart once for many calls. Called
for the first time with arguments of some types, it reads the code for these types from the disk (`machine_code.py`), or
imports numba, compiles it and keeps it. Kernels that a kernel calls become part of its code.

What numba compiles has the calling convention of C: where to put the result, where to put an error, and then each
argument taken apart. An array is seven numbers or more: two that numba counts references with, 0 here, the number of
items, the size of one, the address, the shape and the strides. `ctypes` calls that, and gives up the GIL meanwhile.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, update_wrapper
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from transformerlm.utils.machine_code import (
    MachineCode,
    code_folder,
    environment_key,
    keep_code,
    load_code,
    may_be_read,
    read_code,
)

Call = Callable[[list[int]], int | None]
Listener = Callable[[str, bool], None]
"""Called with a kernel's name when it begins to be compiled, and again with True when it is."""

_compiling = threading.RLock()
_listeners: list[Listener] = []


@contextmanager
def told_of_compiling(listener: Listener) -> Iterator[None]:
    """Return a context in which the listener is told of each kernel that is compiled, not of those that are read."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def is_kept(source: Path, name: str) -> bool:
    """Return whether the code of a kernel of the folder `source`, named "module.function", is on the disk, to be read.

    Raises:
        ImportError: llvmlite is not installed.
        OSError: a file that cannot be looked at.
    """
    return any(may_be_read(path) for path in code_folder().glob(f"{name}-{environment_key(source)[:16]}-*"))


class Kernel:
    """A function that numba compiles; see above. Other kernels may call it, and there its types may be any of numba's.

    Called from Python, it returns a whole number or nothing, as its annotation says.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        """Take a function and the options for `numba.njit`."""
        update_wrapper(self, function)
        # numba looks for these two where it inlines a function.
        self.py_func, self.targetoptions = function, options
        module = sys.modules[function.__module__]
        self._source = Path(str(module.__file__)).parent
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._calls: dict[str, Call] = {}

    def __call__(self, *args: Any) -> int | None:
        """Run the compiled function.

        Raises:
            TypeError: an array that is read-only or has gaps, or an argument of another type.
        """
        numbers: list[int] = []
        types: list[str] = []
        _take_apart(args, numbers, types)
        form = " ".join(types)
        call = self._calls.get(form) or self._load(form, args, len(numbers))
        return call(numbers)

    @property
    def is_loaded(self) -> bool:
        """Whether it was called from Python before."""
        return bool(self._calls)

    @cached_property
    def dispatcher(self) -> Any:
        """The function as numba has it."""
        from numba import njit

        options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **self.targetoptions}
        return njit(**options)(self.py_func)

    @property
    def _numba_type_(self) -> Any:
        """What numba asks of a global that a kernel names."""
        return self.dispatcher._numba_type_

    def _load(self, form: str, args: tuple[Any, ...], num_numbers: int) -> Call:
        with _compiling:
            if form in self._calls:
                return self._calls[form]
            environment = environment_key(self._source)
            key = hashlib.sha256(f"{environment} {self._name} {form}".encode()).hexdigest()
            path = code_folder() / f"{self._name}-{environment[:16]}-{key[:16]}.code"
            code = read_code(path, key)
            if code is None:
                code = self._compile(args)
                keep_code(path, key, code)
            returns = self.py_func.__annotations__["return"]
            self._calls[form] = _callable(load_code(code), num_numbers, name=self._name, returns=returns)
            return self._calls[form]

    def _compile(self, args: tuple[Any, ...]) -> MachineCode:
        import numba

        typeof: Any = numba.typeof
        values = [arg.values if isinstance(arg, Packed) else arg for arg in args]
        signature = tuple(numba.types.int64 if isinstance(value, int) else typeof(value) for value in values)
        for listener in _listeners:
            listener(self._name, False)
        try:
            self.dispatcher.compile(signature)
        finally:
            for listener in _listeners:
                listener(self._name, True)
        result = self.dispatcher.overloads[signature]
        return MachineCode(result.fndesc.llvm_func_name, result.library._get_compiled_object())


class Packed:
    """A named tuple, taken apart for kernels once and for all: its arrays must stay where they are.

    Raises TypeError as `Kernel` does.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self.numbers: list[int] = []
        types: list[str] = []
        _take_apart((values,), self.numbers, types)
        self.form = " ".join(types)


class Instruction:
    """A function that numba's `intrinsic` made, for kernels to name; outside of compiled code it is no function.

    `load` imports its module, and with it numba, when such a kernel is compiled.
    """

    def __init__(self, load: Callable[[], ModuleType], name: str) -> None:
        self._load, self._name = load, name

    def __call__(self, *args: Any) -> Any:
        """Raise TypeError."""
        raise TypeError(f"{self._name}: only compiled kernels can use it")

    @property
    def _numba_type_(self) -> Any:
        from numba.core.registry import cpu_target

        instructions = self._load()
        cpu_target.typing_context.refresh()  # numba has noted the instructions, but not looked at its notes
        return cpu_target.typing_context.resolve_value_type(getattr(instructions, self._name))


def _take_apart(args: Iterable[Any], numbers: list[int], types: list[str]) -> None:
    """Write arguments as the numbers that the compiled function takes, and their types."""
    for arg in args:
        if isinstance(arg, np.ndarray):
            facts = arg.__array_interface__
            address, is_read_only = facts["data"]
            if is_read_only or facts["strides"] is not None:
                found = "a read-only one" if is_read_only else f"one with strides {arg.strides}"
                raise TypeError(f"expected an array without gaps that may be written, found {found}")
            types.append(f"{facts['typestr']}{arg.ndim}")
            numbers += 0, 0, arg.size, arg.itemsize, address, *arg.shape, *arg.strides
        elif type(arg) is Packed:
            types.append(arg.form)
            numbers += arg.numbers
        elif isinstance(arg, tuple):
            types.append("(")
            _take_apart(arg, numbers, types)
            types.append(")")
        elif type(arg) in (int, np.int64, np.uint64):
            types.append("u" if type(arg) is np.uint64 else "i")
            numbers.append(int(arg))
        else:
            raise TypeError(f"expected arrays, whole numbers of 64 bits and tuples of them, found {type(arg).__name__}")


def _callable(address: int, num_numbers: int, *, name: str, returns: str) -> Call:
    if returns not in ("int", "None"):
        raise TypeError(f"{name}: expected a kernel that returns int or None, found {returns}")
    given = [ctypes.c_int64] * num_numbers
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *given)(address)

    def call(numbers: list[int]) -> int | None:
        result, error = ctypes.c_int64(), ctypes.c_void_p()
        if status := function(ctypes.byref(result), ctypes.byref(error), *numbers):
            raise RuntimeError(f"{name} failed with {status}")
        return result.value if returns == "int" else None

    return call
