"""Penalties, biases and bans: what they change, against the definitions in plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from transformerlm.inference.penalties import Occurrences, Penalties, adjust

VOCAB = 300


def expected_row(
    row: list[float], prompt: list[int], drawn: list[int], penalties: Penalties, banned: set[int]
) -> list[float]:
    """The logits as OpenAI and CTRL define them, id by id."""
    counts, result = Counter(drawn), []
    for token_id, value in enumerate(row):
        if token_id in counts or token_id in prompt:
            value = value / penalties.repetition if value > 0 else value * penalties.repetition
        value -= penalties.presence * (counts[token_id] > 0) + penalties.frequency * counts[token_id]
        value += penalties.logit_bias.get(token_id, 0.0)
        result.append(-math.inf if token_id in banned else value)
    return result


SETTINGS = [
    Penalties(presence=0.7),
    Penalties(frequency=0.3),
    Penalties(frequency=-0.5, presence=-0.1),
    Penalties(repetition=1.3),
    Penalties(repetition=0.8, frequency=0.2, logit_bias={5: 2.0, 17: -100.0}),
    Penalties(logit_bias={0: 1.5}),
]


@pytest.mark.parametrize("penalties", SETTINGS, ids=str)
def test_logits_change_by_the_definitions(penalties: Penalties) -> None:
    """After each of 200 ids, more than there is room for at first, the row is what the definitions say."""
    draws, logits = random.Random(0), torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    prompt = [draws.randrange(VOCAB) for _ in range(40)]
    text, drawn = Occurrences(prompt, penalties, ends={2, 9}, min_tokens=50), []
    for _ in range(200):
        banned = {2, 9} if len(drawn) < 50 else set[int]()
        expected = expected_row(logits[0].tolist(), prompt, drawn, penalties, banned)
        torch.testing.assert_close(adjust(logits, [text])[0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
        drawn.append(draws.choice([id for id in range(VOCAB) if id not in banned]))
        text.add(drawn[-1])


def test_each_row_has_its_own_changes() -> None:
    """Rows that ask for nothing keep their bits; the given logits are not written to, and come back where none asks."""
    logits = torch.randn(3, 9)
    before = logits.clone()
    text = Occurrences([1, 2], Penalties(repetition=2.0))
    found = adjust(logits, [None, text, None])
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert (found[1] != logits[1]).nonzero()[:, 0].tolist() == [1, 2]
    assert torch.equal(logits, before)
    assert adjust(logits, [None, None, None]) is logits


def test_ids_past_the_vocabulary_change_no_other_row() -> None:
    """A prompt may hold ids that cannot be drawn; the rows are a view of wider ones."""
    wide = torch.zeros(2, 12)
    penalties = Penalties(repetition=3.0, logit_bias={11: 7.0, 3: 1.0})
    text = Occurrences([10, 4], penalties, ends={9}, min_tokens=5)
    text.add(3)
    found = adjust(wide[:, :8], [text, None])
    assert found.nonzero().tolist() == [[0, 3]]


def test_what_is_no_number_stays_what_it_is() -> None:
    """A ban stays -inf, and a NaN stays a NaN, which the choice of the id tells."""
    logits = torch.tensor([[-math.inf, math.nan, 1.0]])
    text = Occurrences([0, 1, 2], Penalties(repetition=2.0, presence=1.0))
    assert adjust(logits, [text])[0, 0] == -math.inf
    assert adjust(logits, [text])[0, 1].isnan()


def test_half_precision_is_not_rounded_again() -> None:
    """Changed bfloat16 logits are those in fp32, as the sampler widens them: steps of 1/2 would swallow a penalty."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[0, 3] = 100.0
    texts = [Occurrences([], Penalties(presence=0.2)), Occurrences(list(range(50)), Penalties(repetition=1.7))]
    texts[0].add(3)
    expected, factors = logits.float(), torch.full((50,), 1.7)
    expected[0, 3] -= 0.2
    expected[1] = torch.where(expected[1] > 0, expected[1] / factors, expected[1] * factors)
    found = adjust(logits, texts)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_who_asks_for_nothing_needs_no_occurrences() -> None:
    """The defaults change nothing; each setting does."""
    assert not Occurrences.needed(Penalties())
    assert Occurrences.needed(Penalties(), min_tokens=1)
    assert all(Occurrences.needed(penalties) for penalties in SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presence": math.inf}, "presence must be finite in fp32, got inf"),
        ({"presence": -1e39}, r"presence must be finite in fp32, got -1e\+39"),
        ({"frequency": math.nan}, "frequency must be finite in fp32, got nan"),
        ({"repetition": 0.0}, "repetition must be greater than 0 and finite in fp32, got 0.0"),
        ({"repetition": 1e-50}, "repetition must be greater than 0 and finite in fp32, got 1e-50"),
        ({"logit_bias": {7: math.inf}}, "logit_bias of id 7 must be finite in fp32, got inf"),
        ({"logit_bias": {7: 1e39}}, r"logit_bias of id 7 must be finite in fp32, got 1e\+39"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """Each error names the penalty, its range and what was given."""
    with pytest.raises(ValueError, match=message):
        Penalties(**settings)


@pytest.mark.parametrize(
    "penalties", [Penalties(repetition=1.3), Penalties(logit_bias={id: id / 10 for id in range(200)})]
)
def test_more_ids_than_there_is_room_for_are_known_from_the_start(penalties: Penalties) -> None:
    """A prompt of 200 different ids, and a bias for 200, change all of them before one was drawn."""
    logits, prompt = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)), list(range(200))
    text = Occurrences(prompt, penalties, ends={250}, min_tokens=1)
    expected = expected_row(logits[0].tolist(), prompt, [], penalties, {250})
    torch.testing.assert_close(adjust(logits, [text])[0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
