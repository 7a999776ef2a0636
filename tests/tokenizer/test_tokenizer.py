"""Behaviour of encoding and decoding: exact round trips, any cut of a stream, and the ids other libraries give."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.pace import cost
from tests.tokenizer.test_pretokenize import ANY_TEXT
from transformerlm.tokenizer import Tokenizer, io, reference, train_bpe
from transformerlm.tokenizer.pair_table import learn_merges
from transformerlm.tokenizer.pretokenize import GPT2_PATTERN, pre_tokenize

EOT = "<|endoftext|>"
HARD_TEXT = (
    "The quick brown fox isn't here; it's there, they'll say. I'VE 42 apples, 3.14 pies & ½ a ²nd.\r\n\r\n"
    "\tTabs\t\tand    spaces   \n\n\n  漢字かな交じり文。全角　空白  Ünïcödé naïve façade Straße ΑΒΓ абв עברית "
    "العربية हिन्दी ไทย 한국어 e\u0301 👩‍👩‍👧 🇩🇪 \u200b\u00a0\u2028\x1c\x85 ''s 'll 're' don''t   x=y+z!?!... "
    "--- ===== a_b_c CamelCase \ufeffBOM\n"
) * 3


def _train(text: str, num_merges: int = 200) -> list[tuple[bytes, bytes]]:
    words: dict[bytes, int] = {}
    for piece in pre_tokenize(text):
        words[piece.encode()] = words.get(piece.encode(), 0) + 1
    return learn_merges(words, num_merges)


def _build(merges: list[tuple[bytes, bytes]], specials: tuple[str, ...] = (EOT,)) -> Tokenizer:
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in merges]
    return Tokenizer(dict(enumerate(tokens)), merges, specials)


MERGES = _train(HARD_TEXT)
TOKENIZER = _build(MERGES, (EOT, EOT + EOT, "<|e|>", "a b", "\n\n", "'s"))


@settings(deadline=None)
@given(text=ANY_TEXT)
def test_decoding_gives_the_text_back(text: str) -> None:
    """Nothing is normalised or lost, with special tokens and without."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode_ordinary(text)) == text


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from([EOT, "<|e|>", "<|", "a", " b", "'", "s", "ll", "\n", "  ", "漢", "x" * 90])),
    data=st.data(),
)
@example(text=[EOT, EOT], data=None)
def test_a_stream_in_any_parts_has_the_ids_of_the_whole(text: list[str], data: st.DataObject | None) -> None:
    """Special tokens, runs of blanks, contractions and long words may be cut anywhere."""
    whole = "".join(text)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12)) if data else list(range(len(whole)))
    parts = [whole[start:stop] for start, stop in pairwise([0, *sorted(cuts), len(whole)])]
    assert list(TOKENIZER.encode_iterable(parts)) == TOKENIZER.encode(whole)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_hard_text_in_parts_of_one_size(size: int) -> None:
    """Every cut between two characters of a hard text is harmless, down to single characters."""
    whole = f"{HARD_TEXT}{EOT}{EOT}<|endoftext|{HARD_TEXT}{' ' * 300}x{'y' * 5000}"
    parts = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert list(TOKENIZER.encode_iterable(parts)) == TOKENIZER.encode(whole)


def test_encode_iterable_is_lazy() -> None:
    """The first ids come before the source is read to its end, even from one that has none."""

    def endless() -> object:
        while True:
            yield "one two three\n"

    ids = TOKENIZER.encode_iterable(endless())
    first = [next(ids) for _ in range(1000)]
    assert TOKENIZER.decode(first).startswith("one two three\none two")


