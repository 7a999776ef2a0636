"""The sampling filters: what exactly they keep, and at their edges."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from transformerlm.inference.sampling import (
    apply_temperature,
    choose,
    draw,
    min_p_filter,
    sample,
    top_k_filter,
    top_p_filter,
)
from transformerlm.inference.sampling_params import SamplingParams

# Probabilities 0.5, 0.25, 0.15, 0.1, out of order.
PROBABILITIES = torch.tensor([[0.15, 0.5, 0.1, 0.25], [0.25, 0.1, 0.5, 0.15]])
LOGITS = PROBABILITIES.log()
INF = math.inf


def kept(logits: torch.Tensor) -> list[list[int]]:
    """The ids of each row that a filter left."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_temperature_divides_logits() -> None:
    """Probabilities are those of logits / T: sharper below 1, flatter above, the same object at 1."""
    for temperature in (0.3, 2.0):
        found = torch.softmax(apply_temperature(LOGITS, temperature), dim=-1)
        expected = PROBABILITIES ** (1 / temperature)
        torch.testing.assert_close(found, expected / expected.sum(dim=-1, keepdim=True))
    assert apply_temperature(LOGITS, 1.0) is LOGITS


def test_temperature_zero_leaves_the_first_of_the_most_likely() -> None:
    """T = 0 keeps one token a row; among equals the first."""
    assert kept(apply_temperature(LOGITS, 0.0)) == [[1], [2]]
    assert kept(apply_temperature(torch.zeros(1, 4), 0.0)) == [[0]]


def test_tiny_temperatures_do_not_overflow() -> None:
    """T = 1e-30 gives the greedy token, without a NaN."""
    for temperature in (1e-30, 1e-50):  # the second is 0 in fp32
        assert sample(LOGITS * 1e4, SamplingParams(temperature=temperature), [None]).tolist() == [1, 2]


@pytest.mark.parametrize(("top_k", "expected"), [(1, [[1], [2]]), (2, [[1, 3], [0, 2]]), (3, [[0, 1, 3], [0, 2, 3]])])
def test_top_k_keeps_the_k_most_likely(top_k: int, expected: list[list[int]]) -> None:
    """Their logits are unchanged, the others -inf."""
    found = top_k_filter(LOGITS, top_k)
    assert kept(found) == expected
    assert torch.equal(found[found.isfinite()], LOGITS[found.isfinite()])


@pytest.mark.parametrize("top_k", [4, 5, 10**9, None])
def test_top_k_of_the_vocabulary_or_more_is_the_identity(top_k: int | None) -> None:
    """There is nothing to drop."""
    assert torch.equal(top_k_filter(LOGITS, top_k), LOGITS)


def test_top_k_keeps_exactly_k_of_equals() -> None:
    """Ties do not widen the choice."""
    assert len(kept(top_k_filter(torch.zeros(1, 9), 3))[0]) == 3


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [[1], [2]]),
        (0.4, [[1], [2]]),
        (0.51, [[1, 3], [0, 2]]),
        (0.74, [[1, 3], [0, 2]]),
        (0.76, [[0, 1, 3], [0, 2, 3]]),
        (0.95, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, expected: list[list[int]]) -> None:
    """The token that crosses p is kept; p = 0 keeps the single best."""
    assert kept(top_p_filter(LOGITS, top_p)) == expected


@pytest.mark.parametrize(("top_p", "expected"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_a_sum_that_is_exactly_p_is_enough(top_p: float, expected: int) -> None:
    """Of four equals, each of probability 1/4, the first `4 p` are kept, by the plain filter and by the fast form."""
    logits = torch.zeros(1, 4)
    assert kept(top_p_filter(logits, top_p)) == [list(range(expected))]
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose(logits, [SamplingParams(top_p=top_p)], last).tolist() == [expected - 1]


def test_a_draw_from_equals_is_by_their_ids() -> None:
    """Of ten equals and p = 0.3 the first three are left; a number of 0.5 is in the middle of them."""
    middle = torch.tensor([0.5], dtype=torch.float64)
    assert choose(torch.zeros(1, 10), [SamplingParams(top_p=0.3)], middle).tolist() == [1]


def test_top_p_one_is_the_identity() -> None:
    """Even tokens too unlikely for fp32 stay."""
    logits = torch.tensor([[0.0, -500.0]])
    assert torch.equal(top_p_filter(logits, 1.0), logits)


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.0, [0, 1, 2, 3]), (0.19, [0, 1, 2, 3]), (0.25, [0, 1, 3]), (0.6, [1]), (1.0, [1])]
)
def test_min_p_drops_what_is_far_below_the_most_likely(min_p: float, expected: list[int]) -> None:
    """A token stays when its probability is at least min_p times the largest; the largest always stays."""
    assert kept(min_p_filter(LOGITS[:1], min_p)) == [expected]


@pytest.mark.parametrize("filtered", [top_k_filter(LOGITS, 2), top_p_filter(LOGITS, 0.6), min_p_filter(LOGITS, 0.4)])
def test_filters_compose_and_always_keep_one(filtered: torch.Tensor) -> None:
    """The strictest settings leave one token a row of what another filter has left."""
    strictest = min_p_filter(top_p_filter(top_k_filter(filtered, 1), 0.0), 1.0)
    assert kept(strictest) == [[1], [2]]


