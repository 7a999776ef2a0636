"""The Decoder against the model: the same logits, in every variant, whatever pieces the ids are read in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.helpers import make_model
from transformerlm.inference.fast import decoder as decoder_module
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.generate import generate
from transformerlm.models.transformer import TransformerLM

VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_position": "post"},
    {"norm_position": "none"},
    {"position": "none"},
    {"ffn": "silu"},
    {"qk_norm": True},
    {"num_kv_heads": 2},
    {"num_kv_heads": 2, "d_head": 12, "qk_norm": True},
    {"tie_embeddings": True, "num_kv_heads": 1, "qk_norm": True, "norm_eps": 1e-2},
    {"tie_embeddings": True, "norm_position": "post", "attention": "reference"},
    {"logit_soft_cap": 0.5},
]


def make_varied(**changes: Any) -> TransformerLM:
    """A model whose norms have gains that are not 1."""
    model = make_model(**changes)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.fixture(params=["plain", "compiled", "compiled, long prompts plain"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are compiled where they can be; the prompts here are too short to be long ones."""
    if request.param.endswith("plain"):
        monkeypatch.setattr(decoder_module, "_LONG_PROMPT", 1)
    return bool(request.param != "plain")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_are_the_models(changes: dict[str, Any], batch_size: int, compiled: bool) -> None:
    """A prompt, single steps and several ids after others give the logits of one full forward pass."""
    model = make_varied(**changes)
    decoder, ids = Decoder(model, compiled=compiled), torch.randint(257, (batch_size, 16))
    cache = decoder.make_cache(batch_size)
    pieces = [decoder(part, cache=cache) for part in ids.split([5, 1, 1, 4, 1, 4], dim=1)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-4, atol=1e-4)
    assert cache.length == 16


@pytest.mark.parametrize("first", [1, 2, 15])
def test_several_ids_after_any_number_see_none_that_come_later(first: int, compiled: bool) -> None:
    """The causal mask holds after a single id as it does after many."""
    model = make_varied(num_kv_heads=2)
    decoder, ids = Decoder(model, compiled=compiled), torch.randint(257, (2, 16))
    cache = decoder.make_cache(2)
    pieces = [decoder(part, cache=cache) for part in (ids[:, :first], ids[:, first:])]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"norm_position": "post", "qk_norm": True, "tie_embeddings": True}], ids=str)
