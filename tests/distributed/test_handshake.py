"""Ranks that would not train the same run say so, with both values; nothing of the question stays behind."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from transformerlm.distributed import handshake
from transformerlm.distributed.handshake import difference, sampled, shared_directory
from transformerlm.distributed.world import World

BEGIN = "the ranks would not train the same run: "


def _ask_all(world: World, first: Path, second: Path, nowhere: Path) -> dict[str, str | None]:
    """Ask each question in one world: two ranks agree, the third differs, or all of them do."""
    is_odd = world.rank == 2
    facts = {"training.max_steps": "10", "data.train: sha256": "ab"}
    counted = {f"key {number}": str(world.rank) for number in range(9)}
    step = lambda: "none" if is_odd else "step 4"  # noqa: E731
    found = {
        "same facts": difference(facts, world),
        "odd fact": difference(facts | ({"training.max_steps": "20"} if is_odd else {}), world),
        "missing fact": difference({"training.max_steps": "10"} if is_odd else facts, world),
        "nine facts": difference(counted, world),
        "shown late": shared_directory(first, world, look=_Late(world)),
    }
    handshake.LATE_SECONDS = 0.3
    found |= {
        "same directory": shared_directory(first, world, look=lambda: "step 4"),
        "another directory": shared_directory(second if is_odd else first, world, look=lambda: "step 4"),
        "no directory": shared_directory(nowhere if is_odd else first, world, look=lambda: "step 4"),
        "another checkpoint": shared_directory(first, world, look=step),
    }
    return {name: line and line.replace(world.hosts[0], "HOST") for name, line in found.items()}


class _Late:
    """A directory as over NFS: what another machine has written is invisible for a moment."""

    def __init__(self, world: World) -> None:
        self._is_here, self._looks = world.rank == 0, 0

    def __call__(self) -> str:
        self._looks += 1
        return "step 4" if self._is_here or self._looks > 2 else "none"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two directories that exist and one that does not."""
    home = tmp_path_factory.mktemp("shared")
    for name in "ab":
        (home / name).mkdir()
    return home / "a", home / "b", home / "c"


@pytest.fixture(scope="module")
def answers(directories: tuple[Path, Path, Path]) -> dict[str, str | None]:
    """What three ranks answer, who all give the same answers."""
    answers = run_ranks(_ask_all, 3, *directories)
    assert answers[0] == answers[1] == answers[2]
    return answers[0]


def test_a_difference_names_fact_ranks_machines_and_values(answers):
    """Equal facts say nothing; others say which rank has what, in a line that stays short."""
    assert answers["same facts"] is None
    odd = "training.max_steps is 10 on rank 0 on HOST, but 20 on rank 2 of 3 on HOST"
    assert answers["odd fact"] == BEGIN + odd
    missing = "data.train: sha256 is ab on rank 0 on HOST, but not there on rank 2 of 3 on HOST"
    assert answers["missing fact"] == BEGIN + missing
    assert answers["nine facts"].count("key ") == 4
    assert answers["nine facts"].endswith("; and 14 more differences")


def test_a_directory_that_is_not_shared_is_noticed(answers, directories):
    """A rank that looks into another directory, or into none, is told from those that share rank 0's."""
    first, second, nowhere = directories
    assert answers["same directory"] is None
    for name, other in (("another directory", second), ("no directory", nowhere)):
        place = f"the run's directory is {first} on rank 0 on HOST, but {other}, without the file that rank 0 wrote, on"
        assert answers[name] == f"{BEGIN}{place} rank 2 of 3 on HOST"
    checkpoint = "its newest checkpoint is step 4 on rank 0 on HOST, but none on rank 2 of 3 on HOST"
    assert answers["another checkpoint"] == BEGIN + checkpoint
    assert [list(folder.iterdir()) for folder in (first, second)] == [[], []]
    assert not nowhere.exists()


def test_a_shared_directory_may_show_a_change_late(answers):
    """What another machine has just written may be invisible for a moment, which is no difference."""
    assert answers["shown late"] is None


def test_blocks_tell_files_apart(tmp_path):
    """Another size, and a change in the first, the last or a middle block of a large file, are seen; no whole read."""
    path = tmp_path / "train.npy"
    size = 2**24
    path.write_bytes(bytes(size))
    before = sampled([path])
    assert before["bytes"] == f"{size:,}"
    for place in (0, size - 1, (size - 4096) // 32 * 7):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        assert sampled([path]) != before, place
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert sampled([path]) == before
    path.write_bytes(bytes(size - 1))
    assert sampled([path]) != before


@pytest.mark.parametrize("count", [1, 2, 16, 17, 400])
def test_of_many_files_a_few_are_read(count, tmp_path, monkeypatch):
    """However many shards there are, at most 16 files are read, the first and the last among them."""
    paths = [tmp_path / f"{number:05d}.npy" for number in range(count)]
    for path in paths:
        path.write_bytes(path.name.encode() * 3)
    opened, read = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: opened.append(path) or read(path, mode))
    facts = sampled(paths)
    assert len(opened) == min(count, 16)
    assert {paths[0], paths[-1]} <= set(opened)
    assert facts["files"] == str(count)
    assert facts["sampled sha256"] != hashlib.sha256().hexdigest()[:16]