def test_encode_iterable_holds_little_memory() -> None:
    """Three megabytes pass through in less than two megabytes of memory."""
    line = "Once upon a time there was a little tokenizer.\n"
    list(TOKENIZER.encode_iterable([line]))
    tracemalloc.start()
    num_ids = sum(1 for _ in TOKENIZER.encode_iterable(line for _ in range(3_000_000 // len(line))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_ids > 60_000
    assert peak < 2_000_000


def test_special_tokens_are_ids_of_their_own() -> None:
    """The longest special token wins, a missing one gets the next id, and plain encoding spells them out."""
    tokenizer = _build([(b"b", b"c")], ("<|a|>", "<|a|><|a|>", "bc"))
    assert tokenizer.special_token_ids == {"<|a|>": 257, "<|a|><|a|>": 258, "bc": 256}
    assert tokenizer.encode("x<|a|><|a|><|a|>bc") == [120, 258, 257, 256]
    assert tokenizer.encode_ordinary("<|a|>") == list(b"<|a|>")
    assert tokenizer.vocab_size == 259
    assert tokenizer.special_tokens == ["<|a|>", "<|a|><|a|>", "bc"]
    assert tokenizer.decode([258, 256]) == "<|a|><|a|>bc"


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_ids_decode(ids: list[int]) -> None:
    """Invalid UTF-8 becomes U+FFFD, as in Python's decoder; `decode_bytes` returns the bytes exactly."""
    data = b"".join(TOKENIZER.vocab[token_id] for token_id in ids)
    assert TOKENIZER.decode_bytes(iter(ids)) == data
    assert TOKENIZER.decode(np.array(ids, dtype=np.uint16)) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("bad", [-1, TOKENIZER.vocab_size, 10**9])
def test_ids_outside_the_vocabulary_are_named(bad: int) -> None:
    """The error names the id and the size of the vocabulary."""
    with pytest.raises(ValueError, match=rf"expected 0 to \d+ \(vocab_size {TOKENIZER.vocab_size}\), found {bad}"):
        TOKENIZER.decode([0, bad])


def test_half_a_character_is_replaced() -> None:
    """A lone surrogate, which UTF-8 cannot spell, counts as U+FFFD."""
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a\ufffdb"
    assert TOKENIZER.bytes_per_token("\ud800") > 0


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=())), size=st.integers(1, 3))
@example(text="👍\U0001d49cb", size=1)
@example(text="a\ud83d", size=1)
def test_two_halves_of_a_character_are_that_character(text: str, size: int) -> None:
    """Two halves, as JavaScript or JSON read in pieces spell them, are joined in a text, a batch, and between parts."""
    halves = text.encode("utf-16-le", "surrogatepass")
    split = "".join(chr(int.from_bytes(halves[place : place + 2], "little")) for place in range(0, len(halves), 2))
    whole = halves.decode("utf-16-le", "replace")
    expected = TOKENIZER.encode(whole)
    assert TOKENIZER.decode(expected) == whole
    assert TOKENIZER.encode(split) == TOKENIZER.encode_batch([split])[0] == expected
    assert TOKENIZER.encode_ordinary(split) == TOKENIZER.encode_ordinary(whole)
    parts = [split[place : place + size] for place in range(0, len(split), size)]
    assert list(TOKENIZER.encode_iterable(parts)) == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda: TOKENIZER.encode_batch("the"),
        lambda: TOKENIZER.encode_batch_to_array("the"),
        lambda: Tokenizer(TOKENIZER.vocab, MERGES, EOT),
        lambda: train_bpe("a.txt", 300, EOT),
    ],
)
def test_one_string_is_no_list_of_strings(call: Callable[[], object]) -> None:
    """Taken letter by letter, it would give a wrong result that nobody notices."""
    with pytest.raises(TypeError, match=r"expected a list of strings, found the string '(the|<.endoftext.>)'"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TOKENIZER.encode(None), "text: expected one string, found NoneType None"),
        (lambda: TOKENIZER.encode(b"abc"), r"text: expected one string, found bytes b'abc' \(decode it first\)"),
        (lambda: TOKENIZER.encode_ordinary(["a"]), "text: expected one string, found list"),
        (lambda: list(TOKENIZER.encode_iterable(["a", None])), "parts: expected one string, found NoneType"),
        (lambda: TOKENIZER.encode_batch(None), "texts: expected a list of strings, found NoneType"),
        (lambda: TOKENIZER.encode_batch(["a", None]), r"texts\[1\]: expected one string, found NoneType"),
        (lambda: TOKENIZER.encode_batch_to_array(["a", b"b"]), r"texts\[1\]: expected one string, found bytes"),
        (lambda: TOKENIZER.encode_batch(["a"], num_workers=1.5), "num_workers: expected a whole number, found float"),
        (lambda: TOKENIZER.decode([True]), r"ids: expected whole numbers in one row, .*bool True"),
        (lambda: TOKENIZER.decode([True] * 1000), r"ids: expected whole numbers in one row, .*bool True"),
        (lambda: TOKENIZER.decode(np.array([False])), r"ids: expected whole numbers in one row, .*bool False"),
        (lambda: TOKENIZER.decode([1.0]), r"ids: expected whole numbers in one row, .*float 1\.0"),
    ],
)
def test_other_types_are_refused_in_words(call: Callable[[], object], message: str) -> None:
    """The error names what was found in the place of a text, a list of texts or an id, and what was expected."""
    with pytest.raises(TypeError, match=message):
        call()


