"""The lines of a run are read as they come, each once, over resumes and torn ends."""

from __future__ import annotations

import pytest

from tests.experiments.runs import FINISHED, STARTED, lines, step, write_run
from transformerlm.experiments.following import FollowedRun
from transformerlm.utils.lock import DirectoryLock


def texts(found) -> list[int]:
    """Return the steps of lines."""
    return [record["step"] for _, record in found]


def test_each_line_comes_once(tmp_path):
    """A line that is half written comes when it is whole."""
    directory = write_run(tmp_path, "a", STARTED, step(1, 5.0))
    follower, path = FollowedRun(directory), directory / "metrics.jsonl"
    assert texts(follower.new()) == [0, 1]
    assert follower.new() == []
    text = lines([step(2, 4.0), step(3, 3.0)])
    with path.open("a") as file:
        file.write(text[:-10])
    assert texts(follower.new()) == [2]
    with path.open("a") as file:
        file.write(text[-10:])
    assert texts(follower.new()) == [3]
    assert follower.losses == [5.0, 4.0, 3.0]


def test_a_resume_replaces_the_file(tmp_path):
    """Steps that are made again come again, those before do not, and the curve has each step once."""
    directory = write_run(tmp_path, "a", STARTED, step(1, 5.0), step(2, 4.0), step(3, 3.5))
    follower, path = FollowedRun(directory), directory / "metrics.jsonl"
    follower.new()
    again = directory / "metrics.jsonl.tmp"
    again.write_text(lines([STARTED, step(1, 5.0), step(2, 4.0), {"event": "resumed", "step": 2}, step(3, 3.4)]))
    again.replace(path)
    found = follower.new()
    assert [record.get("event", record["step"]) for _, record in found] == ["resumed", 3]
    assert follower.losses == [5.0, 4.0, 3.4]


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_second_resume_from_one_step_comes_too(is_replaced, tmp_path):
    """Its line is equal to that of the first one, letter by letter."""
    resumed = {"event": "resumed", "step": 2}
    before = [STARTED, step(1, 5.0), step(2, 4.0), resumed]
    directory = write_run(tmp_path, "a", *before, *[step(3, 3.5)] * is_replaced)
    follower, path = FollowedRun(directory), directory / "metrics.jsonl"
    follower.new()
    again = directory / "metrics.jsonl.tmp"
    if is_replaced:
        again.write_text(lines([*before, resumed]))
        again.replace(path)
    else:
        with path.open("a") as file:
            file.write(lines([resumed]))
    assert [record for _, record in follower.new()] == [resumed]
    assert follower.new() == []


def test_the_remaining_time_is_that_at_the_last_speed(tmp_path):
    """Steps that are left, times tokens a step, by tokens a second; without these it is not known."""
    started = STARTED | {"tokens_per_step": 64, "max_steps": 51}
    follower = FollowedRun(write_run(tmp_path, "a", started, step(1, 5.0)))
    assert follower.eta_seconds() is None
    follower.new()
    assert 30 < follower.eta_seconds() <= 32
    follower = FollowedRun(write_run(tmp_path, "b", STARTED | {"max_steps": "x"}, step(1, "nan")))
    follower.new()
    assert follower.eta_seconds() is None
    assert str(follower.losses) == "[nan]"


def test_a_run_has_ended_when_nobody_holds_it_or_it_says_so(tmp_path):
    """A training that draws its picture at the end holds it, but writes no more lines."""
    directory = write_run(tmp_path, "a", STARTED, step(1, 5.0))
    follower = FollowedRun(directory)
    assert follower.has_ended()
    with DirectoryLock(directory):
        follower.new()
        assert not follower.has_ended()
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(lines([FINISHED]))
        follower.new()
        assert follower.has_ended()
    assert follower.state() == "finished"


def test_a_run_that_is_being_resumed_has_not_ended(tmp_path):
    """Until it is prepared its lines tell of the end before, and its first line may come between two looks."""
    directory = write_run(tmp_path, "a", STARTED, step(1, 5.0), FINISHED)
    follower, path = FollowedRun(directory), directory / "metrics.jsonl"
    follower.new()
    assert follower.has_ended()
    with DirectoryLock(directory):
        follower.new()
        assert not follower.has_ended()
        assert follower.state() == "running"
        with path.open("a") as file:
            file.write(lines([STARTED]))
        assert not follower.has_ended()
        follower.new()
        assert not follower.has_ended()
        with path.open("a") as file:
            file.write(lines([FINISHED | {"step": 60}]))
        follower.new()
        assert follower.has_ended()
    assert follower.state() == "finished"


def test_a_run_that_has_written_nothing(tmp_path):
    """One that trains is waited for; otherwise there is no run."""
    with DirectoryLock(tmp_path / "a"):
        follower = FollowedRun(tmp_path / "a")
        assert follower.new() == []
        assert not follower.has_ended()
    with pytest.raises(ValueError, match="expected the directory of a run"):
        FollowedRun(tmp_path / "none")


def test_a_long_curve_is_thinned(tmp_path, monkeypatch):
    """The list of losses stays small, and its last one is the last loss."""
    monkeypatch.setattr("transformerlm.experiments.following._MOST_LOSSES", 10)
    follower = FollowedRun(write_run(tmp_path, "a", *[step(at, float(at)) for at in range(1, 101)]))
    follower.new()
    assert len(follower.losses) <= 10
    assert follower.losses == sorted(follower.losses)
    assert follower.losses[-1] >= 90


def test_of_a_long_file_only_the_end_is_read(tmp_path, monkeypatch):
    """Its last lines come, and what follows; after a resume replaced the file, no line from long before does."""
    monkeypatch.setattr("transformerlm.experiments.following._LEAST_BYTES", 500)
    monkeypatch.setattr("transformerlm.experiments.following._BYTES_PER_LINE", 1)
    directory = write_run(tmp_path, "a", STARTED, *(step(number, 3.0) for number in range(1, 101)))
    followed = FollowedRun(directory, last_lines=2)
    shown = [record["step"] for _, record in followed.new()]
    assert shown == list(range(shown[0], 101))
    assert 2 <= len(shown) < 10
    assert followed.max_steps == STARTED["max_steps"]
    assert len(followed.losses) > len(shown)
    (directory / "config.toml").write_text("[training]\nmax_steps = 900\n")  # as a later start writes it
    assert FollowedRun(directory, last_lines=2).max_steps == 900
    other = write_run(tmp_path, "b", STARTED, *(step(number, 3.0) for number in [*range(1, 100), 101, 102]))
    (other / "metrics.jsonl").replace(directory / "metrics.jsonl")
    assert [record["step"] for _, record in followed.new()] == [101, 102]
