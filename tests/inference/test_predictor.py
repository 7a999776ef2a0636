"""Text in, text out: whole characters, special tokens, prompts that are empty or too long."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from config.io import dump_toml
from config.schemas import InferSamplingConfig
from config.train import TrainConfig
from tests.checkpoints.helpers import flip_bit
from tests.inference.helpers import EOS, Script, greedy_without_cache, make_model, make_tokenizer, note_lengths_of_slots
from transformerlm.checkpoints.document_ids import DocumentIds
from transformerlm.checkpoints.save import Snapshot, save_checkpoint
from transformerlm.checkpoints.validation import CheckpointError
from transformerlm.inference.predictor import Predictor
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.optim import AdamW


def scripted(output: bytes | list[int], special_tokens: list[str] | None = None) -> Predictor:
    return Predictor(Script(list(output)), make_tokenizer(special_tokens))


def test_generate_keeps_the_prompt_and_stream_yields_only_what_is_new() -> None:
    """`generate` gives the prompt and the joined pieces of `stream`."""
    predictor = scripted(b" world")
    assert predictor.generate("Hello", max_new_tokens=6) == "Hello world"
    assert "".join(predictor.stream("Hello", max_new_tokens=6)) == " world"


def test_characters_are_streamed_whole() -> None:
    """The stream holds half a UTF-8 character back until the rest comes."""
    text = "aé€😀z"
    predictor = scripted(text.encode())
    assert list(predictor.stream("x", max_new_tokens=len(text.encode()))) == ["a", "é", "€", "😀", "z"]


@pytest.mark.parametrize(
    ("output", "expected"),
    [("€".encode()[:2], ["\ufffd"]), (b"a\xff b", ["a", "\ufffd", " ", "b"]), (b"\xe2\x82A", ["\ufffdA"])],
)
def test_broken_characters_become_replacements(output: bytes, expected: list[str]) -> None:
    """Bytes that never become a character become U+FFFD, also at the end, and nothing is lost."""
    pieces = list(scripted(output).stream("x", max_new_tokens=len(output)))
    assert pieces == expected
    assert "".join(pieces) == output.decode("utf-8", "replace")


def test_one_string_is_no_list_of_stop_strings() -> None:
    """Python would take it letter by letter."""
    for call in (scripted("The end").generate, scripted("The end").generate_prompts):
        with pytest.raises(TypeError, match=r"stop: expected a list of strings, found the string 'end'"):
            call("The " if call.__name__ == "generate" else ["The "], max_new_tokens=8, stop="end")


def test_stops_at_the_end_of_text_unless_told_not_to() -> None:
    """The end token is not part of the text; without stop_at_eos it is, spelled out."""
    output = [*b"end", 256, *b"more"]
    assert scripted(output).generate("The ", max_new_tokens=8) == "The end"
    assert scripted(output).generate("The ", max_new_tokens=8, stop_at_eos=False) == f"The end{EOS}more"


def read_ids(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, prompt: str, **options: bool) -> list[int]:
    """Return the ids that the model is given for a prompt."""
    seen: list[int] = []
    monkeypatch.setattr(
        "transformerlm.inference.predictor.stream", lambda model, ids, **_: seen.extend(ids) or iter([])
    )
    list(predictor.stream(prompt, **options))
    return seen


def test_special_tokens_in_a_prompt_are_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's text cannot smuggle in an end of text, unless allow_special is given."""
    predictor = scripted(b"")
    assert read_ids(predictor, monkeypatch, f"a{EOS}") == list(f"a{EOS}".encode())
    assert read_ids(predictor, monkeypatch, f"a{EOS}", allow_special=True) == [ord("a"), 256]