def test_special_tokens_of_one_byte_are_refused() -> None:
    """They are refused as in training: such a byte is a token already."""
    with pytest.raises(ValueError, match=r"special_tokens: expected two bytes or more, found '\\n'"):
        _build(MERGES, ("\n",))


@pytest.mark.parametrize("ids", [np.array([[1, 2]]), np.array(3)])
def test_ids_in_other_than_one_row_are_refused(ids: np.ndarray) -> None:
    """The message names the shape."""
    with pytest.raises(ValueError, match=r"ids: expected one row of ids, found an array of shape \("):
        TOKENIZER.decode(ids)
    with pytest.raises(TypeError, match="ids: expected whole numbers in one row"):
        TOKENIZER.decode([[1, 2]])  # type: ignore[list-item]


@pytest.mark.parametrize("num_workers", [0, -1])
def test_fewer_workers_than_one_are_refused(num_workers: int) -> None:
    """The error names the argument, whichever engine is used."""
    for call in (TOKENIZER.encode_batch, partial(TOKENIZER.encode_batch_to_array)):
        with pytest.raises(ValueError, match=f"num_workers: expected at least 1, found {num_workers}"):
            call(["a"], num_workers=num_workers)


def test_the_repr_shows_sizes() -> None:
    """It shows what a person wants to know of a tokenizer, and not its whole vocabulary."""
    assert repr(TOKENIZER) == (
        f"Tokenizer(vocab_size={TOKENIZER.vocab_size}, merges=200, special_tokens=6, pattern='gpt2', engine='auto')"
    )


def test_ids_are_those_of_tiktoken() -> None:
    """Given the same merges, OpenAI's library gives the same ids on hard text and on long runs."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: token_id for token_id, token in _build(MERGES, ()).vocab.items()}
    other = tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks), EOT + EOT: len(ranks) + 1}
    )
    ours = _build(MERGES, (EOT, EOT + EOT))
    rng = random.Random(0)
    for length in [0, 10, 100, 1000, len(HARD_TEXT)]:
        text = "".join(rng.choices(HARD_TEXT, k=length)) + EOT + HARD_TEXT[:length]
        assert ours.encode(text) == other.encode(text, allowed_special="all")
        assert ours.encode_ordinary(text) == other.encode_ordinary(text)


def test_ids_are_those_of_hugging_face(tmp_path: Path) -> None:
    """Built from our saved files, Hugging Face's byte-level BPE gives the same ids."""
    tokenizers = pytest.importorskip("tokenizers")
    ours = _build(MERGES)
    ours.save(tmp_path)
    other = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    other.add_special_tokens([EOT])
    assert other.get_vocab_size() == ours.vocab_size
    text = HARD_TEXT + EOT + HARD_TEXT[::-1]
    assert other.encode(text).ids == ours.encode(text)


@pytest.mark.skipif("TRANSFORMERLM_GPT2_DIR" not in os.environ, reason="TRANSFORMERLM_GPT2_DIR names no folder")
def test_gpt2s_own_files_give_tiktokens_ids() -> None:
    """With GPT-2's published vocabulary the ids are OpenAI's, although its ids of bytes are not the bytes' values."""
    tiktoken = pytest.importorskip("tiktoken")
    folder = Path(os.environ["TRANSFORMERLM_GPT2_DIR"])
    ours = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", [EOT])
    assert (ours.vocab_size, ours.special_token_ids) == (50257, {EOT: 50256})
    ranks = {token: token_id for token_id, token in ours.vocab.items() if token != EOT.encode()}
    other = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 50256})
    for text in (HARD_TEXT, HARD_TEXT[::-1] + EOT, "a" * 3000, "Hello, world!"):
        assert ours.encode(text) == other.encode(text, allowed_special="all")
    assert ours.encode("Hello, world!") == [15496, 11, 995, 0]


