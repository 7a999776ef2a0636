"""A run is found from each way to name it."""

from __future__ import annotations

import pytest

from transformerlm.checkpoints.naming import run_of


@pytest.mark.parametrize(
    "path", ["a", "a/best", "a/latest", "a/checkpoints", "a/checkpoints/best", "a/checkpoints/step-00000010"]
)
def test_each_name_of_a_run_means_the_run(path, tmp_path, monkeypatch):
    """Itself, its links, its checkpoints and one of them; nothing need be there."""
    monkeypatch.chdir(tmp_path)
    assert run_of(tmp_path / path) == tmp_path / "a"


def test_a_checkpoint_outside_of_a_run_is_itself(tmp_path):
    """As one that was copied elsewhere."""
    assert run_of(tmp_path / "copy") == tmp_path / "copy"
