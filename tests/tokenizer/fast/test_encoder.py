"""Behaviour of the compiled encoder and decoder: the reference's ids and bytes, for any text, threads and cache."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pace import cost
from tests.tokenizer import plain_kernels
from tests.tokenizer.from_ranks import from_ranks
from tests.tokenizer.test_pretokenize import ANY_TEXT
from tests.tokenizer.test_tokenizer import EOT, HARD_TEXT, MERGES
from tests.utils.packed import write_parquet, zstd
from transformerlm.tokenizer import Tokenizer, engines
from transformerlm.tokenizer.engines import COMPILED_PATTERNS
from transformerlm.tokenizer.pair_table import learn_merges
from transformerlm.tokenizer.pretokenize import PATTERNS
from transformerlm.utils.strings import is_utf8

pytest.importorskip("numba")
from transformerlm.tokenizer.fast import encoder, seam_kernels, table_kernels
from transformerlm.tokenizer.fast.arrays import padded

PLAIN = plain_kernels.load()
SPECIALS = (EOT, EOT + EOT, "<|e|>", "a b", "\n\n", "'s")
PARTS = [*"aZsvle'19.  \n\r\t\u3000é漢²|<>\u2019"]
PARTS += ["\u0e01", "\u0e31", "\u0e01\u0e02\u0e04\u0e19\u0e40" * 4, "\u2026" * 8, "\u0436" * 9]  # as a look shows them
PARTS += [EOT, "<|e|>", "the ", "and", "漢字" * 10, "x" * 90, "word" * 6, HARD_TEXT]
EACH_PATTERN = pytest.mark.parametrize("pattern", COMPILED_PATTERNS)


@pytest.fixture(autouse=True, scope="module")
def _short_texts_too() -> Iterator[None]:
    """Have the kernels encode and decode short texts, too, which the reference does just as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "CALL_CHARS", 0)
        patch.setattr(engines, "CALL_IDS", 0)
        yield


def _build(engine: str, *, pattern: str = "gpt2", specials: Sequence[str] = SPECIALS) -> Tokenizer:
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in MERGES]
    return Tokenizer(dict(enumerate(tokens)), MERGES, specials, pattern=pattern, engine=engine)  # type: ignore[arg-type]


REFERENCE = {pattern: _build("reference", pattern=pattern) for pattern in COMPILED_PATTERNS}
COMPILED = {pattern: _build("compiled", pattern=pattern) for pattern in COMPILED_PATTERNS}


def _encoder(
    modules: object = encoder, *, tokenizer: Tokenizer = REFERENCE["gpt2"], **options: int
) -> encoder.CompiledEncoder:
    known = tokenizer._vocabulary
    return modules.CompiledEncoder(  # type: ignore[attr-defined, no-any-return]
        byte_ids=known.byte_ids,
        merges=[(*pair, new) for pair, new in zip(known.ranks, known.merged, strict=True)],
        tokens=[known.tokens[token_id] for token_id in range(len(known.tokens))],
        special_token_ids=known.special_token_ids,
        pattern=known.pattern,
        dtype=known.id_type,
        whole_tokens=known.whole_tokens,
        **options,
    )


@EACH_PATTERN
def test_random_batches_have_the_references_ids(pattern: str) -> None:
    """Texts of all kinds, empty ones too, one by one and as batches, on one thread and on two."""
    rng = random.Random(1)
    reference, tokenizer = REFERENCE[pattern], COMPILED[pattern]
    for _ in range(150):
        texts = ["".join(rng.choices(PARTS, k=rng.randint(0, 20))) for _ in range(rng.randint(0, 5))]
        expected = [reference.encode(text) for text in texts]
        assert tokenizer.encode_batch(texts, num_workers=rng.choice([1, 2])) == expected
        for text, ids in zip(texts, expected, strict=True):
            assert tokenizer.encode(text) == ids
            assert tokenizer.encode_batch([text], allow_special=False) == [reference.encode_ordinary(text)]
            assert tokenizer.encode_ordinary(text) == reference.encode_ordinary(text)
            assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint16)) == text.encode()


@EACH_PATTERN
@settings(deadline=None)
@given(text=ANY_TEXT)
def test_any_text_has_the_references_ids(text: str, pattern: str) -> None:
    """The ids are equal on whatever text hypothesis finds."""
    assert COMPILED[pattern].encode(text) == REFERENCE[pattern].encode(text)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PARTS[:-1]), max_size=8).map("".join), max_size=4))
