"""Which parts of a run can be made once more, and which are drawn."""

from __future__ import annotations

import pytest

from transformerlm.experiments.replay import Segment, choose_segments, segments_of


@pytest.mark.parametrize(
    ("kept", "saved", "expected"),
    [
        ([4, 8, 12], [4, 8, 12], [(0, 4), (4, 8), (8, 12)]),
        ([8, 12], [4, 8, 12], [(8, 12)]),
        ([4, 12], [4, 8, 12], [(0, 4)]),
        ([12], [4, 8, 12], []),
        ([12], [12], [(0, 12)]),
        ([], [], []),
    ],
)
def test_a_segment_needs_both_of_its_checkpoints(kept, saved, expected):
    """The run's beginning needs none; a checkpoint that was removed leaves a gap on both of its sides."""
    assert [(one.begin, one.end) for one in segments_of(kept, saved)] == expected


def test_segments_are_drawn_by_the_seed_with_the_last_always_among_them():
    """Besides it they have the steps wanted, no more of them than needed, and each is drawn about as often."""
    segments = [Segment(10 * number, 10 * (number + 1)) for number in range(20)]
    drawn = [choose_segments(segments, num_steps=25, seed=seed) for seed in range(300)]
    assert all(len(one) == 4 and one[-1] == segments[-1] and one == sorted(one, key=lambda x: x.begin) for one in drawn)
    assert drawn[7] == choose_segments(segments, num_steps=25, seed=7)
    counts = [sum(segment in one for one in drawn) for segment in segments[:-1]]
    assert min(counts) > 10
    assert choose_segments(segments, num_steps=1000, seed=0) == segments
    assert choose_segments([], num_steps=5, seed=0) == []
    assert choose_segments(segments[:1], num_steps=5, seed=0) == segments[:1]
