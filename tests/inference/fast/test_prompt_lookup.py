"""Prompt lookup: the same greedy text, the same distribution, fewer passes of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from config.infer import InferConfig
from tests.inference.helpers import make_model
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.fast.prompt_lookup import PromptLookup, _check_draft
from transformerlm.inference.generate import generate, stream
from transformerlm.inference.random_numbers import NUM_AHEAD, RandomNumbers
from transformerlm.inference.sampling import top_k_filter, top_p_filter
from transformerlm.inference.sampling_params import SamplingParams

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
@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_text_is_the_same(num_drafted: int, prompt: list[int], compiled: bool) -> None:
    """So it is after several full windows, and with prompts shorter and longer than the context."""
    decoder = Decoder(make_model(), compiled=compiled)
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
    """Chi-square over 1,500 draws of five ids, with a proposal that is likely, unlikely or filtered out.

    The bound is the 99.99 % point at 4 degrees of freedom, 23.5; ids of probability 0 never come.
    """
    logits = torch.tensor([1.2, 0.3, -0.5, 0.0, -2.0])
    choice, rows = SamplingParams(**settings), logits.expand(2, 5)
    numbers = RandomNumbers(torch.Generator().manual_seed(proposed), torch.device("cpu"))
    draws = [_check_draft(rows, [proposed], choice, numbers)[0] for _ in range(1500)]
    kept = top_p_filter(top_k_filter(logits / choice.temperature, choice.top_k), choice.top_p)
    expected = torch.softmax(kept, dim=-1)
    counts = torch.bincount(torch.tensor(draws), minlength=5)
    assert not counts[expected == 0].any()
    wanted = 1500 * expected[expected > 0]
    assert ((counts[expected > 0] - wanted).square() / wanted).sum() < 23.5


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5, "temperature": 0.7}], ids=str)
def test_a_seed_has_the_same_text_with_drafts_and_without(settings: dict[str, Any]) -> None:
    """Each place takes the number that it takes without drafts; in a small vocabulary, many drafts are taken."""
    decoder = Decoder(make_model(vocab_size=6, context_length=64))
    for seed in range(5):
        texts = [
            generate(
                decoder,
                [1, 2, 3, 1, 2],
                max_new_tokens=50,
                generator=torch.Generator().manual_seed(seed),
                speculative=speculative,
                **settings,
            )
            for speculative in (0, 1, 4)
        ]
        assert texts[0] == texts[1] == texts[2]


def test_drafts_keep_the_id_that_starts_texts() -> None:
    """A seed has the same text with them, past several full windows that begin with it."""
    decoder = Decoder(make_model(vocab_size=6))
    options: dict[str, Any] = {"max_new_tokens": 60, "start_id": 5}
    for prompt in ([5, 1, 2, 1, 2], [5, *[1, 2] * 12], [1, 2] * 12):
        texts = [
            generate(decoder, prompt, **options, speculative=speculative, generator=torch.Generator().manual_seed(3))
            for speculative in (0, 4)
        ]
        assert texts[0] == texts[1]


def test_the_model_itself_is_refused() -> None:
    """Drafts are checked in one pass of a Decoder; the error says how to make one."""
    with pytest.raises(ValueError, match="speculative decoding needs a Decoder"):
        stream(make_model(), [1], max_new_tokens=2, speculative=3)


def test_more_drafts_than_can_be_put_back_are_refused() -> None:
    """The limit is that of the command; up to it, a text whose drafts are refused is drawn to its end."""
    decoder, prompt = Decoder(make_model(context_length=256)), [*range(100), 0, 1, 2]
    options: dict[str, Any] = {"max_new_tokens": 70, "temperature": 50.0}
    assert len(PromptLookup(prompt).propose(NUM_AHEAD)) == NUM_AHEAD
    assert len(generate(decoder, prompt, **options, speculative=NUM_AHEAD)) == 70
    for number in (-1, NUM_AHEAD + 1):
        with pytest.raises(ValueError, match=f"speculative must lie between 0 and 64, got {number}"):
            stream(decoder, prompt, **options, speculative=number)
    with pytest.raises(ValidationError, match="less than or equal to 64"):
        InferConfig.model_validate({"checkpoint": "runs/first", "speculative": NUM_AHEAD + 1})
