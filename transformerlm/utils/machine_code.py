"""Machine code of compiled functions: kept on disk, and loaded without the compiler that made it.

numba takes a second to import and to read what it kept. What it compiles is an object file, which llvmlite's linker,
the one that numba itself uses, loads within milliseconds.

Code is read only from a file that belongs to this user or to root, that nobody else may write, that is in such a
folder, and whose checksum is right. The folder is `$XDG_CACHE_HOME/transformerlm/machine_code` (else `~/.cache`), or
`$NUMBA_CACHE_DIR/transformerlm`. Where nothing can be kept, each process compiles: losing a file costs time only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import stat
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FORMAT = b"transformerlm machine code 1"
_LONGEST_LINE, _MOST_BYTES = 1 << 16, 1 << 26
_KEPT_SECONDS = 90 * 86400  # code that nobody has read for that long is deleted
_engines: list[Any] = []  # code stays loaded as long as these are there


@dataclass(frozen=True)
class MachineCode:
    """An object file, and the name of the function in it."""

    symbol: str
    code: bytes


def code_folder() -> Path:
    """Return where code is kept."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen) / "transformerlm"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # nobody knows where this user is at home: below a file nothing can be kept
        home = os.devnull
    return Path(home) / "transformerlm" / "machine_code"


@cache
def environment_key(source: Path) -> str:
    """Return a sha256 in hex of all that code depends on: the files of the folder `source`, the compiler, the machine.

    Raises:
        ImportError: llvmlite is not installed.
        OSError: a file that cannot be read.
    """
    import llvmlite.binding as llvm  # type: ignore[import-untyped]

    digest = hashlib.sha256(_FORMAT)
    facts = [
        sys.version,
        platform.machine(),
        *(importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")),
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        *sorted(
            f"{name}={os.environ[name]}" for name in os.environ if name.startswith("NUMBA_") and "CACHE" not in name
        ),
    ]
    here = Path(__file__)
    for path in [here, here.with_name("kernel.py"), *sorted(source.glob("*.py"))]:
        facts.append(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    digest.update("\n".join(facts).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_code(path: Path, key: str) -> MachineCode | None:
    """Return the code that a file keeps under this key; `None` where there is none that may be run."""
    try:
        if not may_be_read(path):
            return None
        with path.open("rb") as file:
            form, found, checksum, symbol = (file.readline(_LONGEST_LINE).removesuffix(b"\n") for _ in range(4))
            code = file.read(_MOST_BYTES)
    except OSError:
        return None
    if form != _FORMAT or found != key.encode() or checksum != _checksum(found, symbol, code):
        return None
    with suppress(OSError):
        os.utime(path)  # it is in use
    return MachineCode(symbol.decode(), code)


def may_be_read(path: Path) -> bool:
    """Return whether code may be read from a file, which only this user or root can have written, and its folder, too.

    Raises:
        OSError: there is no such file.
    """
    return _is_trusted(path.parent) and _is_trusted(path) and os.access(path, os.R_OK)


def keep_code(path: Path, key: str, code: MachineCode) -> None:
    """Write code to a file, whole or not at all; what cannot be written is compiled again by the next process."""
    symbol = code.symbol.encode()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(b"\n".join([_FORMAT, key.encode(), _checksum(key.encode(), symbol, code.code), symbol, b""]))
            file.write(code.code)
        unfinished.replace(path)
        _delete_old(path.parent)
    with suppress(OSError):
        unfinished.unlink(missing_ok=True)


def can_keep() -> bool:
    """Return whether files can be written where code is kept, and may be read from there.

    Raises:
        OSError: a folder that cannot be looked at.
    """
    folder = code_folder()
    if folder.exists() and not _is_trusted(folder):
        return False
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def load_code(code: MachineCode) -> int:
    """Return the address of the function, which stays loaded.

    Raises:
        RuntimeError: the linker refuses the code.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code.code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(code.symbol)
    if not address:
        raise RuntimeError(f"the machine code has no function {code.symbol}")
    return address


def _checksum(key: bytes, symbol: bytes, code: bytes) -> bytes:
    return hashlib.sha256(b"\n".join([key, symbol, code])).hexdigest().encode()


def _is_trusted(path: Path) -> bool:
    """Return whether a file or folder is one that only this user, or root, can have written."""
    facts = path.stat()
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        return False
    # Windows keeps each user's profile from the others, and has neither of these.
    return os.name == "nt" or (facts.st_uid in (0, os.getuid()) and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _delete_old(folder: Path) -> None:
    for path in folder.iterdir():
        if ".code" in path.name and path.stat().st_mtime < time.time() - _KEPT_SECONDS:
            path.unlink()