def test_ids_need_not_be_byte_values() -> None:
    """A vocabulary in any order of ids works, as GPT-2's does."""
    plain = _build(MERGES, ())
    order = list(range(plain.vocab_size))
    random.Random(0).shuffle(order)
    shuffled = Tokenizer({order[token_id]: token for token_id, token in plain.vocab.items()}, MERGES)
    assert shuffled.encode(HARD_TEXT) == [order[token_id] for token_id in plain.encode(HARD_TEXT)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_batch_is_its_texts_one_by_one(num_workers: int) -> None:
    """The order and empty texts are kept, with any number of processes."""
    texts = ["one", "", HARD_TEXT, EOT] * 5
    assert TOKENIZER.encode_batch(texts, num_workers) == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch([]) == []
    ordinary = [TOKENIZER.encode_ordinary(text) for text in texts]
    assert TOKENIZER.encode_batch(texts, num_workers, allow_special=False) == ordinary


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long pieces are not kept, a full cache is emptied, and the ids stay the same."""
    monkeypatch.setattr(reference, "CACHE_PIECES", 5)
    tokenizer = _build(MERGES)
    assert tokenizer.decode(tokenizer.encode(HARD_TEXT + "x" * 99)) == HARD_TEXT + "x" * 99
    assert len(tokenizer._engines.reference.cache) <= 5
    assert all(len(piece) <= 32 for piece in tokenizer._engines.reference.cache)
    assert tokenizer.encode(HARD_TEXT) == _build(MERGES).encode(HARD_TEXT)


def test_pickling_keeps_the_tokenizer_and_drops_the_cache() -> None:
    """A worker process gets the parts, not what the parent has cached."""
    TOKENIZER.encode(HARD_TEXT)
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert len(copy._engines.reference.cache) == 0
    assert copy.fingerprint() == TOKENIZER.fingerprint()
    assert copy.encode(HARD_TEXT) == TOKENIZER.encode(HARD_TEXT)


def test_arrays_have_the_smallest_type() -> None:
    """uint16 while all ids fit, uint32 beyond; the ids are those of `encode`."""
    small = TOKENIZER.encode_to_array(HARD_TEXT)
    assert small.dtype == np.uint16
    assert small.tolist() == TOKENIZER.encode(HARD_TEXT)
    tokens = [bytes([value]) for value in range(256)] + [f"<{number}>".encode() for number in range(65_281)]
    assert Tokenizer(dict(enumerate(tokens)), []).encode_to_array("a").dtype == np.uint32
    assert Tokenizer(dict(enumerate(tokens[:-1])), []).encode_to_array("a").dtype == np.uint16


def test_byte_lengths_and_bytes_per_token() -> None:
    """Lengths by id give the text's bytes, special tokens give none."""
    tokenizer = _build(MERGES)
    lengths = tokenizer.token_byte_lengths()
    ids = tokenizer.encode(HARD_TEXT + EOT)
    assert sum(lengths[token_id] for token_id in ids) == len(HARD_TEXT.encode())
    assert lengths[tokenizer.special_token_ids[EOT]] == 0
    assert _build([(b"a", b"b")]).bytes_per_token("abab漢") == 7 / 5
    with pytest.raises(ValueError, match="bytes_per_token: expected some text"):
        TOKENIZER.bytes_per_token("")


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    """Merges, their order and special tokens count; the order in which the dictionary was built does not."""
    base = _build(MERGES)
    swapped = [MERGES[1], MERGES[0], *MERGES[2:]]
    others = [
        _build(MERGES[:-1]),
        _build(MERGES, ()),
        _build(MERGES, ("<|other|>",)),
        Tokenizer(base.vocab, swapped, [EOT]),
    ]
    assert len({tokenizer.fingerprint() for tokenizer in [base, *others]}) == 5
    backwards = dict(reversed(base.vocab.items()))
    assert Tokenizer(backwards, MERGES, [EOT]).fingerprint() == base.fingerprint()


_BYTES = [bytes([value]) for value in range(256)]


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({0: b"a"}, [], "expected all 256 single bytes, found none for byte 0"),
        ({**dict(enumerate(_BYTES)), 300: b"ab"}, [], "found none with id 256"),
        ({**dict(enumerate(_BYTES)), 256: b"a"}, [], "each token once, found b'a'"),
        (dict(enumerate(_BYTES)), [(b"a", b"b")], "merge 0: expected tokens"),
    ],
)
def test_parts_that_do_not_fit_are_refused(vocab: dict[int, bytes], merges: list, message: str) -> None:
    """The constructor checks like the reader of files does."""
    with pytest.raises(ValueError, match=message):
        Tokenizer(vocab, merges)