def test_filters_work_on_any_leading_dimensions() -> None:
    """A single row and a (batch, seq, vocab) tensor are filtered like rows of a batch."""
    for apply in (lambda x: top_k_filter(x, 2), lambda x: top_p_filter(x, 0.6), lambda x: min_p_filter(x, 0.4)):
        assert torch.equal(apply(LOGITS)[0], apply(LOGITS[0]))
        assert torch.equal(apply(LOGITS.view(2, 1, 4))[:, 0], apply(LOGITS))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.25, "temperature": 2.0}, {"temperature": 0.5, "top_k": 2}],
)
def test_samples_follow_the_filtered_distribution(settings: dict[str, Any]) -> None:
    """The frequencies of 40,000 draws are the renormalised probabilities of what was kept, to within 1 %."""
    logits = apply_temperature(LOGITS[0], settings.get("temperature", 1.0))
    logits = top_p_filter(top_k_filter(logits, settings.get("top_k")), settings.get("top_p", 1.0))
    expected = torch.softmax(min_p_filter(logits, settings.get("min_p", 0.0)), dim=-1)
    ids = sample(LOGITS[0].expand(40_000, 4), SamplingParams(**settings), [torch.Generator().manual_seed(0)])
    frequencies = torch.bincount(ids, minlength=4) / 40_000
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.01)
    assert torch.equal(frequencies > 0, expected > 0)


def test_sample_is_a_function_of_its_generator() -> None:
    """The same generator state gives the same ids, int64 `(batch)`; temperature 0 needs and advances none."""
    draws = [sample(LOGITS.expand(2, 4), SamplingParams(), [torch.Generator().manual_seed(7)]) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (2,)
    assert draws[0].dtype == torch.int64
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    assert sample(LOGITS, SamplingParams(temperature=0.0), [generator]).tolist() == [1, 2]
    assert torch.equal(generator.get_state(), state)


def test_half_precision_logits_are_sampled_in_fp32() -> None:
    """Softmax over bfloat16 logits would lose small probabilities; sampling widens them first."""
    logits = torch.zeros(1, 4, dtype=torch.bfloat16)
    assert sample(logits, SamplingParams(top_p=0.99), [None]).dtype == torch.int64


def test_each_row_has_its_own_settings() -> None:
    """Rows with different settings are drawn as each is alone; a greedy row takes no number."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=5),
        SamplingParams(temperature=0.7, top_p=0.6, min_p=0.1),
        SamplingParams(),
    ]
    for seed in range(0, 80, 4):
        generators = [torch.Generator().manual_seed(seed + row) for row in range(4)]
        together = sample(logits, params, generators).tolist()
        again = [torch.Generator().manual_seed(seed + row) for row in range(4)]
        assert together == [int(sample(logits[i : i + 1], params[i], again[i : i + 1])) for i in range(4)]
        assert torch.equal(generators[0].get_state(), torch.Generator().manual_seed(seed).get_state())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [math.nan, INF, -INF])
def test_a_row_that_cannot_be_drawn_from_is_told_apart(temperature: float, broken: float) -> None:
    """It gives -1; its neighbours are drawn as ever."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    drawn = [{}, {"top_p": 0.9}, {"top_p": 0.9, "min_p": 0.05}, {"top_k": 50}, {"top_k": 9, "min_p": 0.01}]
    for settings in [{}] if temperature == 0.0 else drawn:
        params = SamplingParams(temperature, **settings)
        whole = sample(logits, params, [torch.Generator().manual_seed(row) for row in range(3)]).tolist()
        damaged = logits.clone()
        damaged[1, slice(None) if broken == -INF else 7] = broken
        found = sample(damaged, params, [torch.Generator().manual_seed(row) for row in range(3)]).tolist()
        assert found == [whole[0], -1, whole[2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
        ({"temperature": INF}, "temperature must be at least 0 and finite, got inf"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.1}, "top_p must lie between 0 and 1, got 1.1"),
        ({"top_p": 0.0, "top_k": 50}, "top_p = 0 keeps the most likely token alone, so top_k = 50 would do nothing"),
        ({"min_p": -0.5}, "min_p must lie between 0 and 1, got -0.5"),
    ],
)
def test_parameters_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """Each error names the parameter, its range and what was given."""
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_the_worked_example_of_the_page_is_true() -> None:
    """Each number of the table in docs/sampling.md, and the token that is drawn with 0.8."""
    page = (Path(__file__).parents[2] / "docs/sampling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:mat|sofa|floor|moon|spoon) .*$", page, flags=re.MULTILINE)
    cells = [re.findall(r"[^| ]+", row) for row in rows]
    names, *columns = zip(*cells, strict=True)
    table = [torch.tensor([[float(cell.replace("dropped", "0")) for cell in column]]) for column in columns]
    scaled = apply_temperature(table[0], 0.5)
    top_k = top_k_filter(scaled, 4)
    top_p = top_p_filter(top_k, 0.95)
    steps = [scaled, top_k, top_p, min_p_filter(top_p, 0.2)]
    after = [torch.softmax(logits, dim=-1) for logits in steps]
    for found, shown in zip([scaled, *after, after[-1].cumsum(-1)], table[1:], strict=True):
        torch.testing.assert_close(found, shown, rtol=0, atol=6e-5)
    for logits, column in zip(steps, columns[2:6], strict=True):
        assert [cell == "dropped" for cell in column] == logits.isinf()[0].tolist()
    params = [SamplingParams(temperature=0.5, top_k=4, top_p=0.95, min_p=0.2)]
    assert names[int(choose(table[0], params, torch.tensor([0.8], dtype=torch.float64)))] == "sofa"


def test_ids_of_weight_zero_are_never_picked() -> None:
    """Neither the lowest number, nor the highest below 1, nor the last id gives one."""
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for number, expected in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        uniforms = torch.tensor([number], dtype=torch.float64)
        assert int(draw(weights, uniforms)) == expected
        assert int(choose(weights.log(), [SamplingParams()], uniforms)) == expected
