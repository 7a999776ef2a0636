"""Prompt lookup: the same greedy text, the same distribution, fewer passes of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.helpers import make_model
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.prompt_lookup import PromptLookup, _check_draft
from transformerlm.inference.generate import generate, stream
from transformerlm.inference.sampling import SamplingParams, distribution

REPEATING = [5, 9, 200, 7, 5, 9, 200, 7, 5, 9]


def test_lookup_proposes_what_followed_before() -> None:
    """The longest match wins, then the latest; ids that never occurred before propose nothing."""
    assert PromptLookup([1, 2, 3, 4, 9, 1, 2]).propose(3) == [3, 4, 9]
    assert PromptLookup([1, 2, 3, 8, 1, 2, 4, 7, 1, 2]).propose(1) == [4]
    assert PromptLookup([0, 1, 2, 3, 8, 1, 2, 4, 0, 1, 2]).propose(1) == [3]
    assert PromptLookup([1, 2, 3, 4]).propose(3) == []
    assert PromptLookup([1, 1, 1]).propose(5) == [1]
    assert PromptLookup([4]).propose(2) == []


@pytest.mark.parametrize("num_drafted", [1, 3, 8])
@pytest.mark.parametrize("prompt", [REPEATING, [3], REPEATING * 3], ids=len)
def test_greedy_text_is_the_same(num_drafted: int, prompt: list[int]) -> None:
    """So it is after several full windows, and with prompts shorter and longer than the context."""
    decoder = Decoder(make_model())
    expected = generate(decoder, prompt, max_new_tokens=60, temperature=0.0)
    found = generate(decoder, prompt, max_new_tokens=60, temperature=0.0, speculative=num_drafted)
    assert found == expected


def test_ids_past_the_tokenizers_are_not_drawn() -> None:
    """An id that may not be drawn is not proposed."""
    decoder = Decoder(make_model())
    options: dict[str, Any] = {"max_new_tokens": 60, "vocab_size": 6, "temperature": 2.0}
    assert max(generate(decoder, [5, 5, 9, 5, 5, 9, 5, 5], **options, speculative=4)) < 6


def test_a_text_that_repeats_takes_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of a small vocabulary soon repeats itself; then one pass of the model gives several ids."""
    decoder = Decoder(make_model(vocab_size=8, context_length=128))
    passes = []
    call = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, ids, **kw: passes.append(ids.shape) or call(self, ids, **kw))
    generate(decoder, [1, 2, 3], max_new_tokens=100, temperature=0.0, speculative=7)
    assert len(passes) < 60


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 3, "temperature": 1.7}], ids=str)
@pytest.mark.parametrize("proposed", [0, 2, 4])
def test_a_checked_id_has_the_plain_distribution(settings: dict[str, Any], proposed: int) -> None:
    """Chi-square over 4,000 draws of five ids, with a proposal that is likely, unlikely or filtered out.

    The bound is the 99.99 % point at 4 degrees of freedom, 23.5; ids of probability 0 never come.
    """
    logits = torch.tensor([1.2, 0.3, -0.5, 0.0, -2.0])
    generator, choice = torch.Generator().manual_seed(proposed), SamplingParams(**settings)
    rows = logits.expand(2, 5)
    draws = [_check_draft(rows.clone(), [proposed], choice, generator)[0] for _ in range(4000)]
    expected = distribution(logits.unsqueeze(0), choice)[0]
    counts = torch.bincount(torch.tensor(draws), minlength=5)
    assert not counts[expected == 0].any()
    wanted = 4000 * expected[expected > 0]
    assert ((counts[expected > 0] - wanted).square() / wanted).sum() < 23.5


def test_pairs_of_ids_have_the_plain_distribution() -> None:
    """Two ids after a repeating prompt, drawn 1,000 times with and without drafts: the same frequencies.

    The statistic of two samples over at most 16 pairs; the bound is the 99.99 % point at 15 degrees of freedom, 44.3.
    """
    decoder = Decoder(make_model(vocab_size=4, context_length=12))
    counts = []
    for speculative in (0, 2):
        generator = torch.Generator().manual_seed(11)
        options: dict[str, Any] = {"max_new_tokens": 2, "generator": generator, "speculative": speculative}
        pairs = [generate(decoder, [1, 2, 3, 1, 2], **options) for _ in range(1000)]
        counts.append(torch.bincount(torch.tensor([4 * a + b for a, b in pairs]), minlength=16).double())
    total = counts[0] + counts[1]
    assert ((counts[0] - counts[1]).square() / total.clamp_min(1)).sum() < 44.3


def test_the_model_itself_is_refused() -> None:
    """Drafts are checked in one pass of a Decoder; the error says how to make one."""
    with pytest.raises(ValueError, match="speculative decoding needs a Decoder"):
        stream(make_model(), [1], max_new_tokens=2, speculative=3)