def test_the_kernels_encode_and_decode_alike_without_numba(texts: list[str]) -> None:
    """The same source without numba, where no read or write may leave its array."""
    with np.errstate(over="ignore"):
        encoder = _encoder(PLAIN["encoder"])
        ids, ends = encoder.encode_texts([text.encode() for text in texts])
        expected = [REFERENCE["gpt2"].encode(text) for text in texts]
        assert [part.tolist() for part in np.split(ids, ends)[: len(texts)]] == expected
        tokens = [REFERENCE["gpt2"].vocab[token_id] for token_id in range(REFERENCE["gpt2"].vocab_size)]
        assert PLAIN["encoder"].CompiledDecoder(tokens).decode(ids) == "".join(texts).encode()


@pytest.mark.parametrize("kind", [list, tuple, iter, dict.fromkeys, np.array, torch.tensor])
def test_ids_of_any_kind_are_decoded_alike(kind: Callable[[list[int]], Any]) -> None:
    """Lists, tuples, iterators, keys and arrays give the reference's bytes, and the same error for an unknown id."""
    ids = [104, 256, 105, 200]
    assert COMPILED["gpt2"].decode_bytes(kind(ids)) == REFERENCE["gpt2"].decode_bytes(ids)
    for unknown in (-1, 10**6):
        with pytest.raises(ValueError, match=f"expected 0 to .*, found {unknown}$"):
            COMPILED["gpt2"].decode_bytes(kind([*ids, unknown]))


class OnADevice(list[int]):
    """Ids as a tensor on a GPU has them: NumPy cannot read them where they are."""

    dtype, shape = np.dtype(np.int64), (4,)

    def cpu(self) -> Any:
        return np.array(list(self))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_ids_on_a_device_are_decoded() -> None:
    """A tensor on a GPU is copied from there."""
    ids = [104, 256, 105, 200]
    assert COMPILED["gpt2"].decode_bytes(OnADevice(ids)) == REFERENCE["gpt2"].decode_bytes(ids)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_each_byte_is_an_id(kind: Callable[[bytes], Any]) -> None:
    """Bytes in the place of a list are its numbers, to both engines; eight of them are never one number."""
    data = b"eight by" * 40
    for tokenizer in (COMPILED["gpt2"], REFERENCE["gpt2"]):
        assert tokenizer.decode_bytes(kind(data)) == data


def test_numbers_that_are_no_ids_are_not_rounded_to_some() -> None:
    """Both engines refuse 3.5."""
    for tokenizer in (COMPILED["gpt2"], REFERENCE["gpt2"]):
        with pytest.raises(ValueError, match=r"found 3\.5"):
            tokenizer.decode_bytes([1, 3.5])  # type: ignore[list-item]


def test_a_pattern_that_the_kernels_do_not_know_is_left_to_the_reference() -> None:
    """With `auto` nobody notices; whoever asks for the compiled engine gets an error."""
    assert set(encoder.PATTERNS) == set(COMPILED_PATTERNS)
    tokenizer = _build("auto", pattern="smollm")
    assert not tokenizer.runs_in_threads(1 << 40)
    text = HARD_TEXT * 20 + "a  12" * 200_000
    assert tokenizer.encode_to_array(text, num_workers=1).tolist() == _build("reference", pattern="smollm").encode(text)
    with pytest.raises(ValueError, match="engine: expected auto or reference with the pattern 'smollm', found 'compi"):
        _build("compiled", pattern="smollm")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pattern", ["llama3", "gpt2"])
def test_a_piece_that_is_a_token_is_that_token(seed: int, pattern: str) -> None:
    """With ignore_merges, in both engines, in long pieces, too, and where parts between seams are spelled as tokens."""
    rng = random.Random(seed)
    for alphabet in ("abc", "漢字文", "aé漢", "\u0e01\u0e02\u0e04", "".join(map(chr, range(0x4E00, 0x4E50)))):
        reference = from_ranks(seed, alphabet=alphabet, pattern=pattern, engine="reference")
        tokenizer = from_ranks(seed, alphabet=alphabet, pattern=pattern, engine="compiled")
        ids = {token.decode(): each for each, token in list(reference.vocab.items())[256:-1] if is_utf8(token)}
        texts = [*ids, "\n".join(ids), *("".join(rng.choices([*ids], k=rng.randint(2, 40))) for _ in range(50))]
        for letters in (alphabet, alphabet + " "):
            texts += ["".join(rng.choices(letters, k=rng.randint(1, 300))) for _ in range(30)]
        assert tokenizer.encode_batch(texts, num_workers=2) == [reference.encode(text) for text in texts]
        assert [tokenizer.encode(text) for text in ids] == [[each] for each in ids.values()]
    data = (3 * alphabet).encode()
    seams = tokenizer._engines.compiled("encode")._encoder._seams
    assert seam_kernels.first_seam(padded(data), 0, len(data), seams) < len(data)