def test_a_long_run_of_one_character_is_quick() -> None:
    """200,000 equal letters in one word are encoded within seconds, streamed in small parts too."""
    tokenizer = _build(learn_merges({b"a" * 1000: 1}, 12))
    ids: list[int] = []
    streamed: list[int] = []
    assert cost(lambda: ids.extend(tokenizer.encode("a" * 200_000))) < 7
    assert cost(lambda: streamed.extend(tokenizer.encode_iterable("a" * 100 for _ in range(2000)))) < 7
    assert streamed == ids


def test_trained_tokenizers_round_trip_through_files(tmp_path: Path) -> None:
    """The way from text to merges to files to ids ends at the same text."""
    (tmp_path / "a.txt").write_bytes(f"{HARD_TEXT}{EOT}{HARD_TEXT}".encode())
    vocab, merges = train_bpe(tmp_path / "a.txt", 400, [EOT])
    Tokenizer(vocab, merges, [EOT]).save(tmp_path / "tokenizer")
    loaded = Tokenizer.from_directory(tmp_path / "tokenizer")
    assert json.loads((tmp_path / "tokenizer/vocab.json").read_text(encoding="utf-8"))[EOT] == 399
    assert loaded.decode(loaded.encode(HARD_TEXT)) == HARD_TEXT
    assert loaded.bytes_per_token(HARD_TEXT) > 1.5


def test_a_merges_file_that_was_cut_is_refused(tmp_path):
    """Without its last merges the tokenizer would give other ids silently; the error names a token without a merge."""
    _build(MERGES).save(tmp_path)
    merges = tmp_path / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines(keepends=True)
    merges.write_text("".join(lines[:-1]), encoding="utf-8")
    last = repr(io.token_to_text(b"".join(MERGES[-1])))
    message = (
        rf"merges\.txt: expected a merge for each token .* found none for {re.escape(last)} \(id {255 + len(MERGES)}\)"
    )
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_files(tmp_path / "vocab.json", merges, [EOT])
    merges.write_text("".join(lines), encoding="utf-8")
    plain = Tokenizer.from_files(tmp_path / "vocab.json", merges)  # as course code reads GPT-2's files
    assert len(plain.encode(EOT)) > 1


def test_encode_file_takes_one_file(tmp_path):
    """A folder or glob of several files is refused: the ids would be those of the first."""
    tokenizer = Tokenizer({index: bytes([index]) for index in range(256)}, [])
    (tmp_path / "a.txt").write_text("a")
    assert tokenizer.encode_file(tmp_path).tolist() == [ord("a")]
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=f"expected one file, found 2 at {tmp_path}"):
        tokenizer.encode_file(tmp_path)


