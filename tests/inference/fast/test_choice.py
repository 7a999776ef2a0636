"""The choice without sorting ids against the plain one of `sampling`, which is the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from transformerlm.inference import sampling
from transformerlm.inference.fast import choice as choice_module
from transformerlm.inference.fast import choice_kernels, uncompiled
from transformerlm.inference.sampling import choose, sample
from transformerlm.inference.sampling_params import SamplingParams
from transformerlm.utils.plain_forms import plain_forms

SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 300, "top_p": 0.7},
    {"top_k": 10_000},
    {"top_k": 2**64},
    {"top_k": 2**63, "top_p": 0.7},
    {"top_p": 0.0},
    {"top_p": 1e-9},
    {"top_p": 0.05},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"top_p": 0.3, "min_p": 0.1},
    {"top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 50.0, "top_p": 0.2},
    {"temperature": 50.0, "top_p": 0.99},
    {"temperature": 1e-30, "top_p": 0.9},
    {"temperature": 0.0},
]
ROWS = 24


@pytest.fixture(autouse=True, params=["compiled", "NumPy"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms: compiled loops, and NumPy where the decoder has not loaded them."""
    kernels = choice_kernels if request.param == "compiled" else None
    monkeypatch.setattr(choice_module, "_kernels", lambda: kernels)
    return str(request.param)


def table(kind: str, vocab_size: int) -> torch.Tensor:
    """Logits `(ROWS, vocab_size)` of one kind."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, vocab_size, generator=generator)
    is_head = torch.arange(vocab_size) % 10 == 0
    return {
        "peaked": 4 * normal,
        "flat": 0.01 * normal,
        "few values": (3 * normal).round(),
        "all equal": torch.zeros(ROWS, vocab_size),
        "bfloat16": (2 * normal).bfloat16(),
        "some dropped": normal.masked_fill(torch.rand(ROWS, vocab_size, generator=generator) < 0.4, -torch.inf),
        "a long tail": -torch.arange(1, vocab_size + 1).log().expand(ROWS, -1).contiguous(),
        "a flat tail": torch.where(is_head, 0.0, -3.7) + 1e-3 * normal,  # 0.18 of the mass: between 1 and 2 times 1 - p
    }[kind]


def numbers() -> torch.Tensor:
    """A number in [0, 1) for each row, the least and the greatest among them."""
    shares = torch.rand(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares[0], shares[1] = 0.0, 1 - 2**-53
    return shares


@pytest.mark.parametrize(
    "kind", ["peaked", "flat", "few values", "all equal", "bfloat16", "some dropped", "a long tail", "a flat tail"]
)
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 1000, 5003])
def test_plain_and_fast_choose_the_same_ids(kind: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers give the same ids: for each setting alone, and for rows of all settings mixed."""
    logits, shares = table(kind, vocab_size), numbers()
    rows = [SamplingParams(**SETTINGS[row % len(SETTINGS)]) for row in range(ROWS)]
    tried = [rows] + [[SamplingParams(**settings)] * ROWS for settings in SETTINGS]
    found = [choose(logits, params, shares) for params in tried]
    monkeypatch.setattr(sampling, "fast_choose", lambda *arguments: pytest.fail("the fast form was asked"))
    with plain_forms():
        for params, ids in zip(tried, found, strict=True):
            assert torch.equal(choose(logits, params, shares), ids), params


def test_logits_with_a_gradient_are_chosen_from() -> None:
    """As the plain form does, outside of no_grad, too."""
    logits, shares = table("peaked", 63), numbers()
    for settings in SETTINGS:
        params = [SamplingParams(**settings)] * ROWS
        assert torch.equal(choose(logits.clone().requires_grad_(), params, shares), choose(logits, params, shares))


def test_a_temperature_keeps_its_digits() -> None:
    """0.7 in fp32 is a little less, and the second id would be below min-p."""
    logits = torch.tensor([[0.0, -1.61180956]], dtype=torch.float64)
    share = torch.tensor([0.95], dtype=torch.float64)
    assert choose(logits, [SamplingParams(temperature=0.7, min_p=0.1)], share).tolist() == [1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["peaked", "bfloat16", "a long tail"])
def test_a_row_is_chosen_the_same_in_any_batch(kind: str, threads: int) -> None:
    """Neither the number of rows, nor their settings, nor their logits change a row's id; nor do threads."""
    logits, shares, before = table(kind, 5003), numbers(), torch.get_num_threads()
    params = [SamplingParams(**SETTINGS[row % len(SETTINGS)]) for row in range(ROWS)]
    alone = [int(choose(logits[i : i + 1], params[i : i + 1], shares[i : i + 1])) for i in range(ROWS)]
    try:
        torch.set_num_threads(threads)
        for few in (2, 3, ROWS):
            assert choose(logits[:few], params[:few], shares[:few]).tolist() == alone[:few]
        assert choose(logits.flip(0), params[::-1], shares.flip(0)).tolist() == alone[::-1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 3, "temperature": 2.0}], ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    """40,000 draws of six ids: frequencies within 1 % of the probabilities, and none of what was dropped."""
    logits = torch.tensor([[0.1, 1.0, -1.0, 0.7, -2.0, 0.0]])
    kept = sampling.apply_temperature(logits, settings.get("temperature", 1.0))
    kept = sampling.top_p_filter(sampling.top_k_filter(kept, settings.get("top_k")), settings.get("top_p", 1.0))
    expected = torch.softmax(kept[0], dim=-1)
    ids = sample(logits.expand(40_000, 6), SamplingParams(**settings), [torch.Generator().manual_seed(0)])
    frequencies = torch.bincount(ids, minlength=6) / 40_000
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.01)
    assert torch.equal(frequencies > 0, expected > 0)


def test_a_border_far_in_the_tail_is_found() -> None:
    """Of 20,000 ids that are equally likely, top-p keeps the first 95 %, which are more than are looked at first."""
    logits, params = torch.zeros(2, 20_000), [SamplingParams(top_p=0.95)] * 2
    assert choose(logits, params, torch.tensor([0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [9500, 18_999]


def test_the_arrays_of_the_caller_stay_as_they_are() -> None:
    """Sorting is done on copies, the settings that are kept from step to step are not changed."""
    logits, shares = table("peaked", 1000), numbers()
    before = logits.clone()
    for settings in SETTINGS:
        params = [SamplingParams(**settings)] * ROWS
        assert np.array_equal(choose(logits, params, shares), choose(logits, params, shares))
    assert torch.equal(logits, before)


def test_a_choice_that_cannot_be_compiled_is_made_by_numpy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where numba fails at the first call there is one warning, and no compiled loops from then on."""

    def fail(*_: object) -> None:
        raise RuntimeError("LLVM cannot allocate memory")

    monkeypatch.setattr(choice_kernels, "draw_from_top_p", fail)
    choice_module._compiled_kernels.cache_clear()
    uncompiled.warn_once.cache_clear()
    try:
        assert [choice_module._compiled_kernels() for _ in range(2)] == [None, None]
    finally:
        choice_module._compiled_kernels.cache_clear()
    assert [record.message.count("LLVM cannot") for record in caplog.records] == [1]