def test_tokens_that_are_pieces_survive_the_emptying_of_a_small_cache() -> None:
    """They are entered again, however small the cache is."""
    tokenizer = from_ranks(0, engine="reference")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 20))) for _ in range(20_000)]
    texts += [token.decode() for token in tokenizer.vocab.values() if token.isascii()]
    for cache_bytes in (1, 1_500_000):
        ids, _ = _encoder(tokenizer=tokenizer, cache_bytes=cache_bytes).encode_texts([text.encode() for text in texts])
        assert ids.tolist() == [token_id for text in texts for token_id in tokenizer.encode(text)]


def test_ids_are_those_of_tiktoken() -> None:
    """Given the same merges, OpenAI's library gives the same ids with each pattern."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: token_id for token_id, token in _build("reference", specials=()).vocab.items()}
    rng = random.Random(0)
    for pattern, spelled in PATTERNS.items():
        special = {EOT: len(ranks)}
        other = tiktoken.Encoding("ours", pat_str=spelled, mergeable_ranks=ranks, special_tokens=special)
        engine = "compiled" if pattern in COMPILED_PATTERNS else "reference"
        ours = _build(engine, pattern=pattern, specials=(EOT,))
        for length in [0, 10, 1000, 5000]:
            text = "".join(rng.choices(HARD_TEXT, k=length)) + EOT + HARD_TEXT[:length]
            assert ours.encode(text) == other.encode(text, allowed_special="all")


def test_a_stream_of_characters_enters_no_kernel_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that settle no text do not call a kernel, and the ids are the reference's."""
    text = HARD_TEXT * 3
    calls = []
    encode_texts = encoder.CompiledEncoder.encode_texts
    monkeypatch.setattr(
        encoder.CompiledEncoder, "encode_texts", lambda *args, **kw: calls.append(args) or encode_texts(*args, **kw)
    )
    assert list(COMPILED["gpt2"].encode_iterable(text)) == REFERENCE["gpt2"].encode(text)
    assert 1 <= len(calls) < 20 < len(text)


def test_short_texts_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where entering a kernel costs more than the work, none is entered; long texts do enter one."""
    monkeypatch.setattr(engines, "CALL_CHARS", 50)
    monkeypatch.setattr(engines, "CALL_IDS", 50)
    tokenizer = _build("compiled")
    assert tokenizer.decode(tokenizer.encode("short")) == "short"
    assert tokenizer._engines._compiled is None
    assert tokenizer.decode(tokenizer.encode(HARD_TEXT)) == HARD_TEXT
    assert tokenizer._engines._compiled.is_loaded("encode")
    assert tokenizer._engines._compiled.is_loaded("decode")


def test_half_a_character_is_replaced() -> None:
    """A lone surrogate counts as U+FFFD, and two halves as their character, as in the reference."""
    assert COMPILED["gpt2"].encode("\ud83d\udc4d") == REFERENCE["gpt2"].encode("👍")
    assert COMPILED["gpt2"].encode("a\ud800b") == REFERENCE["gpt2"].encode("a\ufffdb")


def test_a_small_cache_is_emptied_and_changes_nothing() -> None:
    """The tables of a cache of a given size stay within it, through growth and emptying."""
    rng = random.Random(2)
    texts = ["".join(rng.choices("abcdefgh漢字", k=rng.randint(1, 60))) for _ in range(40_000)]
    encoder = _encoder(cache_bytes=4_000_000)
    ids, _ = encoder.encode_texts([text.encode() for text in texts])
    table = encoder._tables.get_nowait()
    assert table.num_bytes <= 4_000_000
    assert table.pieces.used[0] < len(set(texts)) / 2
    assert ids.tolist() == [token_id for text in texts for token_id in REFERENCE["gpt2"].encode(text)]


def test_long_texts_are_cut_for_the_threads_at_safe_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the segments that threads take are, the ids are those of the whole."""
    text = (HARD_TEXT + "it' s 'll! \n x  y,\n\nz 1 2\u3000 3") * 5
    for size in (1, 2, 5, 64, 300):
        monkeypatch.setattr(encoder, "SEGMENT_BYTES", size)
        monkeypatch.setattr(encoder.SpecialTokens.segments, "__kwdefaults__", {"longest": size})
        for pattern in COMPILED_PATTERNS:
            assert COMPILED[pattern].encode_to_array(text, num_workers=2).tolist() == REFERENCE[pattern].encode(text)