def test_empty_prompt_starts_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes <|endoftext|>; with a tokenizer that has none, it is an error."""
    assert read_ids(scripted(b""), monkeypatch, "") == [256]
    with pytest.raises(ValueError, match="the prompt is empty, and no token is known at which a document starts"):
        scripted(b"", special_tokens=[]).stream("")


def test_long_prompt_warns_and_reads_its_end() -> None:
    """The continuation is that of the last context_length tokens; the whole prompt is in the result."""
    predictor = Predictor(make_model(), make_tokenizer())
    prompt = "The quick brown fox jumps over the lazy dog"
    with pytest.warns(UserWarning, match="has 43 tokens, more than context_length 16"):
        found = predictor.generate(prompt, max_new_tokens=5, temperature=0.0)
    assert found == prompt + "".join(predictor.stream(prompt[-16:], max_new_tokens=5, temperature=0.0))


@pytest.mark.filterwarnings("ignore:the prompt has 44 tokens")
def test_a_long_text_keeps_the_token_that_starts_texts() -> None:
    """Each way to generate begins each window with it, for a model that never saw text without it."""
    ids, prompt = DocumentIds(256, starts_texts=True), "The quick brown fox jumps over the lazy dog"
    predictor, options = Predictor(make_model(), make_tokenizer(), ids), {"max_new_tokens": 30, "temperature": 0.0}
    new = greedy_without_cache(predictor.model, [256, *prompt.encode()], 30, start_id=256)
    expected = prompt + predictor.tokenizer.decode(new)
    assert predictor.generate(prompt, **options) == expected
    assert predictor.generate(prompt, **options, speculative=2) == expected
    assert predictor.generate_prompts([prompt, prompt], **options) == [expected] * 2
    predictor._is_reproducible = predictor._is_fixed = True
    assert predictor.generate(prompt, **options) == expected


def test_seed_decides_the_text() -> None:
    """The same seed gives the same text; no warning for a prompt that fits."""
    predictor = Predictor(make_model(), make_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = [predictor.generate("a", max_new_tokens=12, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_batch_of_samples() -> None:
    """Several texts of one prompt, each with the prompt, the same for the same seed."""
    predictor = Predictor(make_model(), make_tokenizer())
    texts = [predictor.generate_batch("ab", num_samples=3, max_new_tokens=9, seed=1, top_k=50) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    assert all(text.startswith("ab") for text in texts[0])


def test_model_with_more_ids_than_the_tokenizer_writes_only_known_ones() -> None:
    """Padding ids of the model are never drawn."""
    predictor = Predictor(make_model(vocab_size=4000), make_tokenizer())
    assert predictor.generate("a", max_new_tokens=40, temperature=3.0, seed=0)


def test_tokenizer_larger_than_the_model_is_refused() -> None:
    """The error has both sizes."""
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, more than the model's vocab_size of 256"):
        Predictor(make_model(vocab_size=256), make_tokenizer())


@pytest.mark.parametrize("prompt", [["a", "b"], b"abc", None])
def test_a_prompt_is_one_string(prompt: object) -> None:
    """Each way to generate refuses several prompts, bytes and None, with an error that says what it expects."""
    predictor = scripted(b"x")
    for call in (predictor.generate, predictor.stream, lambda bad: predictor.generate_batch(bad, num_samples=2)):
        with pytest.raises(TypeError, match=f"prompt: expected one string, found {type(prompt).__name__}"):
            call(prompt)
    with pytest.raises(TypeError, match=r"prompts\[1\]: expected one string"):
        predictor.generate_prompts(["a", prompt])


def test_a_prompt_of_ids_is_taken_as_it_is() -> None:
    """`stream` goes on from ids as from their text; no ids begin a document."""
    for text in ("ab", ""):
        found, expected = (
            "".join(scripted(b"xyz").stream(one, max_new_tokens=3, temperature=0.0))
            for one in (list(text.encode()), text)
        )
        assert found == expected == "xyz"


def test_one_string_is_not_a_list_of_prompts() -> None:
    """`generate_prompts("the")` would be three texts."""
    with pytest.raises(TypeError, match="prompts: expected a list of strings, found the string 'the'"):
        scripted(b"x").generate_prompts("the")


def test_bf16_model_generates() -> None:
    """Weights in bfloat16 work from prompt to text."""
    predictor = Predictor(make_model().to(torch.bfloat16), make_tokenizer())
    assert len(predictor.generate("a", max_new_tokens=20, seed=0, top_k=26)) > 1


def save_run(directory: Path, model: TransformerLM) -> None:
    """Write a run directory with one checkpoint of `model`."""
    config = TrainConfig.model_validate(
        {
            "model": model.hparams(),
            "data": {"train": "train.npy", "tokenizer": "tokenizer"},
            "training": {"max_steps": 1, "batch_size": 1},
        }
    )
    snapshot = Snapshot.of(
        model, AdamW(model.parameters()), make_tokenizer(), config_toml=dump_toml(config), state={"tokens": 0}
    )
    save_checkpoint(directory / "checkpoints", 1, snapshot)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "num_kv_heads": 2, "norm_position": "post"}])
def test_predictor_from_a_checkpoint_writes_what_the_model_wrote(tmp_path: Path, changes: dict[str, object]) -> None:
    """A run directory and its checkpoint give the same text as the model they hold; bf16 casts the weights."""
    model = make_model(**changes)
    save_run(tmp_path, model)
    expected = Predictor(model, make_tokenizer()).generate("abc", max_new_tokens=20, seed=5)
    for path in (tmp_path, str(tmp_path / "checkpoints" / "step-00000001")):
        assert Predictor.from_checkpoint(path, device="cpu").generate("abc", max_new_tokens=20, seed=5) == expected
    half = Predictor.from_checkpoint(tmp_path, device="cpu", precision="bf16")
    assert half.model.token_embeddings.weight.dtype == torch.bfloat16
    assert half.generate("abc", max_new_tokens=4, seed=5).startswith("abc")


def test_from_checkpoint_refuses_what_is_not_there(tmp_path: Path) -> None:
    """A directory without a checkpoint and an unknown device are ValueErrors."""
    with pytest.raises(ValueError, match="expected a checkpoint"):
        Predictor.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="device: expected auto"):
        Predictor.from_checkpoint(tmp_path, device="gpu")


def test_nobody_who_generates_needs_the_optimizer(tmp_path: Path) -> None:
    """A damaged optimizer's file harms no text; damaged weights are refused, and a run's older checkpoint is used."""
    save_run(tmp_path, make_model())
    directory = tmp_path / "checkpoints" / "step-00000001"
    flip_bit(directory / "optimizer.safetensors")
    for path in (tmp_path, directory):
        assert Predictor.from_checkpoint(path, device="cpu").checkpoint == directory
    flip_bit(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Predictor.from_checkpoint(directory, device="cpu")


def test_slots_take_what_the_longest_prompt_and_its_text_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caller knows the longest prompt, and a text need not be the same beside others; else whole contexts."""
    predictor = Predictor(make_model(context_length=512), make_tokenizer())
    lengths = note_lengths_of_slots(monkeypatch)
    prompts = ["abc", "", "é" * 4]
    assert [predictor.num_tokens(prompt) for prompt in [*prompts, "x" * 999]] == [3, 1, 8, 512]
    settings: dict[str, Any] = {"slots": 2, "max_new_tokens": 5, "temperature": 0.0}
    texts = [
        list(predictor.generate_each([(one, 0) for one in prompts], longest_prompt=longest, **settings))
        for longest in (8, None)
    ]
    assert texts[0] == texts[1]
    predictor._is_reproducible = True
    assert len(list(predictor.generate_each([("abc", 0)], longest_prompt=3, **settings))) == 1
    assert lengths == [128, 512, 512]  # whole chunks of a prompt


