"""Settings that every test shares: one thread, and no test may depend on the state another one left."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

# Where Python may keep no bytecode, as in many containers, each process that a test starts would compile all of torch
# again, which takes longer than most tests do; it is kept beside pytest's own files, then.
if sys.dont_write_bytecode and sys.pycache_prefix is None:
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
os.environ.setdefault("WANDB_MODE", "offline")
# Without a device Triton runs our kernels in Python; it looks here when it is imported.
if not any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "kfd")):
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("UV_RUN_RECURSION_DEPTH", None)  # under `uv run pytest` commands would propose `uv run`, too
# Started in the background, the tests would ignore Ctrl-C, and so would each command that they send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And by `nohup` they would ignore the end of the terminal.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# What `pytest -m quick` runs, beside tests/: whole rooms and single files, in about two minutes.
QUICK = (
    "benchmarking/test_machine.py",
    "cli/test_export.py",
    "cli/test_infer.py",
    "cli/test_make_data.py",
    "cli/test_options.py",
    "config/test_errors.py",
    "config/test_extras.py",
    "config/test_io.py",
    "config/test_keys.py",
    "config/test_paths.py",
    "config/test_reference.py",
    "config/test_schemas.py",
    "config/test_suggest.py",
    "databuilder/test_hub.py",
    "databuilder/test_plain_text.py",
    "databuilder/test_sources.py",
    "checkpoints/test_document_ids.py",
    "token_files",
    "distributed",
    "evaluation",
    "experiments",
    "golden",
    "inference/fast/test_choice.py",
    "inference/fast/test_decoder.py",
    "inference/test_predictor.py",
    "inference/fast/test_packed_linear.py",
    "inference/test_sampling.py",
    "interop/test_llama.py",
    "interop/test_tiktoken_ranks.py",
    "interop/test_verify.py",
    "logger",
    "models/test_attention.py",
    "models/test_estimates.py",
    "models/test_kv_cache.py",
    "models/test_layers.py",
    "profiling",
    "released",
    "serving/test_api_schema.py",
    "serving/test_guard.py",
    "tokenizer/test_bpe_merge.py",
    "tokenizer/fast/test_byte_chunks.py",
    "tokenizer/test_engines.py",
    "tokenizer/test_io.py",
    "training/test_data.py",
    "training/test_loop.py",
    "training/test_loss.py",
    "training/planning/test_micro_batch.py",
    "training/test_optim.py",
    "training/planning/test_preflight.py",
    "training/test_schedule.py",
    "training/test_timetable.py",
    "utils/test_device.py",
    "utils/test_file_kinds.py",
    "utils/test_files.py",
    "utils/test_lock.py",
    "utils/test_text_files.py",
)


def is_quick(path: Path) -> bool:
    """Return whether a file of tests is among the quick ones."""
    place = path.relative_to(Path(__file__).parent).as_posix()
    return any(place == one or place.startswith(f"{one}/") for one in QUICK)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a file unread that `-m quick` or `-m gpu` would take nothing of.

    Importing them all takes as long as the quick tests do, and a machine with a GPU may lack libraries of other tests.
    """
    if not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    if config.option.markexpr == "quick":
        return True if not is_quick(collection_path) else None
    if config.option.markexpr == "gpu":
        return True if "mark.gpu" not in collection_path.read_text(encoding="utf-8") else None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests, before those that are not asked for are left out."""
    for item in items:
        takes_longer = any(marker.name in ("slow", "gpu", "browser") for marker in item.iter_markers())
        if is_quick(item.path) and not takes_longer:
            item.add_marker("quick")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Let Python look for garbage neither in what imports make, nor later in what they have made."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Seed torch and keep it on one thread, so that results do not depend on the machine's load."""
    import torch

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # that would note the whole stack three times, for devices that are not here
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _what_stays_is_done_once() -> Iterator[None]:
    """Let the trainings in these processes ask git and hash all source once, and wait for no disk: no power is cut."""
    from transformerlm.utils import environment

    root, ask = Path(__file__).resolve().parents[1], environment._git
    of_root = cache(lambda *arguments: ask(root, *arguments))

    def git(directory: Path, *arguments: str) -> str | None:
        try:
            is_root = directory.resolve() == root
        except OSError:
            is_root = False
        return of_root(*arguments) if is_root else ask(directory, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "_git", git)
        patch.setattr(environment, "source_sha256", cache(environment.source_sha256))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