def test_a_long_run_is_quick() -> None:
    """A megabyte of one letter, and of random letters without a blank, take time n log n."""
    tokens = [bytes([value]) for value in range(256)]
    merges = learn_merges({b"a" * 1000: 1, b"abcdefgh" * 9: 1}, 20)
    tokenizer = Tokenizer(dict(enumerate(tokens + [a + b for a, b in merges])), merges, engine="compiled")
    assert tokenizer.encode("a" * 3000) == Tokenizer(tokenizer.vocab, merges, engine="reference").encode("a" * 3000)
    for text in ("a" * 1_000_000, "".join(random.Random(0).choices("abcdefgh", k=1_000_000))):
        ids: list[Sequence[int]] = []
        assert cost(lambda text=text, ids=ids: ids.append(tokenizer.encode_to_array(text))) < 5
        assert tokenizer.decode(ids[0]) == text


def test_the_room_for_a_giant_piece_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 56 times the piece's bytes; afterwards the thread's table is as small as before."""
    tokens = [bytes([value]) for value in range(256)]
    merges = learn_merges({b"a" * 1000: 1}, 8)
    tokenizer = Tokenizer(dict(enumerate(tokens + [a + b for a, b in merges])), merges, engine="compiled")
    (table,) = tokenizer._engines.compiled("encode")._encoder._tables.queue
    size = len(table.work)
    monkeypatch.setattr(encoder, "_KEPT_WORK", size)
    reference = Tokenizer(tokenizer.vocab, merges, engine="reference")
    for length in (9000, 300, 5000):
        assert tokenizer.encode("a" * length) == reference.encode("a" * length)
        assert len(table.work) == size


def test_a_table_that_was_in_use_at_an_error_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be half made."""
    compiled = _build("compiled")._engines.compiled("encode")._encoder
    (table,) = compiled._tables.queue
    with monkeypatch.context() as patch:
        patch.setattr(encoder.kernels, "encode_segments", _no_memory)
        with pytest.raises(MemoryError):
            compiled.encode_texts([b"a"])
    assert not compiled._tables.queue
    compiled.encode_texts([b"a"])
    assert table not in compiled._tables.queue


def _no_memory(*_: Any) -> int:
    raise MemoryError


def test_a_long_piece_whose_hash_is_zero_is_no_empty_slot() -> None:
    """Such words can be made: sixteen letters of which the last eight undo what the first eight made of the hash."""

    def undone(number: np.ndarray) -> np.ndarray:  # `long_hash` multiplies, then shifts by 29 bits
        inverse = np.uint64(pow(int(table_kernels._MIX_A), -1, 1 << 64))
        return (number ^ number >> np.uint64(29) ^ number >> np.uint64(58)) * inverse

    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, size=(3_000_000, 8), dtype=np.uint8)
    last = letters.view("<u8")[:, 0]
    first = np.uint64(16) ^ undone(undone(last) ^ last)
    words = np.concatenate([first.astype("<u8").view(np.uint8).reshape(-1, 8), letters], axis=1)
    are_letters = ((words | 0x20 >= ord("a")) & (words | 0x20 <= ord("z"))).all(axis=1)
    assert are_letters.any()
    for word in words[are_letters]:
        with np.errstate(over="ignore"):
            assert int(PLAIN["table_kernels"].long_hash(padded(bytes(word)), 0, 16)) == 0
        text = bytes(word).decode()
        assert COMPILED["gpt2"].encode(text) == REFERENCE["gpt2"].encode(text)


