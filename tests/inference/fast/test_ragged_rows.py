"""Rows of different lengths side by side: each gets the ids that the plain loop gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.helpers import Script, greedy_without_cache, make_model
from transformerlm.inference import generate as generate_module
from transformerlm.inference.fast import ragged_rows
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.generate import decode, decode_each, generate, generate_prompts
from transformerlm.inference.sampling import SamplingParams

PROMPT = [5, 200, 17, 3]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)], ids=str)
def test_each_row_is_the_plain_loops(params: SamplingParams) -> None:
    """The same ids, drawn with the same generators, past the end of the context; rows of one length too."""
    decoder = Decoder(make_model())
    for prompts in ([PROMPT, [7], PROMPT * 5], [PROMPT, PROMPT[::-1]]):
        options: dict[str, Any] = {"max_new_tokens": 40, "params": params, "vocab_size": 250}
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        together = list(ragged_rows.decode(decoder, prompts, generators=generators, **options))
        for seed, prompt in enumerate(prompts):
            alone = decode(decoder, [prompt], generators=[torch.Generator().manual_seed(seed)], **options)
            assert [int(ids[seed]) for ids in together] == [int(ids) for ids in alone]


@pytest.mark.parametrize("num_generators", [1, 3])
def test_the_plain_twin_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch, num_generators: int) -> None:
    """Row after row by the plain loop, or side by side: the same ids, with one generator for all rows too."""
    decoder, prompts = Decoder(make_model()), [PROMPT, [7], PROMPT * 5]
    options: dict[str, Any] = {"max_new_tokens": 20, "params": SamplingParams(top_p=0.9), "vocab_size": 250}

    def ids() -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(num_generators)]
        return [each.tolist() for each in decode_each(decoder, prompts, generators=generators, **options)]

    together = ids()
    monkeypatch.setattr(generate_module, "decode_ragged_rows", lambda *_, **__: None)
    assert ids() == together


def test_any_language_model_may_have_prompts_of_different_lengths() -> None:
    """A model that is neither a TransformerLM nor a Decoder reads its prompts one by one."""
    assert generate_prompts(Script([1]), [[1], [2, 3]], max_new_tokens=1, temperature=0.0) == [[1], [1]]


@pytest.mark.parametrize("context_length", [16, 6, 5, 4, 2, 1])
def test_prompts_of_different_lengths_are_as_alone(context_length: int) -> None:
    """Each row of a batch drops half its window when it would alone; model and decoder agree."""
    model = make_model(context_length=context_length)
    prompts = [torch.randint(0, 257, (length,)).tolist() for length in (1, 4, 9, 15, 16, 30)]
    expected = [greedy_without_cache(model, prompt, 30) for prompt in prompts]
    for each in (model, Decoder(model)):
        assert generate_prompts(each, prompts, max_new_tokens=30, temperature=0.0) == expected


def test_a_seeded_row_is_the_single_draw() -> None:
    """With a generator for each prompt, a batch draws the ids that single calls draw."""
    decoder, prompts = Decoder(make_model()), [PROMPT, [7], PROMPT[:2]]
    options: dict[str, Any] = {"max_new_tokens": 12, "top_p": 0.9}
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = generate_prompts(decoder, prompts, generator=seeds, **options)
    alone = [
        generate(decoder, prompt, generator=torch.Generator().manual_seed(seed), **options)
        for seed, prompt in enumerate(prompts)
    ]
    assert together == alone
