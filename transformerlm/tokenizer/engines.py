"""Which of the two engines does the work: the readable reference, or the compiled kernels with the same results.

`EncodingEngine` is what a tokenizer asks of either; `Engines` holds a tokenizer's two.

`auto` takes the kernels when there is enough to do: they have to be loaded, and on the very first use numba has to be
imported to compile them, which takes seconds. Where numba is missing or cannot work, the reference does the work, and a
warning says so once where that is slow.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from config.extras import how_to_install
from transformerlm.tokenizer.reference import ReferenceEngine, Vocabulary
from transformerlm.utils.kernel import is_kept, told_of_compiling

if TYPE_CHECKING:
    import numpy as np

    from transformerlm.tokenizer.fast.engine import CompiledEngine

Engine = Literal["auto", "reference", "compiled"]
COMPILED_PATTERNS = ("gpt2", "cl100k", "llama3", "qwen2")
"""The patterns that the kernels know (`fast.encoder.PATTERNS`); the reference engine cuts text by any other."""

# From how many bytes on the kernels pay: when they are loaded, when they are on the disk compiled, and when neither.
# Compiling takes some 8 s, in which the reference reads some 30 MB on two cores, but the next run finds them compiled.
LOADED_BYTES = 100_000
WARM_BYTES = 500_000
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
    """What both engines do for a tokenizer; half a character in a text is as in `utils.strings.whole_characters`.

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
        if reason := _refusal(work):
            raise ImportError(f"engine: expected numba for the compiled one, found {reason}: {how_to_install('fast')}")
        return True
    least = LOADED_BYTES if work in _ready else WARM_BYTES  # a smaller input is not worth a look at the disk
    if num_bytes < least or (work not in _ready and num_bytes < COLD_BYTES and not _is_kept(work)):
        return False
    if reason := _refusal(work):
        _say_once(f"the compiled tokenizer, some ten times as fast, is not used ({reason}): {how_to_install('fast')}")
        return False
    return True


@contextmanager
def compiling(work: Work) -> Iterator[None]:
    """Surround the first calls of the kernels for this work; say so if compiling them takes more than two seconds.

    Kernels that are read from the disk are not compiled, however slowly a busy machine reads them.
    """
    timer = threading.Timer(
        COMPILING_SECONDS, _say_once, ["compiling the tokenizer's kernels, this once: it takes some ten seconds"]
    )
    timer.daemon = True

    def start(name: str, is_done: bool) -> None:
        if timer.ident is None:
            timer.start()

    try:
        with told_of_compiling(start):
            yield
    finally:
        timer.cancel()
    _ready.add(work)


@cache
def _is_kept(work: Work) -> bool:
    """Return whether the kernels for this work are on the disk, compiled."""
    try:
        return is_kept(Path(__file__).parent / "fast", _LAST_COMPILED[work])
    except (ImportError, OSError):  # `_refusal` says why
        return False


@cache
def _refusal(work: Work) -> str:
    """Return why the kernels cannot be used, nothing if they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return f"the machine is {sys.byteorder}-endian with {sys.maxsize.bit_length() + 1} bits"
    try:
        importlib.import_module(_KERNELS)
        if not _is_kept(work) and importlib.import_module("numba").config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
    except Exception as error:  # numba raises many types: too new a Python or numpy, a broken llvmlite, a full disk
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


@cache
def _say_once(message: str) -> None:
    _logger.warning(message)
