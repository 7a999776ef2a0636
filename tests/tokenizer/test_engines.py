"""Behaviour of choosing an engine: nothing is compiled for small work, and without numba the reference takes over."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.extras import how_to_install
from transformerlm.tokenizer import Tokenizer, engines, train_bpe
from transformerlm.utils.kernel import Kernel
from transformerlm.utils.machine_code import environment_key

BYTES = {value: bytes([value]) for value in range(256)}


def _doubled(number: int) -> int:
    return 2 * number


@pytest.fixture
def _no_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    for cached in (engines._refusal, engines._say_once):
        cached.cache_clear()
    yield
    for cached in (engines._refusal, engines._say_once):
        cached.cache_clear()


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    """The message lists the known engines, in both places where an engine is named."""
    (tmp_path / "a.txt").write_text("a b")
    with pytest.raises(ValueError, match="engine: expected one of auto, reference, compiled, found 'rust'"):
        Tokenizer(BYTES, [], engine="rust")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="engine: expected one of"):
        train_bpe(tmp_path / "a.txt", 300, [], engine="rust")  # type: ignore[arg-type]


@pytest.mark.usefixtures("_no_numba")
def test_without_numba_the_reference_takes_over_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """A large input gets one warning, a small one none; asking for the compiled engine is an error."""
    assert not engines.use_compiled("auto", 1000, "encode")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert not engines.use_compiled("auto", 10**9, "encode")
        assert not engines.use_compiled("auto", 10**9, "encode")
    assert [record.message for record in caplog.records] == [
        "the compiled tokenizer, some ten times as fast, is not used (numba is not installed): "
        + how_to_install("fast")
    ]
    with pytest.raises(ImportError, match=r"found numba is not installed: in the clone, pip install "):
        Tokenizer(BYTES, [], engine="compiled").encode("a")


def test_without_numbas_compiler_the_reference_takes_over() -> None:
    """With NUMBA_DISABLE_JIT set, which debugging asks for, `auto` takes the reference and says why."""
    pytest.importorskip("numba")
    script = (
        "from transformerlm.tokenizer import engines;"
        "print([engines.use_compiled('auto', 10**9, work) for work in ('encode', 'decode', 'train')])"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "[False, False, False]\n"
    assert "is not used (NUMBA_DISABLE_JIT is set)" in result.stderr


def test_small_work_does_not_import_numba(tmp_path: Path) -> None:
    """Training on 100 kB, encoding and decoding them does not import numba."""
    script = (
        "import sys; from transformerlm.tokenizer import Tokenizer, train_bpe;"
        "text = 'one two three ' * 7000; open('a.txt', 'w').write(text);"
        "vocab, merges = train_bpe('a.txt', 300, []); tokenizer = Tokenizer(vocab, merges);"
        "assert tokenizer.decode(tokenizer.encode_to_array(text)) == text; print('numba' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


def test_kernels_that_are_kept_elsewhere_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compiled into NUMBA_CACHE_DIR count as compiled, so that 0.5 MB take them; other versions do not."""
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    assert not engines._is_kept.__wrapped__("encode")
    folder = tmp_path / "kept" / "transformerlm"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "encode_kernels.encode_segments-0123456789abcdef-0.code").touch(mode=0o600)
    assert not engines._is_kept.__wrapped__("encode")
    key = environment_key(Path(engines.__file__).parent / "fast")
    (folder / f"encode_kernels.encode_segments-{key[:16]}-0.code").touch(mode=0o600)
    assert engines._is_kept.__wrapped__("encode")
    assert not engines._is_kept.__wrapped__("train")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_kernels_that_would_not_be_loaded_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would compile again what others may write, so such code is no reason to take the kernels."""
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    key = environment_key(Path(engines.__file__).parent / "fast")
    kept = tmp_path / "transformerlm" / f"encode_kernels.encode_segments-{key[:16]}-0.code"
    kept.parent.mkdir(mode=0o700)
    kept.touch(mode=0o600)
    for path in (kept, kept.parent):
        before = path.stat().st_mode
        path.chmod(before | 0o020)
        assert not engines._is_kept.__wrapped__("encode")
        path.chmod(before)
        assert engines._is_kept.__wrapped__("encode")


def test_kept_kernels_encode_without_numba() -> None:
    """A process that finds the kernels compiled encodes with them, and does not import numba."""
    pytest.importorskip("numba")
    text = "one two three " * 1000
    ids = Tokenizer(BYTES, [], engine="compiled").encode(text)
    script = (
        "import sys; from transformerlm.tokenizer import Tokenizer;"
        "tokenizer = Tokenizer({v: bytes([v]) for v in range(256)}, [], engine='compiled');"
        "ids = tokenizer.encode('one two three ' * 1000); print(len(ids), sum(ids), 'numba' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(len(ids)), str(sum(ids)), "False"]


@pytest.mark.parametrize(("compiles", "said"), [(True, 1), (False, 0)])
def test_compiling_is_said_only_where_something_is_compiled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiles: bool, said: int
) -> None:
    """Kernels that are compiled, or slow to read, cause no line that announces ten seconds."""
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(engines, "COMPILING_SECONDS", 0)
    engines._say_once.cache_clear()
    if not compiles:
        Kernel(_doubled)(1)
    double = Kernel(_doubled)
    spoken = threading.Event()
    monkeypatch.setattr(engines._logger, "warning", lambda message: (caplog.records.append(message), spoken.set()))
    with engines.compiling("encode"):
        assert double(1) == 2
        if compiles:
            assert spoken.wait(60)
    assert len(caplog.records) == said
    engines._say_once.cache_clear()


@pytest.mark.slow
def test_an_install_that_cannot_be_written_works(tmp_path: Path) -> None:
    """Where machine code cannot be written anywhere, kernels are compiled for the process; nothing fails."""
    pytest.importorskip("numba")
    package = tmp_path / "transformerlm"
    package.mkdir()
    source = Path(engines.__file__).parents[1]
    for room in ("tokenizer", "utils"):
        shutil.copytree(source / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    script = (
        "from transformerlm.tokenizer import Tokenizer, tokenizer; print(tokenizer.__file__);"
        "print(Tokenizer({v: bytes([v]) for v in range(256)}, [], engine='compiled').encode('ab'))"
    )
    environment = {**os.environ, "HOME": "/dev/null", "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": "/dev/null"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [str(package / "tokenizer" / "tokenizer.py"), "[97, 98]"]
