"""Settings that every test shares: one thread, and no test may depend on the state another one left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

# Where Python may keep no bytecode, as in many containers, each process that a test starts would compile all of torch
# again, which takes longer than most tests do; it is kept beside pytest's own files, then.
if sys.dont_write_bytecode and sys.pycache_prefix is None:
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
os.environ.setdefault("WANDB_MODE", "offline")
# Started in the background, the tests would ignore Ctrl-C, and so would each command that they send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Seed torch and keep it on one thread, so that results do not depend on the machine's load."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
