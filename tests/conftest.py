"""Settings that every test shares: one thread, and no test may depend on the state another one left."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Seed torch and keep it on one thread, so that results do not depend on the machine's load."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
