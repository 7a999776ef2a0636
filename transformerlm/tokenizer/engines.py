"""Which of the two engines does the work: the readable reference, or the compiled kernels with the same results.

`auto` takes the kernels when there is enough to do: numba has to be imported, and on the first use ever compiled, which
costs seconds. Where numba is missing or refuses, the reference does the work, and says so once where that is slow.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from config.extras import how_to_install

Engine = Literal["auto", "reference", "compiled"]
COMPILED_PATTERNS = ("gpt2", "cl100k")
"""The patterns that the kernels know (`compiled.PATTERNS`); text is cut by any other in the reference engine."""

# From how many bytes on the kernels pay: when they are loaded already, when they lie compiled on disk, and when not.
# Compiling takes some 8 s, in which the reference reads some 30 MB on two cores, but the next run finds them compiled.
LOADED_BYTES = 100_000
WARM_BYTES = 2_000_000
COLD_BYTES = 30_000_000
COMPILING_SECONDS = 2.0  # from then on a word is due

Work = Literal["encode", "decode", "train"]

_KERNELS = "transformerlm.tokenizer.fast.encode_kernels"
_LAST_COMPILED: dict[Work, str] = {
    "encode": "encode_kernels.encode_segments",
    "decode": "text_kernels.decode_ids",
    "train": "train_kernels.learn",
}
_ready: set[Work] = set()
_logger = logging.getLogger(__name__)


def check_engine(engine: str, *, pattern: str) -> None:
    """Refuse a name that is no engine, and the compiled one for a pattern that it does not know."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine: expected one of {', '.join(get_args(Engine))}, found {engine!r}")
    if engine == "compiled" and pattern not in COMPILED_PATTERNS:
        raise ValueError(f"engine: expected auto or reference with the pattern {pattern!r}, found {engine!r}")


def use_compiled(engine: str, num_bytes: int, work: Work) -> bool:
    """Tell whether the kernels should do a work on so many bytes.

    Raises:
        ImportError: the engine is "compiled", and numba is not there or refuses.
    """
    if engine == "reference":
        return False
    if engine == "compiled":
        if reason := _refusal():
            raise ImportError(f"engine: expected numba for the compiled one, found {reason}: {how_to_install('fast')}")
        return True
    if num_bytes < LOADED_BYTES or num_bytes < _smallest_input(work):
        return False
    if reason := _refusal():
        _say_once(f"the compiled tokenizer, some ten times as fast, is not used ({reason}): {how_to_install('fast')}")
        return False
    return True


@contextmanager
def compiling(work: Work) -> Iterator[None]:
    """Surround the first calls of the kernels for this work; say so if compiling them takes more than two seconds.

    Kernels that are read from the disk are not compiled, however slowly a busy machine reads them.
    """
    from numba.core import event

    timer = threading.Timer(
        COMPILING_SECONDS, _say_once, ["compiling the tokenizer's kernels, this once: it takes some ten seconds"]
    )
    timer.daemon = True

    class Compilation(event.Listener):
        def on_start(self, event: object) -> None:
            if timer.ident is None:
                timer.start()

        def on_end(self, event: object) -> None:
            pass

    try:
        with event.install_listener("numba:compile", Compilation()):
            yield
    finally:
        timer.cancel()
    _ready.add(work)


def _smallest_input(work: Work) -> int:
    if work in _ready:
        return LOADED_BYTES
    return WARM_BYTES if _is_kept(work) else COLD_BYTES


@cache
def _is_kept(work: Work) -> bool:
    """Tell whether the kernels for this work lie compiled where numba keeps them: beside their source, or elsewhere."""
    here = Path(__file__).parent / "fast"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    elsewhere = Path(os.environ.get("NUMBA_CACHE_DIR") or os.path.join(caches, "numba"))
    folders = [here / "__pycache__", *elsewhere.glob(f"{here.name}_*")]
    return any(path for folder in folders for path in folder.glob(_LAST_COMPILED[work] + "*.nbi"))


@cache
def _refusal() -> str:
    """Return why the kernels cannot be used, nothing if they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if sys.byteorder != "little":
        return "the machine's byte order is big-endian"
    try:
        importlib.import_module(_KERNELS)
    except Exception as error:  # numba raises many types: too new a Python or numpy, a broken llvmlite, a full disk
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


@cache
def _say_once(message: str) -> None:
    _logger.warning(message)
