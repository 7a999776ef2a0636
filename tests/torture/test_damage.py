"""A flipped bit, a cut, a zeroed page or a missing file is noticed and named before anything is trained on it."""

from __future__ import annotations

import pytest

from tests.torture.damage import STEPS, cases, damage_and_resume, files_of, prepare
from tests.torture.harness import Run


@pytest.fixture(scope="session")
def undisturbed(real, tmp_path_factory):
    """The run that a damaged one must become equal to."""
    run = Run(real, tmp_path_factory.mktemp("undisturbed"))
    assert run.finish(f"--training.max_steps={STEPS}", "--schedule.name=constant") == []
    return run


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damage_is_noticed(every, real, undisturbed, tmp_path):
    """For every file of the newest checkpoint the one before it is used; for every data file the run is refused."""
    prepared = prepare(real, tmp_path / "prepared")
    assert len(files_of(prepared)) > 10
    findings = [
        finding
        for seed in range(3 if every else 1)
        for path, damage in cases(prepared, every=every)
        for finding in damage_and_resume(prepared, tmp_path / "case", path, damage, seed=seed, reference=undisturbed)
    ]
    assert not findings, "\n".join(map(str, findings))