def test_drafts_do_not_freeze_a_model_that_may_change() -> None:
    """A model given to the constructor is used as it is at that moment, also after a text with `speculative`."""
    predictor = Predictor(make_model(), make_tokenizer())
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "stop_at_eos": False}
    predictor.generate("abab", speculative=3, **settings)
    with torch.no_grad():
        predictor.model.token_embeddings.weight.neg_()
    fresh = Predictor(predictor.model, predictor.tokenizer).generate("abab", **settings)
    assert predictor.generate("abab", **settings) == fresh
    assert predictor.generate("abab", speculative=3, **settings) == fresh


def test_documents_begin_and_end_where_the_predictor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The id before a document may differ from the one that ends it, and several ids may end it."""
    tokenizer = make_tokenizer([EOS, "<s>", "</s>"])
    ids = DocumentIds(bos_token_id=257, eos_token_ids=(258, 256))
    predictor = Predictor(Script([*b"ab", 256, *b"cd"], vocab_size=259), tokenizer, ids)
    assert predictor.generate("x", max_new_tokens=5) == "xab"
    assert read_ids(predictor, monkeypatch, "") == [257]
    assert predictor.eos_token_id == 258


def test_one_text_is_not_taken_for_several() -> None:
    """Its letters would be the prompts."""
    with pytest.raises(TypeError, match="prompts: expected a list of strings, found the string 'the'"):
        Predictor(make_model(), make_tokenizer()).generate_prompts("the")


def test_a_predictor_shows_its_sizes() -> None:
    """Its repr has the parameters, context, vocabulary, precision and device."""
    text = repr(Predictor(make_model(), make_tokenizer()))
    assert re.fullmatch(
        r"Predictor\([\d,]+ parameters, context_length=16, vocab_size=257, 257 tokens, float32, cpu\)", text
    )


@pytest.mark.parametrize("name", ["stream", "generate", "generate_batch", "generate_prompts", "generate_each"])
def test_every_way_to_generate_names_its_settings(name: str) -> None:
    """Editors and `help` show each setting: none is hidden in `**settings`, and the defaults are the same."""
    parameters = inspect.signature(getattr(Predictor, name)).parameters
    expected = inspect.signature(Predictor.stream).parameters
    for setting in {*InferSamplingConfig.model_fields, "allow_special"}:
        assert parameters[setting] == expected[setting]
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def test_settings_beyond_the_filters_reach_every_way_to_generate() -> None:
    """Penalties, the earliest end and stop strings: one text, several, and several in turn are the same."""
    predictor = Predictor(make_model(), make_tokenizer())
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.0}
    plain = predictor.generate("ab", **options)
    settings = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.2, "min_tokens": 3}
    changed = predictor.generate("ab", **options, **settings)
    assert changed != plain
    stop = changed[-9:-8]
    assert predictor.generate("ab", **options, **settings, stop=[stop]) == "ab" + changed[2:].partition(stop)[0]
    for extra in ({}, {"stop": [stop]}):
        one = predictor.generate("ab", **options, **settings, **extra)
        assert predictor.generate_prompts(["ab", "ab"], **options, **settings, **extra) == [one, one]
        assert predictor.generate_batch("ab", num_samples=2, **options, **settings, **extra) == [one, one]
        each = predictor.generate_each([("ab", 1), ("ab", 2)], slots=2, **options, **settings, **extra)
        assert ["ab" + text for text in each] == [one, one]


def test_drafts_know_no_penalties() -> None:
    """An error says so, rather than a text that ignores them."""
    predictor = Predictor(make_model(), make_tokenizer())
    predictor.prepare()
    with pytest.raises(ValueError, match="speculative decoding knows no penalties"):
        predictor.generate("ab", speculative=2, presence_penalty=1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_reproducible_predictor_gives_one_text_in_every_way(tmp_path: Path, precision: str) -> None:
    """Streamed, with others, in turn and by a batcher of more slots: the same text for prompt and seed."""
    model = make_model(context_length=32, d_model=48, num_heads=4)
    save_run(tmp_path, model)
    predictor = Predictor.from_checkpoint(tmp_path, device="cpu", precision=precision, reproducible=True)
    prompts, options = ["a", "The cat", "x" * 40, "The cat"], {"max_new_tokens": 30, "temperature": 1.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one prompt is longer than the context
        alone = [predictor.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
        assert predictor.generate_prompts(prompts, seeds=range(4), **options) == alone
        each = predictor.generate_each(zip(prompts, range(4), strict=True), slots=3, **options)
        assert [prompt + text for prompt, text in zip(prompts, each, strict=True)] == alone
