"""Numbers from scores are compared with results by hand, and intervals with theory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from transformerlm.evaluation.scoring import Scores
from transformerlm.evaluation.statistics import compare, estimate, summarize


def scores_of(nats, tokens, num_bytes) -> Scores:
    """Return scores from lists."""
    return Scores(np.array(nats, dtype=float), np.array(tokens), np.array(num_bytes))


def random_scores(seed: int, *, documents: int = 400, spread: float = 0.3) -> Scores:
    """Return documents of 100 tokens and 300 bytes whose costs scatter around 200 nats."""
    noise = np.random.default_rng(seed).normal(0, spread, documents)
    return scores_of(200 * (1 + noise), [100] * documents, [300] * documents)


def test_the_numbers_are_those_worked_out_by_hand():
    """Loss divides by tokens, bits per byte by bytes; long documents count for more."""
    metrics = summarize(scores_of([2.0, 6.0], [1, 3], [4, 16]))
    assert metrics["loss"] == pytest.approx(2.0)
    assert metrics["perplexity"] == pytest.approx(math.e**2)
    assert metrics["bits_per_byte"] == pytest.approx(8 / math.log(2) / 20)
    assert (metrics["documents"], metrics["tokens"], metrics["bytes"]) == (2, 4, 20)


def test_an_interval_has_the_width_that_theory_gives_it():
    """For documents of one length the bootstrap agrees with mean +- 1.96 standard errors."""
    scores = random_scores(0)
    metrics = summarize(scores, resamples=4000)
    losses = scores.nats / 100
    error = 1.96 * losses.std() / math.sqrt(len(losses))
    assert metrics["loss_low"] == pytest.approx(losses.mean() - error, abs=0.1 * error)
    assert metrics["loss_high"] == pytest.approx(losses.mean() + error, abs=0.1 * error)
    assert metrics["perplexity_high"] == pytest.approx(math.exp(metrics["loss_high"]))


def test_the_same_seed_gives_the_same_interval():
    """Another seed moves the ends a little, and the values not at all."""
    first, again, other = (summarize(random_scores(0), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["loss"] == other["loss"]
    assert first["loss_low"] != other["loss_low"]


@pytest.mark.parametrize(("documents", "resamples"), [(1, 1000), (5, 0)])
def test_one_document_or_no_resample_gives_no_interval(documents, resamples):
    """The ends are None, but the values are given."""
    metrics = summarize(random_scores(0, documents=documents), resamples=resamples)
    assert metrics["loss_low"] is metrics["perplexity_high"] is metrics["bits_per_byte_low"] is None
    assert metrics["loss"] > 0


def test_more_documents_than_are_drawn_at_once_change_nothing(monkeypatch):
    """Resamples are drawn in blocks, whose size makes no difference."""
    whole = summarize(random_scores(0))
    monkeypatch.setattr("transformerlm.evaluation.statistics._DRAWS_AT_ONCE", 1)
    assert summarize(random_scores(0)) == whole


def test_a_paired_comparison_sees_what_intervals_side_by_side_do_not():
    """A model that is 1 % better on each document is found to be better, although both intervals overlap."""
    first = random_scores(0)
    second = Scores(first.nats * 0.99, first.tokens, first.num_bytes)
    one, two, difference = summarize(first), summarize(second), compare(first, second)
    assert one["bits_per_byte_low"] < two["bits_per_byte_high"]
    assert difference["bits_per_byte_difference"] == pytest.approx(two["bits_per_byte"] - one["bits_per_byte"])
    assert difference["bits_per_byte_difference_low"] < difference["bits_per_byte_difference_high"] < 0


def test_a_model_does_not_differ_from_itself():
    """Difference and interval are zero."""
    assert set(compare(random_scores(0), random_scores(0)).values()) == {0.0}


def test_tokenizers_may_differ_but_texts_may_not():
    """Other numbers of tokens are compared; other documents are refused."""
    first = random_scores(0, documents=3)
    other_tokens = Scores(first.nats, first.tokens * 2, first.num_bytes)
    assert compare(first, other_tokens)["bits_per_byte_difference"] == 0
    with pytest.raises(ValueError, match="expected the same documents for both"):
        compare(first, Scores(first.nats, first.tokens, first.num_bytes + 1))


def test_a_perplexity_beyond_the_numbers_is_none():
    """JSON has no infinity."""
    assert summarize(scores_of([2000.0], [1], [1]))["perplexity"] is None


def test_a_running_estimate_is_near_the_bootstrap():
    """Value and width of one model, or of a difference, need no resampling; one document has no width."""
    first, second = random_scores(0), random_scores(1)
    metrics, difference = summarize(first, resamples=4000), compare(first, second, resamples=4000)
    for found, given, name in (
        (estimate(first), metrics, "bits_per_byte"),
        (estimate(first, second), difference, "bits_per_byte_difference"),
    ):
        assert found[0] == pytest.approx(given[name])
        assert found[1] == pytest.approx((given[f"{name}_high"] - given[f"{name}_low"]) / 2, rel=0.1)
    assert estimate(random_scores(0, documents=1))[1] is None


def test_a_running_estimate_weighs_documents_by_their_length():
    """If each byte costs the same, documents of different length leave no doubt."""
    value, margin = estimate(scores_of([2.0, 6.0, 20.0], [1, 3, 10], [4, 12, 40]))
    assert (value, margin) == (pytest.approx(0.5 / math.log(2)), pytest.approx(0, abs=1e-12))
