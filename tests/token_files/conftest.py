"""What the tests of token files share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing wait for the disk: no test here cuts the power, and hundreds of small files would take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
