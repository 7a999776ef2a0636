"""The most likely answers to many prompts: those of the plain loop, and how each of them ended."""

from __future__ import annotations

import pytest
import torch

from tests.inference.helpers import greedy_without_cache, make_model, make_tokenizer
from transformerlm.inference.answers import Answer, answers
from transformerlm.inference.generate import NOT_FINITE, Batcher, Decoder

PROMPTS = [[number, 65 + number] for number in range(1, 12)]
TOKENS = 6


def collect(model, prompts=PROMPTS, *, slots=4, **options) -> dict[int, Answer]:
    """Return the answers by the number of their prompt."""
    batcher = Batcher(Decoder(model), slots=slots)
    found = answers(batcher, prompts, tokenizer=make_tokenizer(), max_new_tokens=TOKENS, **options)
    return {answer.number: answer for answer in found}


def drawn(model, prompt) -> list[int]:
    """Return what the plain loop draws."""
    return greedy_without_cache(model, prompt, TOKENS)


def text_of(ids) -> str:
    """Return the text of ids, which may end within a character."""
    return make_tokenizer().decode(ids)


def test_each_prompt_gets_the_answer_of_the_plain_loop():
    """More prompts than slots, each answered once; without an end no answer is whole."""
    model = make_model()
    found = collect(model)
    assert sorted(found) == list(range(len(PROMPTS)))
    for number, prompt in enumerate(PROMPTS):
        assert found[number] == Answer(number, text_of(drawn(model, prompt)), is_whole=False)


def test_an_end_id_makes_an_answer_whole_and_is_no_part_of_it():
    """The same answers, up to the first end id."""
    model = make_model()
    end = drawn(model, PROMPTS[3])[2]
    for number, answer in collect(model, ends=frozenset({end})).items():
        ids = drawn(model, PROMPTS[number])
        expected = ids[: ids.index(end)] if end in ids else ids
        assert answer == Answer(number, text_of(expected), is_whole=end in ids)


def test_a_string_ends_an_answer_too():
    """As with an end that is spelled out in several tokens; the text ends before it, in the answers that have it."""
    model = make_model()
    with torch.no_grad():  # only letters are likely, of which a text can be made
        model.lm_head.weight[:97] = model.lm_head.weight[123:] = 0
    texts = [text_of(drawn(model, prompt)) for prompt in PROMPTS]
    end = texts[3][2:4]
    for number, answer in collect(model, stop=[end]).items():
        before, found, _ = texts[number].partition(end)
        assert answer == Answer(number, before, is_whole=bool(found))


def test_an_answer_to_a_prompt_that_is_cut_follows_the_id_that_starts_texts():
    """The model reads that id and the end of the prompt."""
    model, prompt = make_model(), [7, *range(30, 70)]
    found = collect(model, [prompt], start_id=7)
    assert found[0].text == text_of(greedy_without_cache(model, prompt, TOKENS, start_id=7))


def test_a_damaged_model_is_an_error():
    """Nothing is most likely among logits that are not finite."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=NOT_FINITE[:40]):
        collect(model)
