"""What a run will reach is said with an interval that holds as often as it says, and few past runs make it wide."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from transformerlm.experiments.fit.choice import Plan
from transformerlm.experiments.fit.prediction import PAST_RUNS, Probe, Row, predict, read_rows


def row(corpus, *, steps=1000, passes=1.0, probe=2.6, change=-0.25, gzip=3.0, seen=0.05):
    """Return a past run whose bits per byte changed by this logarithm after its probe."""
    return Row(corpus, 10**6, 250_000, 2000, 10**6, gzip, seen, steps, 100, passes, probe, probe * math.exp(change))


def plan_of(steps=1000, passes=1.0):
    """Return a plan of so many steps and passes over the text."""
    tokens = 1_000_000
    return Plan({}, steps, 100, 10**6, round(passes * tokens / steps), tokens, 1.0)


def predicted(rows, *, probe=2.6, steps=1000, passes=1.0, seen=0.05, **options):
    """Return the prediction for a run after a probe of 100 steps."""
    return predict(Probe(probe, 3.0, 100), plan_of(steps, passes), rows, share_seen=seen, **options)


def drawn(rng, corpora, *, noise):
    """Return rows of a law: b0 = log 0.12, b1 = 0.2, b2 = 0.8, b3 = 0.2, with an error that a corpus's runs share."""
    rows = []
    for number in range(corpora):
        shared = rng.normal(0, noise)
        for _ in range(2):
            ratio, passes, against = rng.uniform(8, 12), rng.uniform(0.2, 8), rng.uniform(0.8, 1.4)
            seen = rng.uniform(0.0, 0.6)
            change = -math.log(ratio) * exponent(passes, against, seen) * math.exp(shared)
            made = {"passes": passes, "probe": 3 * against, "change": change, "seen": seen}
            rows.append(row(str(number), steps=round(100 * ratio), **made))
    return rows


def exponent(passes, against, seen):
    """Return the exponent of that law."""
    return 0.12 * (1 + passes) ** 0.2 * against**0.8 * ((0.01 + seen) / 0.05) ** 0.2


def test_many_past_runs_of_one_law_give_that_law():
    """With little noise the middle is the truth to a percent, and the interval is narrow."""
    rows = drawn(np.random.default_rng(0), 60, noise=0.01)
    found = predicted(rows, probe=3.3, passes=2.0)
    truth = 3.3 * 10 ** -exponent(2.0, 1.1, 0.05)
    assert found.middle == pytest.approx(truth, rel=0.01)
    assert found.holds(truth)
    assert found.high / found.low < 1.05


@pytest.mark.parametrize("corpora", [4, 12])
def test_the_interval_holds_as_often_as_it_says(corpora):
    """A new corpus of the same kind is inside nine times of ten, also after few past runs."""
    rng = np.random.default_rng(corpora)
    hits = 0
    for _ in range(100):
        rows = drawn(rng, corpora + 1, noise=0.2)
        past, new = rows[:-2], rows[-1]
        plan = plan_of(new.steps, new.passes)
        probe = Probe(new.probe_bits_per_byte, 3.0, 100)
        hits += predict(probe, plan, past, share_seen=new.share_seen).holds(new.bits_per_byte)
    assert 80 <= hits <= 99


def test_fewer_past_runs_give_a_wider_interval():
    """Without any there is a guess that the bits fall, to a sixth at most; each corpus helps."""
    rows = [row(str(number), change=-0.25 + 0.002 * number) for number in range(12)]
    found = [predicted(rows[:number]) for number in (0, 1, 3, 12)]
    widths = [one.high / one.low for one in found]
    assert widths == sorted(widths, reverse=True)
    assert 2.6 / 6 < found[0].low < found[0].middle < found[0].high < 2.6
    assert widths[-1] < 1.1


def test_a_run_as_long_as_its_probe_reaches_the_same():
    """Nothing is gained by no further step, and two seeds differ still; more confidence takes a wider interval."""
    rows = drawn(np.random.default_rng(1), 8, noise=0.02)
    same = predicted(rows, steps=100)
    assert same.middle == pytest.approx(2.6)
    assert 0.98 * 2.6 < same.low < 2.6 < same.high < 1.02 * 2.6
    half, more = (predicted(rows, confidence=level) for level in (0.5, 0.95))
    assert more.low < half.low < half.middle < half.high < more.high
    assert half.middle == more.middle


def test_a_longer_run_is_less_certain():
    """Texts differ in their exponent, so the interval grows with the steps' ratio; no gain at all is no error."""
    rows = [*drawn(np.random.default_rng(3), 8, noise=0.2), row("overfitted", change=0.01)]
    widths = [math.log(one.high / one.low) for one in (predicted(rows, steps=steps) for steps in (200, 400, 1600))]
    assert widths[0] < widths[1] < widths[2]
    assert widths[2] > 2 * widths[0]


def test_a_run_unlike_all_past_ones_gets_a_wider_interval():
    """Far outside of what was seen, the coefficients are uncertain, and the interval says so."""
    rows = drawn(np.random.default_rng(2), 8, noise=0.02)
    near, far = predicted(rows, passes=2.0), predicted(rows, passes=5000.0, steps=100_000)
    assert far.high / far.low > 1.3 * near.high / near.low


def test_the_shipped_past_runs_are_whole_and_predict_each_other():
    """Each shipped row is one that the reader takes, of a run that was longer than its probe."""
    rows = read_rows()
    assert json.loads(PAST_RUNS.read_text())["rows"] == [asdict(one) for one in rows]
    for one in rows:
        assert one.steps > one.probe_steps
        assert one.bits_per_byte < 2 * one.probe_bits_per_byte


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a JSON object"),
        ('{"rows": 3}', 'a list under "rows", found int'),
        ('{"rows": [{"corpus": "a"}]}', "rows[0]: expected the keys corpus, num_bytes"),
        ('{"rows": [1]}', "found int"),
    ],
)
def test_a_file_of_something_else_is_refused(text, words, tmp_path):
    """The error names the file and what was found."""
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json") as caught:
        read_rows(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [0, -1.0, "2", True, None, 1e300])
def test_a_number_that_is_none_is_refused_by_its_name(value, tmp_path):
    """A wrong value names row and key."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [asdict(row("a")), {**asdict(row("b")), "passes": value}]}))
    with pytest.raises(ValueError, match=r"rows\[1\]: passes: expected a positive number"):
        read_rows(path)
    path.write_text(json.dumps({"rows": [asdict(row("a", seen=0.0)), {**asdict(row("b")), "share_seen": -1}]}))
    with pytest.raises(ValueError, match=r"rows\[1\]: share_seen: expected a number from 0 to 1"):
        read_rows(path)
