"""A tokenizer with more special tokens: each old id means what it meant, and the product can know it."""

from __future__ import annotations

import re

import pytest

from transformerlm.tokenizer import Tokenizer

END = "<|endoftext|>"
MERGES = [(b"t", b"h"), (b"th", b"e")]
VOCAB = dict(enumerate([*(bytes([value]) for value in range(256)), b"th", b"the", END.encode()]))
OLD = Tokenizer(VOCAB, MERGES, [END])
NEW = ["<|im_start|>", "<|im_end|>"]


def test_old_ids_stay_and_new_ones_follow(tmp_path) -> None:
    """The new tokens are found in text, all else has the ids it had, and the files give the same tokenizer back."""
    longer = OLD.with_special_tokens(NEW)
    assert {number: longer.vocab[number] for number in range(OLD.vocab_size)} == OLD.vocab
    assert longer.special_token_ids == {END: 258, "<|im_start|>": 259, "<|im_end|>": 260}
    assert longer.encode(f"the <|im_end|>{END}") == [*OLD.encode("the "), 260, 258]
    longer.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).fingerprint() == longer.fingerprint() != OLD.fingerprint()


def test_a_token_that_is_special_already_keeps_its_id() -> None:
    """Adding it changes nothing, and adding it twice neither."""
    assert OLD.with_special_tokens([END]).fingerprint() == OLD.fingerprint()
    again = OLD.with_special_tokens([*NEW, END, *NEW]).with_special_tokens(NEW)
    assert again.fingerprint() == OLD.with_special_tokens(NEW).fingerprint()


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
        OLD.with_special_tokens(tokens)


def test_one_string_is_not_a_list_of_tokens() -> None:
    """It would be read as its letters."""
    with pytest.raises(TypeError, match="special_tokens"):
        OLD.with_special_tokens("<|im_start|>")


def test_ids_of_the_shorter_tokenizer_are_known_by_its_fingerprint() -> None:
    """Only a tokenizer of the same first ids is extended, and only by special tokens."""
    longer = OLD.with_special_tokens(NEW)
    assert longer.extends(OLD.fingerprint(), OLD.vocab_size)
    assert longer.with_special_tokens(["<|more|>"]).extends(OLD.fingerprint(), OLD.vocab_size)
    assert not OLD.extends(longer.fingerprint(), longer.vocab_size)
    assert not OLD.extends(OLD.fingerprint(), OLD.vocab_size)
    assert not longer.extends(OLD.fingerprint(), OLD.vocab_size + 1)
    other = Tokenizer({**VOCAB, 258: b"<|endoftexts|>"}, MERGES, ["<|endoftexts|>"])
    assert not other.with_special_tokens(NEW).extends(OLD.fingerprint(), OLD.vocab_size)


def test_a_longer_vocabulary_of_ordinary_tokens_is_another_tokenizer() -> None:
    """Text would get other ids, so what the shorter one encoded is no data of the longer one."""
    without = Tokenizer({number: VOCAB[number] for number in range(257)}, MERGES[:1])
    trained_on = Tokenizer({number: VOCAB[number] for number in range(258)}, MERGES)
    assert not trained_on.extends(without.fingerprint(), without.vocab_size)


def test_the_check_accepts_a_shorter_one_only_where_its_size_is_given() -> None:
    """A checkpoint of it, whose model may lack the rows, is refused as before."""
    longer = OLD.with_special_tokens(NEW)
    words = {"made": "a.npy was made with", "ours": "t", "advice": "make it again"}
    longer.check_fingerprint(OLD.fingerprint(), vocab_size=OLD.vocab_size, **words)
    for sizes in ({}, {"vocab_size": 100}):
        with pytest.raises(ValueError, match=r"a.npy was made with the tokenizer \w+\.\.\., but t is \w+\.\.\.; make"):
            longer.check_fingerprint(OLD.fingerprint(), **sizes, **words)
