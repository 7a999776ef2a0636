"""The filters on a few tokens against the plain filters of `sampling`, which are the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformerlm.inference import sampling
from transformerlm.inference.sampling import SamplingParams, distribution, draw, sample
from transformerlm.utils.plain_forms import plain_forms

SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10_000},
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.95},
    {"temperature": 0.0},
]


def reference(logits: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The probabilities that `sampling.sample` draws from."""
    kept = sampling.apply_temperature(logits.float(), settings.get("temperature", 1.0))
    kept = sampling.top_p_filter(sampling.top_k_filter(kept, settings.get("top_k")), settings.get("top_p", 1.0))
    return torch.softmax(sampling.min_p_filter(kept, settings.get("min_p", 0.0)), dim=-1)


def spread(logits: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """What `distribution` returns."""
    return distribution(logits, SamplingParams(**settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_same_ids_are_kept_with_the_same_probabilities(settings: dict[str, Any], scale: float) -> None:
    """Flat and peaked logits of 5,000 ids: some need a few tokens only, some need all."""
    logits = scale * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    found, expected = spread(logits, settings), reference(logits, settings)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"top_p": 0.3, "top_k": 400}, {"top_k": 300}], ids=str)
def test_equal_logits_are_kept_as_the_reference_keeps_them(settings: dict[str, Any]) -> None:
    """Where the border falls among equals, the lower ids are kept."""
    logits = torch.randint(0, 4, (8, 2000), generator=torch.Generator().manual_seed(1)).float() * 3
    assert torch.equal(spread(logits, settings) > 0, reference(logits, settings) > 0)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 3, "temperature": 2.0}], ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    """40,000 draws of six ids: frequencies within 1 % of the probabilities, and none of what was dropped."""
    logits = torch.tensor([[0.1, 1.0, -1.0, 0.7, -2.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    ids = sample(logits.expand(40_000, 6), SamplingParams(**settings), [generator])
    expected = reference(logits, settings)[0]
    frequencies = torch.bincount(ids, minlength=6) / 40_000
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.01)
    assert torch.equal(frequencies > 0, expected > 0)


def test_a_row_is_drawn_the_same_in_any_batch() -> None:
    """With a generator for each row, its draw does not depend on the others."""
    # A flat row needs all ids, a peaked one few.
    logits = torch.randn(3, 2000) * torch.tensor([[0.1], [8.0], [5.0]])
    settings = SamplingParams(top_p=0.9)
    together = sample(logits, settings, [torch.Generator().manual_seed(seed) for seed in range(3)])
    alone = [sample(logits[i : i + 1], settings, [torch.Generator().manual_seed(i)]) for i in range(3)]
    assert together.tolist() == [int(ids) for ids in alone]


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_p": 0.9, "top_k": 300}], ids=str)
def test_equals_are_drawn_the_same_in_any_batch(settings: dict[str, Any]) -> None:
    """bfloat16 makes many logits equal; equals keep one order, however many tokens the neighbours need."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 5000, generator=generator) * torch.tensor([[4.0], [4.0], [2.0], [1.0], [0.1]])).bfloat16()
    chosen = SamplingParams(**settings)
    for seed in range(0, 200, 5):
        seeds = range(seed, seed + 5)
        together = sample(logits, chosen, [torch.Generator().manual_seed(each) for each in seeds])
        alone = [sample(logits[i : i + 1], chosen, [torch.Generator().manual_seed(seed + i)]) for i in range(5)]
        assert together.tolist() == [int(ids) for ids in alone]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_plain_and_fast_draw_the_same_ids(
    settings: dict[str, Any], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same generators `sample` gives the same ids, with the fast form and without it."""
    logits, params = (
        scale * torch.randn(300, 5000, generator=torch.Generator().manual_seed(2)),
        SamplingParams(**settings),
    )
    fast = sample(logits, params, [torch.Generator().manual_seed(3)])
    with plain_forms():
        assert torch.equal(sample(logits, params, [torch.Generator().manual_seed(3)]), fast)


def test_ids_of_probability_zero_are_never_picked() -> None:
    """Neither the lowest number, nor the highest below 1, nor the last id gives one."""
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for number, expected in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert int(draw(probabilities, torch.tensor([number], dtype=torch.float64))) == expected


def test_temperature_zero_draws_nothing() -> None:
    """It gives the most likely id, the first of equals, and the generator keeps its state."""
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    assert sample(torch.tensor([[0.0, 2.0, 2.0]]), SamplingParams(temperature=0.0), [generator]).tolist() == [1]
    assert torch.equal(generator.get_state(), state)


def test_settings_out_of_range_are_refused() -> None:
    """The error names the parameter, its range and what was given."""
    with pytest.raises(ValueError, match="top_p must lie between 0 and 1, got 2"):
        SamplingParams(top_p=2.0)
