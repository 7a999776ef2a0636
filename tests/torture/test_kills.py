"""A run that is killed at any moment goes on as if nothing had happened: the real trainer."""

from __future__ import annotations

import pytest

from tests.torture.kills import kill_again_and_again


@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(20, 1, id="20"), pytest.param(200, 2, id="200", marks=pytest.mark.slow)],
)
def test_kills_lose_nothing(kills, seed, real, real_reference, tmp_path, capsys):
    """After any number of kills no announced checkpoint is lost, and losses and weights are the undisturbed run's."""
    report = kill_again_and_again(real, tmp_path, kills=kills, seed=seed, reference=real_reference)
    with capsys.disabled():
        print(f" {report}", end=" ")
    assert report.findings == []