def test_a_decoder_keeps_the_weights_it_was_made_with(changes: dict[str, Any], compiled: bool) -> None:
    """The model may be trained on: embedding, matrices and gains of the decoder stay."""
    model, ids = make_varied(**changes), torch.randint(257, (1, 8))
    decoder = Decoder(model, compiled=compiled)
    before = decoder(ids, cache=decoder.make_cache(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(decoder(ids, cache=decoder.make_cache(1)), before)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_rows_of_different_lengths_are_as_alone(changes: dict[str, Any]) -> None:
    """Prompts of 3, 7 and 5 ids in slots, then steps of all: each row has the logits it would have by itself."""
    model, counts = make_varied(**changes), [3, 7, 5]
    decoder, ids = Decoder(model, compiled=False), torch.randint(257, (3, 16))
    with torch.no_grad():
        expected = model(ids)
    cache = decoder.make_slots(3, 12)
    last: list[torch.Tensor] = []
    for slot, count in enumerate(counts):
        vectors = decoder.read_chunk(ids[slot : slot + 1, :count], cache=cache, slots=[slot], start=0)
        cache.lengths[slot] = count
        last.append(decoder.head(vectors[:, -1]))
    found = [torch.cat(last)]
    for step in range(4):
        column = [int(row[count + step]) for row, count in zip(ids, counts, strict=True)]
        found.append(decoder.step_slots(column, cache=cache, slots=[0, 1, 2]))
    for row, count in enumerate(counts):
        rows = torch.stack([logits[row] for logits in found])
        torch.testing.assert_close(rows, expected[row, count - 1 : count + 4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_step_of_fixed_shapes_is_the_same(changes: dict[str, Any]) -> None:
    """The step that a GPU captures, with positions on the device and the cache's whole memory, has the same logits."""
    model = make_varied(**changes)
    decoder, ids = Decoder(model, compiled=False), torch.randint(257, (2, 8))
    cache, other = decoder.make_cache(2), decoder.make_cache(2)
    for each in (cache, other):
        decoder(ids, cache=each)
    found = decoder.step_at(ids[:, :1], torch.tensor([8, 8]), other)
    torch.testing.assert_close(found, decoder(ids[:, :1], cache=cache)[:, 0], rtol=1e-4, atol=1e-4)


def test_a_cut_cache_forgets_what_came_after(compiled: bool) -> None:
    """After truncating, other ids in the same positions give the logits of the text with those ids."""
    model = make_varied()
    decoder, ids = Decoder(model, compiled=compiled), torch.randint(257, (1, 10))
    cache = decoder.make_cache(1)
    decoder(ids, cache=cache)
    cache.truncate(4)
    changed = torch.cat((ids[:, :4], ids[:, :3]), dim=1)
    with torch.no_grad():
        expected = model(changed)[:, -3:]
    torch.testing.assert_close(decoder(ids[:, :3], cache=cache), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("piece", [1, 16])
@pytest.mark.parametrize(("int8", "tolerance"), [(False, 0.05), (True, 0.1)])
def test_fewer_bits_stay_near(int8: bool, tolerance: float, piece: int) -> None:
    """bfloat16 and 8-bit weights change logits of standard deviation 1 by a few hundredths, one id at a time too."""
    model = make_model(d_model=64, vocab_size=500)
    ids = torch.randint(500, (1, 16))
    with torch.no_grad():
        expected = model(ids)
    decoder = Decoder(model if int8 else model.to(torch.bfloat16), int8=int8)
    cache = decoder.make_cache(1)
    found = torch.cat([decoder(part, cache=cache) for part in ids.split(piece, dim=1)], dim=1)
    assert found.dtype == torch.float32
    assert (found - expected).square().mean().sqrt() < tolerance * expected.std()
    loss = [torch.nn.functional.cross_entropy(each[0, :-1], ids[0, 1:]) for each in (found, expected)]
    assert abs(loss[0] - loss[1]) < tolerance


def test_a_decoder_keeps_float64() -> None:
    """A model of more than 32 bits, which serves to compare others with, keeps them."""
    model = make_varied().double()
    decoder, ids = Decoder(model), torch.randint(257, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids, cache=decoder.make_cache(1)), model(ids))


def test_what_does_not_fit_is_refused(compiled: bool) -> None:
    """Too many ids, another batch, a cut beyond what there is: the error has the numbers."""
    decoder = Decoder(make_model(), compiled=compiled)
    cache = decoder.make_cache(2, 8)
    with pytest.raises(ValueError, match="0 \\+ 9 positions exceed its max_length of 8"):
        decoder(torch.zeros(2, 9, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="made for a batch of 2, got a batch of 1"):
        decoder(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="max_length 17 exceeds the model's context_length 16"):
        decoder.make_cache(1, 17)
    decoder(torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="cannot keep 2 positions, it holds 1"):
        cache.truncate(2)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_captured_steps_on_a_gpu_are_the_models(changes: dict[str, Any]) -> None:
    """CUDA graphs give the logits of single steps, and the greedy texts also past the end of the context."""
    model = make_varied(**changes).to("cuda")
    decoder, ids = Decoder(model), torch.randint(257, (3, 16), device="cuda")
    cache = decoder.make_cache(3)
    pieces = [decoder(part, cache=cache) for part in ids.split([5, *[1] * 11], dim=1)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-3, atol=1e-3)
    prompt = ids[0, :4].tolist()
    expected = generate(model, prompt, max_new_tokens=40, temperature=0.0)
    assert generate(decoder, prompt, max_new_tokens=40, temperature=0.0) == expected


def test_many_rows_have_the_threads_that_were_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reproducible step of 40 rows is one of 32 and one of 8, each in as many threads as 32 rows have."""
    asked: list[int] = []
    once = Decoder._threads_for
    monkeypatch.setattr(Decoder, "_threads_for", lambda decoder, rows: asked.append(rows) or once(decoder, rows))
    for reproducible, expected in ((True, 32), (False, 40)):
        decoder = Decoder(make_model(), int8=True, reproducible=reproducible)
        cache = decoder.make_slots(40)
        asked.clear()
        decoder._step_some([1] * 40, cache, [*range(40)])
        assert asked == [expected]
