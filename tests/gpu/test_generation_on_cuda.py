"""Generation on a CUDA device: captured steps, filters and drafts give what a CPU gives."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from tests.inference.helpers import make_model, make_tokenizer
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.generate import Batcher, generate, generate_prompts
from transformerlm.inference.predictor import Predictor
from transformerlm.inference.random_numbers import uniform
from transformerlm.inference.requests import Drawn, Request
from transformerlm.inference.sampling import choose
from transformerlm.inference.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PROMPTS = [[5, 200, 17, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12]]


def test_texts_of_different_lengths_are_the_cpus() -> None:
    """Greedy texts are, past the end of the context too, and each row ends at its own EOS."""
    expected = generate_prompts(Decoder(make_model()), PROMPTS, max_new_tokens=60, temperature=0.0, eos_token_id=42)
    torch.manual_seed(0)
    decoder = Decoder(make_model().to(DEVICE))
    assert generate_prompts(decoder, PROMPTS, max_new_tokens=60, temperature=0.0, eos_token_id=42) == expected


def test_a_graph_gives_the_ids_of_eager_steps() -> None:
    """One launch a step gives equal ids, past the end of the context too (in fp32: bf16 rounds logits to ties)."""
    model = make_model(context_length=64).to(DEVICE)
    texts = [
        generate_prompts(Decoder(model, cuda_graph=captured), PROMPTS, max_new_tokens=150, temperature=0.0)
        for captured in (True, False)
    ]
    assert texts[0] == texts[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_of_another_device_gives_the_same_ids() -> None:
    """The current device is the first; a model on the second is captured and replayed there."""
    model = make_model(context_length=64)
    texts = [
        generate_prompts(Decoder(copy.deepcopy(model).to(device)), PROMPTS, max_new_tokens=40, temperature=0.0)
        for device in ("cuda:0", "cuda:1")
    ]
    assert texts[0] == texts[1]


def test_two_caches_of_one_decoder_do_not_meet() -> None:
    """Two texts take their steps in turn, each with a graph of its own."""
    model = make_model().to(DEVICE)
    decoder, ids = Decoder(model), torch.randint(257, (2, 1, 12), device=DEVICE)
    caches = [decoder.make_cache(1), decoder.make_cache(1)]
    logits: list[list[torch.Tensor]] = [[], []]
    for position in range(12):
        for text in (0, 1):
            logits[text].append(decoder(ids[text][:, position : position + 1], cache=caches[text]))
    for text in (0, 1):
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(logits[text], dim=1), model(ids[text]), rtol=1e-3, atol=1e-3)


def test_the_memory_of_a_graph_is_given_back() -> None:
    """After ten caches have come and gone, no more memory is held than after one."""
    decoder = Decoder(make_model(context_length=512).to(DEVICE))
    held = []
    gc.disable()  # the cache and its graph must not wait for Python to look for cycles
    try:
        for _ in range(10):
            generate(decoder, [1, 2, 3], max_new_tokens=20, temperature=0.0)
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert held[-1] <= held[0]


def test_int8_weights_are_near_the_plain_ones() -> None:
    """The logits of a decoder with 8-bit weights are, with captured steps and without."""
    model = make_model(d_model=64).to(DEVICE)
    ids = torch.randint(257, (2, 9), device=DEVICE)
    found = []
    for captured in (True, False):
        decoder = Decoder(model, int8=True, cuda_graph=captured)
        cache = decoder.make_cache(2)
        found.append(torch.cat([decoder(part, cache=cache) for part in ids.split([5, 1, 1, 1, 1], dim=1)], dim=1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert (found[0] - model(ids)).abs().mean() < 0.05


def test_drafts_change_nothing_in_greedy_text() -> None:
    """At temperature 0 speculative decoding gives the plain text."""
    decoder = Decoder(make_model(context_length=128).to(DEVICE))
    prompt = [1, 2, 3, 4] * 8
    plain = generate(decoder, prompt, max_new_tokens=60, temperature=0.0)
    assert generate(decoder, prompt, max_new_tokens=60, temperature=0.0, speculative=4) == plain


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}], ids=str
)
def test_the_filters_leave_what_they_leave_on_a_cpu(settings: dict[str, Any]) -> None:
    """The same numbers give the same ids, but where rounding differs by chance."""
    logits, generator = torch.randn(400, 500) * 3, torch.Generator(DEVICE).manual_seed(0)
    asked = [SamplingParams(temperature=0.8, **settings)] * len(logits)
    shares = uniform(len(logits), [generator], torch.device(DEVICE))
    found = choose(logits.to(DEVICE), asked, shares).cpu()
    assert (found != choose(logits, asked, shares.cpu())).sum() < 4


def test_a_seed_gives_the_same_text_again() -> None:
    """On the device too, a seed decides the text."""
    predictor = Predictor(make_model(context_length=64).to(DEVICE), make_tokenizer())
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.9, "top_p": 0.9, "seed": 5}
    first = predictor.generate("Hello", **settings)
    assert predictor.generate("Hello", **settings) == first
    assert len(first) > len("Hello")


def test_a_batcher_gives_a_text_the_same_ids_beside_any_others() -> None:
    """All slots in one captured step: greedy ids are the CPU's, with fewer slots than texts and a prefix cache."""
    model = make_model(context_length=64)
    expected = generate_prompts(Decoder(model), PROMPTS * 2, max_new_tokens=40, temperature=0.0)
    decoder = Decoder(model.to(DEVICE), reproducible=True)
    assert decoder.steps_all_slots
    batcher, greedy = (
        Batcher(decoder, slots=3, prefill_chunk=16, prefix_cache_bytes=10**7),
        SamplingParams(temperature=0.0),
    )
    ids: dict[str, list[int]] = {}
    for number, prompt in enumerate(PROMPTS * 2):
        batcher.submit(Request(request_id=str(number), prompt=prompt, max_new_tokens=40, sampling=greedy))
    while not batcher.is_idle:
        for event in batcher.step():
            if isinstance(event, Drawn):
                ids.setdefault(event.request_id, []).append(event.token_id)
    assert [ids[str(number)] for number in range(len(expected))] == expected
