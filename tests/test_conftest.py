"""`pytest -m quick`: a choice of cheap tests that touches each room, without those that are slow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import QUICK, pytest_ignore_collect

HERE = Path(__file__).parent


def test_each_room_has_quick_tests_and_each_name_is_there():
    """A room of the product is tested in the quick choice; a file that was renamed is not lost from it unseen."""
    rooms = {path.name for path in HERE.iterdir() if path.is_dir() and (HERE.parent / path.name).is_dir()}
    rooms |= {path.name for path in HERE.iterdir() if (HERE.parent / "transformerlm" / path.name).is_dir()}
    assert {name.split("/")[0] for name in QUICK} >= rooms - {"__pycache__"} >= {"cli", "models"}
    assert [name for name in QUICK if not (HERE / name).exists()] == []


@pytest.mark.parametrize(
    ("name", "expression", "is_read"),
    [
        ("profiling/test_nvtx.py", "quick", True),
        ("torture/test_toy.py", "quick", False),
        ("torture/test_toy.py", "not slow and not gpu", True),
        ("torture/toy_trainer.py", "quick", True),  # no file of tests
    ],
)
def test_a_quick_run_does_not_read_other_files(name, expression, is_read):
    """To import all files takes as long as the quick tests do, so `-m quick` leaves the others unread."""
    config = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
    assert pytest_ignore_collect(HERE / name, config) is (None if is_read else True)


def test_no_test_is_quick_and_slow(request):
    """Of the tests collected with this one, none that is slow or needs a GPU is marked quick."""
    marks = [{mark.name for mark in item.iter_markers()} for item in request.session.items]
    assert [mark for mark in marks if "quick" in mark and mark & {"slow", "gpu"}] == []