@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_a_file_has_more_ids_than_its_beginning_lets_expect(engine, tmp_path, monkeypatch):
    """The array of the ids grows where later parts have more of them for each byte, and is as long as they are."""
    monkeypatch.setattr("transformerlm.tokenizer.tokenizer._FILE_CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr("transformerlm.tokenizer.tokenizer._FILE_PIECE_CHARS", 1 << 12)
    monkeypatch.setattr("transformerlm.tokenizer.tokenizer._EXPECTED_IDS", 1 << 10)
    text = "the the the the " * 2_000 + "x y z 1 2 3 " * 4_000 + "the the " * 2_000
    merges = _train("the the the the the", 3)
    tokens = [*(bytes([index]) for index in range(256)), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(dict(enumerate(tokens)), merges, engine=engine)
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer.encode_file(tmp_path / "a.txt", num_workers=1)
    assert ids.tolist() == tokenizer.encode(text)
    assert ids.base is None
    assert ids.dtype == np.uint16
    (tmp_path / "empty.txt").write_text("")
    assert tokenizer.encode_file(tmp_path / "empty.txt").tolist() == []


# --- more special tokens ----------------------------------------

SHORT_MERGES = [(b"t", b"h"), (b"th", b"e")]
SHORT_VOCAB = dict(enumerate([*(bytes([value]) for value in range(256)), b"th", b"the", EOT.encode()]))
SHORT = Tokenizer(SHORT_VOCAB, SHORT_MERGES, [EOT])
CHATML = ["<|im_start|>", "<|im_end|>"]


def test_old_ids_stay_and_new_ones_follow(tmp_path) -> None:
    """The new tokens are found in text, all else has the ids it had, and the files give the same tokenizer back."""
    longer = SHORT.with_special_tokens(CHATML)
    assert {number: longer.vocab[number] for number in range(SHORT.vocab_size)} == SHORT.vocab
    assert longer.special_token_ids == {EOT: 258, "<|im_start|>": 259, "<|im_end|>": 260}
    assert longer.encode(f"the <|im_end|>{EOT}") == [*SHORT.encode("the "), 260, 258]
    longer.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).fingerprint() == longer.fingerprint() != SHORT.fingerprint()


def test_a_token_that_is_special_already_keeps_its_id() -> None:
    """Adding it changes nothing, and adding it twice neither."""
    assert SHORT.with_special_tokens([EOT]).fingerprint() == SHORT.fingerprint()
    again = SHORT.with_special_tokens([*CHATML, EOT, *CHATML]).with_special_tokens(CHATML)
    assert again.fingerprint() == SHORT.with_special_tokens(CHATML).fingerprint()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["the"], "found 'the', which is the ordinary token 257"),
        (["x"], "expected two bytes or more, found 'x'"),
        (["Ġa"], "expected tokens that vocab.json can tell from all others, found 'Ġa'"),
        ([f"<|{number}|>" for number in range(10_000)], "found 1 and 10,000 more"),
    ],
)
def test_what_cannot_be_added_is_refused(tokens, message) -> None:
    """An ordinary token, a byte, what the files could not tell from one, and too many."""
    with pytest.raises(ValueError, match=re.escape(message)):
        SHORT.with_special_tokens(tokens)


def test_one_string_is_not_a_list_of_tokens() -> None:
    """It would be read as its letters."""
    with pytest.raises(TypeError, match="special_tokens"):
        SHORT.with_special_tokens("<|im_start|>")


def test_ids_of_the_shorter_tokenizer_are_known_by_its_fingerprint() -> None:
    """Only a tokenizer of the same first ids is extended, and only by special tokens."""
    longer = SHORT.with_special_tokens(CHATML)
    assert longer.extends(SHORT.fingerprint(), SHORT.vocab_size)
    assert longer.with_special_tokens(["<|more|>"]).extends(SHORT.fingerprint(), SHORT.vocab_size)
    assert not SHORT.extends(longer.fingerprint(), longer.vocab_size)
    assert not SHORT.extends(SHORT.fingerprint(), SHORT.vocab_size)
    assert not longer.extends(SHORT.fingerprint(), SHORT.vocab_size + 1)
    other = Tokenizer({**SHORT_VOCAB, 258: b"<|endoftexts|>"}, SHORT_MERGES, ["<|endoftexts|>"])
    assert not other.with_special_tokens(CHATML).extends(SHORT.fingerprint(), SHORT.vocab_size)


def test_a_longer_vocabulary_of_ordinary_tokens_is_another_tokenizer() -> None:
    """Text would get other ids, so what the shorter one encoded is no data of the longer one."""
    without = Tokenizer({number: SHORT_VOCAB[number] for number in range(257)}, SHORT_MERGES[:1])
    trained_on = Tokenizer({number: SHORT_VOCAB[number] for number in range(258)}, SHORT_MERGES)
    assert not trained_on.extends(without.fingerprint(), without.vocab_size)


def test_the_check_accepts_a_shorter_one_only_where_its_size_is_given() -> None:
    """A checkpoint of it, whose model may lack the rows, is refused as before."""
    longer = SHORT.with_special_tokens(CHATML)
    words = {"made": "a.npy was made with", "ours": "t", "advice": "make it again"}
    longer.check_fingerprint(SHORT.fingerprint(), vocab_size=SHORT.vocab_size, **words)
    for sizes in ({}, {"vocab_size": 100}):
        with pytest.raises(ValueError, match=r"a.npy was made with the tokenizer \w+\.\.\., but t is \w+\.\.\.; make"):
            longer.check_fingerprint(SHORT.fingerprint(), **sizes, **words)
