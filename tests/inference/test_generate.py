"""The decoding loop against one that has no cache, at the end of the context, and at its other edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.helpers import Script, greedy_without_cache, make_model, note_lengths_of_slots
from transformerlm.inference.fast.decoder import Decoder
from transformerlm.inference.generate import generate, generate_batch, generate_prompts, stream
from transformerlm.utils.plain_forms import plain_forms

PROMPT = [5, 200, 17, 3]


@pytest.mark.parametrize("prompt_length", [1, 4, 15, 16, 17, 40])
@pytest.mark.parametrize("changes", [{}, {"position": "none", "num_kv_heads": 2}, {"context_length": 5}])
def test_greedy_decoding_equals_one_without_cache(prompt_length: int, changes: dict[str, Any]) -> None:
    """Within the context, after several full windows, and with prompts longer than the context."""
    model = make_model(**changes)
    prompt = torch.randint(0, 257, (prompt_length,)).tolist()
    assert generate(model, prompt, max_new_tokens=40, temperature=0.0) == greedy_without_cache(model, prompt, 40)


@pytest.mark.parametrize("prompt_length", [1, 15, 40])
@pytest.mark.parametrize("context_length", [1, 2, 3, 5, 16])
def test_each_window_begins_with_the_id_that_starts_texts(context_length: int, prompt_length: int) -> None:
    """One by one, with drafts and side by side, where the prompt begins with it; another prompt is read as ever."""
    model = make_model(context_length=context_length)
    decoder, rest = Decoder(model), torch.randint(0, 257, (prompt_length,)).tolist()
    prompts, options = [[7, *rest], rest], {"max_new_tokens": 40, "temperature": 0.0, "start_id": 7}
    expected = [greedy_without_cache(model, prompt, 40, start_id=7) for prompt in prompts]
    assert [generate(model, prompt, **options) for prompt in prompts] == expected
    assert [generate(decoder, prompt, **options, speculative=3) for prompt in prompts] == expected
    assert generate_prompts(decoder, prompts, **options) == expected


def test_context_of_one_token_still_generates() -> None:
    """In the smallest possible window each token depends only on the one before it."""
    model = make_model(context_length=1)
    found = generate(model, PROMPT, max_new_tokens=6, temperature=0.0)
    assert found == greedy_without_cache(model, PROMPT, 6)


def test_the_model_reads_what_the_page_shows() -> None:
    """The figure in docs/sampling.md: after the prompt one id a step, and half a full window again."""
    model, prompt, read = make_model(context_length=6), PROMPT[:3], []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0][0].tolist()))
    text = prompt + generate(model, prompt, max_new_tokens=6)
    assert read == [text[:3], text[3:4], text[4:5], text[5:6], text[4:7], text[7:8]]


def test_same_seed_same_ids() -> None:
    """Sampling is a function of the generator's state."""
    model = make_model()
    draws = [
        generate(model, PROMPT, max_new_tokens=30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(ids) == 30 for ids in draws)


def test_one_text_and_texts_side_by_side_take_the_same_numbers() -> None:
    """Both draw a generator's numbers the same number at a time: on a GPU, other calls give other numbers."""
    model, left = make_model(), []
    for decode in (generate, lambda *args, **settings: generate_prompts(args[0], [args[1]], **settings)[0]):
        generator = torch.Generator().manual_seed(5)
        found = decode(model, PROMPT, max_new_tokens=70, generator=generator)
        left.append((list(found), torch.rand(1, generator=generator).item()))
    assert left[0] == left[1]


def test_stream_yields_as_it_goes() -> None:
    """A token comes before the next one is computed, and an abandoned stream computes no more."""
    model = Script([10, 20, 30, 40])
    ids = stream(model, PROMPT, max_new_tokens=4, temperature=0.0)
    assert next(ids) == 10
    assert model.calls == 1
    assert next(ids) == 20
    assert model.calls == 2


def test_stops_before_the_end_token() -> None:
    """The end token is not among the ids, and nothing is computed after it."""
    model = Script([10, 20, 256, 30])
    assert generate(model, PROMPT, max_new_tokens=4, temperature=0.0, eos_token_id=256) == [10, 20]
    assert model.calls == 3
    assert generate(model, PROMPT, max_new_tokens=4, temperature=0.0) == [10, 20, 256, 30]


def test_ids_past_the_tokenizers_are_never_drawn() -> None:
    """A model with more ids than its tokenizer draws only those the tokenizer has."""
    model = make_model()
    ids = generate(model, PROMPT, max_new_tokens=200, temperature=5.0, vocab_size=3)
    assert set(ids) == {0, 1, 2}


def test_zero_new_tokens_give_no_ids() -> None:
    """max_new_tokens = 0 gives no ids and does not run the model."""
    model = Script([])
    assert generate(model, PROMPT, max_new_tokens=0) == []
    assert model.calls == 0


def test_batch_rows_are_independent_samples_of_the_prompt() -> None:
    """Greedy rows all equal the single sample; drawn ones differ, and the same seed repeats them."""
    model = make_model()
    single = generate(model, PROMPT, max_new_tokens=25, temperature=0.0)
    assert generate_batch(model, PROMPT, num_samples=3, max_new_tokens=25, temperature=0.0) == [single] * 3
    drawn = [
        generate_batch(model, PROMPT, num_samples=3, max_new_tokens=25, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_batch_rows_end_at_their_own_end_token() -> None:
    """Each row is cut before its first end token; decoding goes on until all have one."""
    model = make_model()
    options = {"num_samples": 8, "max_new_tokens": 60, "vocab_size": 20}
    whole = generate_batch(model, PROMPT, **options, generator=torch.Generator().manual_seed(0))
    cut = generate_batch(model, PROMPT, **options, generator=torch.Generator().manual_seed(0), eos_token_id=7)
    assert cut == [row[: row.index(7)] if 7 in row else row for row in whole]
    assert len({len(row) for row in cut}) > 1


def test_generation_keeps_no_gradients_and_leaves_the_model_trainable() -> None:
    """Sampling in the middle of training does not disturb it."""
    model = make_model().train()
    generate(model, PROMPT, max_new_tokens=3)
    assert torch.is_grad_enabled()
    model(torch.tensor([PROMPT])).sum().backward()
    assert model.token_embeddings.weight.grad is not None


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty; to start a new document pass the end-of-text token's id"),
        ([3, 257], {}, "prompt id 257 is outside the model's vocab_size of 257"),
        ([-1], {}, "prompt id -1 is outside"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        (PROMPT, {"top_p": 2.0}, "top_p must lie between 0 and 1, got 2.0"),
    ],
)
def test_bad_requests_are_refused_at_once(prompt: list[int], options: dict[str, Any], message: str) -> None:
    """The error comes from the call, not from the first token."""
    with pytest.raises(ValueError, match=message):
        stream(make_model(), prompt, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("changes", [{}, {"position": "none", "num_kv_heads": 2}, {"context_length": 5}])
def test_a_decoder_generates_what_its_model_does(changes: dict[str, Any]) -> None:
    """Greedy texts are equal, also after the window has been full several times."""
    model = make_model(**changes)
    expected = greedy_without_cache(model, PROMPT, 40)
    assert generate(Decoder(model), PROMPT, max_new_tokens=40, temperature=0.0) == expected


def test_a_batch_needs_prompts_and_their_generators() -> None:
    """No prompt at all, and two generators for three prompts, are refused."""
    model = make_model()
    with pytest.raises(ValueError, match="expected at least one prompt, got none"):
        generate_prompts(model, [], max_new_tokens=3)
    with pytest.raises(ValueError, match="a generator for each of 3 prompts, got 2"):
        generate_prompts(model, [PROMPT] * 3, max_new_tokens=3, generator=[torch.Generator()] * 2)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        generate_batch(model, PROMPT, num_samples=0, max_new_tokens=3)


@pytest.mark.parametrize("prompt", [torch.tensor([1.5]), [True], [None], torch.tensor([False])])
def test_ids_that_are_not_whole_numbers_are_refused(prompt: Any) -> None:
    """The error names their type and value."""
    with pytest.raises(TypeError, match=r"generate: expected ids, which are whole numbers, got (float|bool|NoneType) "):
        generate(make_model(), prompt, max_new_tokens=1)


def test_a_prompt_of_two_dimensions_is_refused() -> None:
    """The message gives the shape and says what to do."""
    with pytest.raises(ValueError, match=r"expected a prompt in one row, got an array of shape \(1, 2\)"):
        generate(make_model(), torch.tensor([[1, 2]]), max_new_tokens=1)


def test_any_of_several_ends_ends_a_text() -> None:
    """The first one that occurs ends it, in a single text and in each row of a batch."""
    assert generate(Script([10, 30, 20]), PROMPT, max_new_tokens=3, eos_token_id=(20, 30)) == [10]
    model, options = make_model(), {"max_new_tokens": 20, "temperature": 0.0}
    whole = generate(model, PROMPT, **options)
    ends = [whole[4], whole[7]]
    expected = whole[: min(map(whole.index, ends))]
    assert generate_prompts(model, [PROMPT, PROMPT], eos_token_id=ends, **options) == [expected, expected]


def test_new_ids_are_a_list_and_give_one() -> None:
    """`tolist` gives plain numbers, as it does for a tensor or an array."""
    found = generate(Script([10, 20]), PROMPT, max_new_tokens=2)
    assert found == found.tolist() == [10, 20]
    assert type(found.tolist()) is list


def test_a_prompt_may_be_a_tensor_of_one_dimension() -> None:
    """It gives the same ids as the list of its numbers, through the model and through its decoder."""
    model = make_model()
    expected = generate(model, PROMPT, max_new_tokens=5, temperature=0.0)
    for each in (model, Decoder(model)):
        assert generate(each, torch.tensor(PROMPT), max_new_tokens=5, temperature=0.0) == expected
    assert generate_prompts(model, torch.tensor([PROMPT] * 2), max_new_tokens=5, temperature=0.0) == [expected] * 2


@pytest.mark.parametrize("prompt", [torch.tensor([PROMPT]), torch.tensor(5), [PROMPT], [torch.tensor(PROMPT)]], ids=str)
def test_several_rows_are_not_a_prompt(prompt: Any) -> None:
    """The error says what was given and which function takes it."""
    with pytest.raises(ValueError, match=r"expected a prompt in one row, got (an array of shape|lists).*prompts"):
        generate(make_model(), prompt, max_new_tokens=5)


def test_a_text_is_not_a_prompt() -> None:
    """Its letters are not ids."""
    with pytest.raises(TypeError, match="expected ids, got a str; encode it first"):
        generate(make_model(), "text", max_new_tokens=5)  # type: ignore[arg-type]


def test_in_plain_forms_texts_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is handed over to a decoder; the texts are the same, and a decoder that one has is used as it is."""
    model, decoder = make_model(), Decoder(make_model())
    options = {"max_new_tokens": 20, "temperature": 0.0}
    expected = [generate_prompts(one, [PROMPT, PROMPT[:2]], **options) for one in (model, decoder)]
    monkeypatch.setattr(Decoder, "__init__", lambda *arguments, **more: pytest.fail("a decoder was made"))
    with plain_forms():
        assert [generate_prompts(one, [PROMPT, PROMPT[:2]], **options) for one in (model, decoder)] == expected


@pytest.mark.parametrize("reproducible", [True, False])
def test_neighbours_do_not_choose_the_cache_of_a_reproducible_text(
    monkeypatch: pytest.MonkeyPatch, reproducible: bool
) -> None:
    """It has whole contexts whatever the longest text beside it is; another one has what all of them need."""
    lengths = note_lengths_of_slots(monkeypatch)
    decoder = Decoder(make_model(context_length=512), reproducible=reproducible)
    for prompts in ([PROMPT], [PROMPT, PROMPT * 50]):
        generate_prompts(decoder, prompts, max_new_tokens=5)
    assert lengths == ([512, 512] if reproducible else [128, 256])  # whole chunks of a prompt
