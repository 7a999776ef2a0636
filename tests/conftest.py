"""Settings that every test shares: one thread, and no test may depend on the state another one left."""

from __future__ import annotations

import os
import signal

import pytest

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
