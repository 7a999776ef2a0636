"""Lines of a run in words."""

from __future__ import annotations

import pytest

from cli.run_words import words_of
from tests.experiments.runs import step, validation


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (step(250, 1.91), "step 250/1,000  loss 1.910  100 tokens/s"),
        (validation(10, 4.0), "step 10/1,000  loss 4.000  val loss 4.000  2.000 bits/byte  100 tokens/s"),
        (step(3, "nan"), "step 3/1,000  loss nan  100 tokens/s"),
        ({"event": "checkpoint_saved", "step": 20}, "step 20/1,000  checkpoint_saved"),
        ({"event": "finished", "step": 20, "reason": "max_steps"}, "step 20/1,000  finished: reason max_steps"),
        ({"event": "sample", "step": 20, "text.output": "a\x1b[31m\nb"}, "step 20/1,000  sample: 'a\\x1b[31m\\nb'"),
        ({"event": "odd"}, "odd"),
        ({"step": "x"}, ""),
    ],
)
def test_a_line_in_words(record, words):
    """What people look for, without control characters."""
    assert words_of(record, max_steps=1000) == words


def test_a_long_line_is_cut():
    """A sample may be a page long; a run without a length has none."""
    words = words_of({"event": "sample", "step": 1, "text.output": "x" * 5000})
    assert words.startswith("step 1  sample: 'xxx")
    assert words.endswith("...")
    assert len(words) < 170
