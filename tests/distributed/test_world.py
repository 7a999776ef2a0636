"""What ranks tell each other: texts, errors, sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from transformerlm.distributed.world import World, gather_text, together


def _texts(world: World) -> tuple[list[str], list[str]]:
    return gather_text("\u00e9" * world.rank, world), gather_text("", world)


def _one_fails(world: World, folder: Path) -> str:
    try:
        with together(world):
            if world.rank == 1:
                raise OSError(28, "No space left on device", str(folder))
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_every_rank_gets_the_texts_of_all():
    """Texts of several lengths, the empty one too, arrive whole and in order."""
    expected = ["", "\u00e9", "\u00e9\u00e9"]
    assert run_ranks(_texts, 3) == [(expected, [""] * 3)] * 3


def test_one_ranks_error_is_everybodys(tmp_path):
    """The rank that fails raises its own error; the others say which rank it was."""
    found = run_ranks(_one_fails, 3, tmp_path)
    assert found[1] == f"OSError: [Errno 28] No space left on device: '{tmp_path}'"
    assert found[0] == found[2] == f"ValueError: rank 1 of 3: [Errno 28] No space left on device: '{tmp_path}'"


def test_a_world_of_one_talks_to_itself():
    """Nothing is sent; an error passes as it is."""
    assert gather_text("alone", World()) == ["alone"]
    with pytest.raises(ValueError, match="mine"), together(World()):
        raise ValueError("mine")
