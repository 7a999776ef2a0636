"""Which of the two engines does the work: the readable reference, or the compiled kernels with the same results.

`EncodingEngine` is what a tokenizer asks of either; `Engines` holds a tokenizer's two.

`auto` takes the kernels when there is enough to do: numba has to be imported, and on the very first use the kernels
have to be compiled, which takes seconds. Where numba is missing or cannot work, the reference does the work, and a
warning says so once where that is slow.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from config.extras import how_to_install
from transformerlm.tokenizer.reference import ReferenceEngine, Vocabulary

if TYPE_CHECKING:
    import numpy as np

    from transformerlm.tokenizer.fast.engine import CompiledEngine

Engine = Literal["auto", "reference", "compiled"]
COMPILED_PATTERNS = ("gpt2", "cl100k")
"""The patterns that the kernels know (`fast.encoder.PATTERNS`); the reference engine cuts text by any other."""

# From how many bytes on the kernels pay: when they are loaded, when they are on the disk compiled, and when neither.
# Compiling takes some 8 s, in which the reference reads some 30 MB on two cores, but the next run finds them compiled.
LOADED_BYTES = 100_000
WARM_BYTES = 2_000_000
COLD_BYTES = 30_000_000
COMPILING_SECONDS = 2.0  # whoever has waited this long is told why
# What the reference encodes, or decodes to ids, in the time that entering a kernel takes.
CALL_CHARS, CALL_IDS = 1000, 100

Work = Literal["encode", "decode", "train"]

_KERNELS = "transformerlm.tokenizer.fast.encode_kernels"
_LAST_COMPILED: dict[Work, str] = {
    "encode": "encode_kernels.encode_segments",
    "decode": "text_kernels.decode_ids",
    "train": "train_kernels.learn",
}
_ready: set[Work] = set()
_logger = logging.getLogger(__name__)


class EncodingEngine(Protocol):
    """What both engines do for a tokenizer; texts are whole characters (`utils.strings.whole_characters`).

    Without `allow_special`, special tokens are plain text. Arrays of ids are uint16 where all ids fit and uint32
    otherwise, shape `(tokens,)`; ends are int64, shape `(texts,)`.
    """

    takes_bytes: bool
    """Whether it reads files as bytes, and threads may share it; the other one holds the GIL."""

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Return the ids of one text."""

    def encode_batch(self, texts: Sequence[str], *, num_workers: int, allow_special: bool) -> list[list[int]]:
        """Return the ids of each text."""

    def encode_batch_to_array(
        self, texts: Sequence[str], *, num_workers: int, allow_special: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one array, and where those of each text end."""

    def encode_file(self, path: Path, *, num_workers: int) -> np.ndarray | None:
        """Return the ids of a plain text file; `None` where it has to be read as text."""

    def decode(self, ids: Iterable[int]) -> bytes | memoryview:
        """Return the bytes of the ids; raise KeyError for an unknown id, TypeError for what is no id."""


class Engines:
    """A tokenizer's engines: the reference from the beginning, the compiled one from when it pays."""

    def __init__(self, vocabulary: Vocabulary, engine: Engine) -> None:
        self.reference = ReferenceEngine(vocabulary)
        self._vocabulary, self._engine = vocabulary, engine
        self._compiled: CompiledEngine | None = None
        self._lock = threading.Lock()

    def for_text(self, num_bytes: int, *, least: int = 0) -> EncodingEngine:
        """Return the engine that should encode `num_bytes` of text; below `least` no kernel is worth its call."""
        known = self._vocabulary.pattern in COMPILED_PATTERNS
        if not known or not use_compiled(self._engine, num_bytes, "encode") or num_bytes < least:
            return self.reference
        return self.compiled("encode")

    def for_ids(self, num_ids: int) -> EncodingEngine:
        """Return the engine that should decode `num_ids` ids."""
        if not use_compiled(self._engine, 4 * num_ids, "decode") or num_ids < CALL_IDS:
            return self.reference
        return self.compiled("decode")

    def compiled(self, work: Literal["encode", "decode"]) -> CompiledEngine:
        """Return the compiled engine, loaded for this work."""
        from transformerlm.tokenizer.fast.engine import CompiledEngine  # hand-over

        with self._lock:
            if self._compiled is None:
                self._compiled = CompiledEngine(self._vocabulary)
            if not self._compiled.is_loaded(work):
                with compiling(work):
                    self._compiled.load(work)
        return self._compiled


def check_engine(engine: str, *, pattern: str) -> None:
    """Refuse a name that is not an engine, and the compiled one for a pattern that it does not know."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine: expected one of {', '.join(get_args(Engine))}, found {engine!r}")
    if engine == "compiled" and pattern not in COMPILED_PATTERNS:
        raise ValueError(f"engine: expected auto or reference with the pattern {pattern!r}, found {engine!r}")


def use_compiled(engine: str, num_bytes: int, work: Work) -> bool:
    """Return whether the kernels should do this work on `num_bytes` bytes.

    Raises:
        ImportError: the engine is "compiled", and numba is missing or cannot work.
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
    """Return whether numba has kept the kernels for this work: beside their source, or elsewhere."""
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
