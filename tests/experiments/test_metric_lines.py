"""Lines are read while a run writes them: torn ones are counted, a replaced file begins anew, long ones are thinned."""

from __future__ import annotations

import json
import os

import pytest

from transformerlm.experiments import metric_lines
from transformerlm.experiments.metric_lines import (
    LineReader,
    as_record,
    each_record,
    first_records,
    last_records,
    last_with,
    read_lines,
)


def step_line(step: int) -> str:
    return json.dumps({"step": step, "metrics.loss": 1.0 + step, "metrics.tokens": 64 * step}) + "\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(step_line, range(1, 4))))
    return path


def steps(found) -> list[int]:
    return [json.loads(text)["step"] for text in found.texts]


def test_what_comes_later_is_read_from_the_place_before(path):
    """Each line once, a line that is being written not before it is whole."""
    first = read_lines(path)
    assert steps(first) == [1, 2, 3]
    assert not first.reset
    assert not first.more
    with path.open("a") as file:
        file.write(step_line(4) + step_line(5)[:20])
    second = read_lines(path, file=first.file, offset=first.offset, every=first.every)
    assert steps(second) == [4]
    with path.open("a") as file:
        file.write(step_line(5)[20:])
    third = read_lines(path, file=second.file, offset=second.offset, every=second.every)
    assert steps(third) == [5]
    assert steps(read_lines(path, file=third.file, offset=third.offset, every=third.every)) == []


def test_a_file_that_was_replaced_is_read_anew(path, tmp_path):
    """A resumed run leaves later steps out, in a new file under the old name; a shorter file begins anew, too."""
    first = read_lines(path)
    (tmp_path / "new").write_text(step_line(1) + step_line(2))
    os.replace(tmp_path / "new", path)
    second = read_lines(path, file=first.file, offset=first.offset, every=first.every)
    assert second.reset
    assert steps(second) == [1, 2]
    with path.open("r+") as file:
        file.truncate(len(step_line(1)))
    third = read_lines(path, file=second.file, offset=second.offset, every=second.every)
    assert third.reset
    assert steps(third) == [1]


def test_a_file_system_that_gives_an_inode_again_is_no_matter(path):
    """A file that was replaced twice may have the first one's inode, and more lines than had been read."""
    first = read_lines(path)
    with path.open("r+") as file:  # the same inode
        file.writelines(step_line(step) for step in range(101, 200))
    second = read_lines(path, file=first.file, offset=first.offset, every=first.every)
    assert second.reset
    assert steps(second)[:2] == [101, 102]


def test_lines_that_browsers_cannot_read_are_left_out_and_counted(path):
    """What is no JSON object is no record: torn lines, NaN as Python writes it, numbers alone, deep nesting."""
    with path.open("ab") as file:
        file.write(b'{"step": 4, "metr\n{"step": NaN}\n17\n' + b"[" * 100_000 + b"\n\xff\xfe\n" + step_line(9).encode())
    found = read_lines(path)
    assert steps(found) == [1, 2, 3, 9]
    assert found.bad == 5


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400, "9" * 5000, "1" + "0" * 18])
def test_a_number_that_no_run_writes_is_none(number):
    """Beyond floats and 64 bits: what counts, formats or sorts such a number would fail, for one damaged line."""
    assert as_record(f'{{"step": 3, "metrics.tokens": [{number}]}}') == {"step": 3, "metrics.tokens": [None]}
    assert as_record('{"metrics.loss": 1e300, "step": 999999999999999999}') == {
        "metrics.loss": 1e300,
        "step": 10**18 - 1,
    }


def test_a_reader_goes_on_where_it_was(path, tmp_path):
    """Each line comes once; a file in the place of the one before is read from its beginning, and says so."""
    reader = LineReader(path)
    assert [steps(part) for part in reader.new()] == [[1, 2, 3]]
    assert [steps(part) for part in reader.new()] == [[]]
    with path.open("a") as file:
        file.write(step_line(4))
    assert [steps(part) for part in reader.new()] == [[4]]
    (tmp_path / "new").write_text(step_line(1))
    (tmp_path / "new").replace(path)
    [part] = reader.new()
    assert (part.reset, steps(part)) == (True, [1])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        next(reader.new())


def test_all_records_but_the_half_line(path):
    """The last line of a killed run is no damage; a whole one that is no object is."""
    with path.open("ab") as file:
        file.write(b'[1]\n{"step": 4')
    assert [one and one["step"] for one in each_record(path)] == [1, 2, 3, None]


@pytest.mark.parametrize(("most_bytes", "first"), [(10**6, 1), (1, 4), (len(step_line(3)) + 5, 3)])
def test_a_reader_may_begin_near_the_end(path, most_bytes, first):
    """It begins with a whole line, goes on like any other, and begins anew where the file is replaced."""
    reader = LineReader(path)
    reader.skip_to_end(most_bytes)
    with path.open("a") as file:
        file.write(step_line(4))
    assert [steps(part) for part in reader.new()] == [list(range(first, 5))]
    path.write_text(step_line(1))
    [part] = reader.new()
    assert (part.reset, steps(part)) == (True, [1])


def test_of_a_long_file_events_and_validations_are_all_there(path, monkeypatch):
    """Only step lines are thinned; several readings give the whole file."""
    monkeypatch.setattr(metric_lines, "MOST_LINES", 50)
    monkeypatch.setattr(metric_lines, "_CHUNK_BYTES", 4000)
    special = {100: {"event": "checkpoint_saved"}, 101: {"metrics.val_loss": 2.0}, 777: {"event": "step_skipped"}}
    with path.open("w") as file:
        for step in range(1, 1001):
            file.write(json.dumps({"step": step, "metrics.loss": 1.5, "pad": "x" * 90, **special.get(step, {})}) + "\n")
    found, all_steps = read_lines(path), []
    all_steps += steps(found)
    assert found.every > 10
    while found.more:
        found = read_lines(path, file=found.file, offset=found.offset, every=found.every)
        all_steps += steps(found)
    assert all_steps == sorted(set(all_steps))
    assert set(special) < set(all_steps)
    assert 1000 in all_steps
    assert len(all_steps) < 120
    assert len(steps(read_lines(path, every=1))) > 20


def test_records_of_both_ends_are_whole(path):
    """Beginning and end of a file are read without the rest, and without the line that is cut."""
    assert [one["step"] for one in first_records(path, most_bytes=len(step_line(1)) + 5)] == [1]
    assert [one["step"] for one in last_records(path, most_bytes=len(step_line(3)) + 5)] == [3]
    assert [one["step"] for one in last_records(path)] == [3, 2, 1]


def test_the_last_record_with_a_key_is_found_far_from_the_end(path):
    """Words in a text are no key, and neither a line that is cut nor one half written counts."""
    text = {"event": "sample", "step": 3, "text.output": '"metrics.val_loss"'}
    with path.open("a") as file:
        file.write(json.dumps({"step": 3, "metrics.val_loss": 2.5}) + "\n" + json.dumps(text) + "\n")
        file.writelines(step_line(step) for step in range(4, 3000))
        file.write('{"step": 3000, "metrics.val_loss": 1')
    found = last_with(path, "metrics.val_loss")
    assert found == {"step": 3, "metrics.val_loss": 2.5}
    assert last_with(path, "metrics.val_loss", most_bytes=50_000) is None
    assert last_with(path, "metrics.grad_l2_norm") is None