@pytest.mark.parametrize("engine", ["reference", "compiled"])
def test_a_file_has_the_ids_of_its_text(tmp_path: Path, engine: str) -> None:
    """Ids are those of the text in a plain, packed, damaged or empty file and in JSON lines, on one worker or two."""
    tokenizer = _build(engine)
    text = (HARD_TEXT + EOT) * 3
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff\xfe x")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in ("one ", " two")))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "valid.txt").write_bytes(text.encode())
    for workers in (1, 2):
        assert tokenizer.encode_file(tmp_path / "a.txt", num_workers=workers).tolist() == tokenizer.encode(
            text + "\ufffd\ufffd x"
        )
        assert tokenizer.encode_file(tmp_path / "valid.txt", num_workers=workers).tolist() == tokenizer.encode(text)
    assert tokenizer.encode_file(tmp_path / "a.txt.gz").tolist() == tokenizer.encode(text)
    (tmp_path / "a.txt.zst").write_bytes(zstd(text.encode()))
    write_parquet(tmp_path / "a.parquet", {"text": [text]})
    assert tokenizer.encode_file(tmp_path / "a.txt.zst").tolist() == tokenizer.encode(text)
    assert tokenizer.encode_file(tmp_path / "a.parquet").tolist() == tokenizer.encode_ordinary(text)
    assert tokenizer.encode_file(tmp_path / "a.parquet", allow_special=True).tolist() == tokenizer.encode(text)
    assert tokenizer.encode_file(tmp_path / "a.jsonl").tolist() == tokenizer.encode("one ") + tokenizer.encode(" two")
    assert tokenizer.encode_file(tmp_path / "empty.txt").dtype == np.uint16


def test_wide_ids_and_wrong_ids() -> None:
    """Beyond 65,536 tokens arrays are uint32; an id that is not in the vocabulary is named in the error."""
    tokens = [bytes([value]) for value in range(256)] + [f"<{number}>".encode() for number in range(65_300)]
    tokenizer = Tokenizer(dict(enumerate(tokens)), [], ["<|end of text|>"], engine="compiled")
    ids = tokenizer.encode_to_array("ab<|end of text|>")
    assert (ids.dtype, ids.tolist()) == (np.uint32, [97, 98, 65_556])
    assert tokenizer.decode(ids) == "ab<|end of text|>"
    ids.flags.writeable = False
    assert tokenizer.decode(ids) == "ab<|end of text|>"
    for bad in (-1, 65_557):
        with pytest.raises(ValueError, match=f"expected 0 to 65556 .*found {bad}"):
            tokenizer.decode(np.array([0, bad]))
    assert tokenizer.decode(np.array([], dtype=np.int64)) == ""


def _first_invalid(data: bytes) -> int:
    """Return where Python's decoder finds the first invalid byte, the end if there is none."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


@settings(max_examples=500, deadline=None)
@given(data=st.one_of(st.binary(max_size=30), st.text(max_size=9).map(str.encode), ANY_TEXT.map(str.encode)))
def test_valid_utf8_is_what_python_says(data: bytes) -> None:
    """The first invalid byte is where Python's decoder finds it, also without numba."""
    expected = _first_invalid(data)
    assert encoder.text_kernels.first_invalid(padded(data), len(data)) == expected
    assert PLAIN["text_kernels"].first_invalid(padded(data), len(data)) == expected


def test_every_two_and_three_bytes_are_judged_as_python_judges_them() -> None:
    """All beginnings of characters are judged alike: also surrogates, overlong forms and numbers beyond Unicode."""
    tails = [b"", b"\x80", b"\xbf\x80", b"\xc0"]
    for first in range(0x80, 0x100):
        for second in range(0x100):
            for tail in tails:
                data = bytes([first, second]) + tail
                assert encoder.text_kernels.first_invalid(padded(data), len(data)) == _first_invalid(data), data


@pytest.mark.parametrize("before", [60, 61, 62, 63, 64, 126, 127])
def test_what_crosses_the_border_of_64_bytes_is_judged_alike(before: int) -> None:
    """A character, whole or not, may begin in one block and end in the next."""
    firsts = (0x80, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEE, 0xF0, 0xF1, 0xF4, 0xF5)
    for first, second, tail in product(firsts, range(0x7E, 0xC2), (b"", b"\x80", b"\xbf\x80", b"\xc0", b"a" * 70)):
        data = b"a" * before + bytes([first, second]) + tail
        assert encoder.text_kernels.first_invalid(padded(data), len(data)) == _first_invalid(data), data
