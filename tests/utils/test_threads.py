"""How threads wait is set once, before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from transformerlm.utils.threads import wait_politely

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Begin with an environment without these variables, and undo what the test sets."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", "1000")),
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
    ],
)
@pytest.mark.filterwarnings("ignore:wait_politely")  # torch is imported, in tests
def test_how_threads_wait_is_for_the_environment_to_say(given, expected, monkeypatch):
    """If the environment says nothing, they spin for a moment and then sleep."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_politely()
    assert tuple(map(os.environ.get, NAMES)) == expected


def test_before_torch_it_is_silent_and_after_it_warns():
    """Importing the function does not import torch; a program that calls it too late gets one warning."""
    program = "import sys, transformerlm as t; t.wait_politely(); assert 'torch' not in sys.modules; t.wait_politely()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    import torch  # noqa: F401

    with pytest.warns(UserWarning, match=r"torch is imported already.*torch\.set_num_threads\(1\)"):
        wait_politely()
    wait_politely()  # now the environment says it
