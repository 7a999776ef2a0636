"""`tokenizer.json`: what we write gives the same ids in `tokenizers`, and what we read is ours or refused by name."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.from_ranks import from_ranks
from transformerlm.interop.tokenizer_json import from_file, to_json, write_tokenizer_json
from transformerlm.interop.verify import verify_tokenizer_json
from transformerlm.tokenizer import Tokenizer

BYTES = {index: bytes([index]) for index in range(256)}


def read(record, tmp_path):
    """Read a record as if it came from a file."""
    path = tmp_path / "tokenizer.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    return from_file(path)


@pytest.fixture
def record(tokenizer):
    """Return a tokenizer.json of ours to change."""
    return json.loads(to_json(tokenizer))


def test_the_tokenizer_comes_back(tokenizer, tmp_path):
    """Written and read, it is the same tokenizer, as the check by `tokenizers` says."""
    outcome = write_tokenizer_json(tokenizer, tmp_path / "new" / "tokenizer.json")
    assert outcome.startswith("verified with tokenizers: the ids of ")
    assert from_file(tmp_path / "new" / "tokenizer.json").fingerprint() == tokenizer.fingerprint()


@pytest.fixture(scope="module")
def theirs(tokenizer):
    """Return the tokenizer as `tokenizers` reads it."""
    return tokenizers.Tokenizer.from_str(to_json(tokenizer))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet=" \n\r\t'sStT1a.我<|user>", max_size=60))
def test_any_text_has_the_same_ids(tokenizer, theirs, text):
    """`tokenizers` agrees on every text, except for letters that its Unicode tables do not know yet."""
    if all(map(_same_kind, text)):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["a\n ", "a\n  ", "\n \n ", "a \n", "\n a", " \n  x\n "])
def test_white_space_at_the_end_is_one_piece(text):
    """Both merge a line end and a blank where cl100k allows it: only at the end of a text."""
    tokenizer = Tokenizer({**BYTES, 256: b"\n "}, [(b"\n", b" ")], pattern="cl100k")
    theirs = tokenizers.Tokenizer.from_str(to_json(tokenizer))
    assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


@cache
def _same_kind(char: str) -> bool:
    """Return whether both libraries agree that a character is a letter, a number, or neither."""
    for kind in (r"\p{L}", r"\p{N}"):
        removed = tokenizers.pre_tokenizers.Split(tokenizers.Regex(kind), "removed").pre_tokenize_str(f'"{char}"')
        if (len(removed) == 2) != bool(regex.fullmatch(kind, char)):
            return False
    return True


def test_older_merges_and_added_tokens_outside_the_vocabulary_are_read(record, tokenizer, tmp_path):
    """A merge may be one string, and special tokens may be only in added_tokens."""
    record["model"]["merges"] = [" ".join(merge) for merge in record["model"]["merges"]]
    for token in record["added_tokens"]:
        del record["model"]["vocab"][token["content"]]
    assert read(record, tmp_path).fingerprint() == tokenizer.fingerprint()


def change(record, dotted, value):
    """Set a key at a dotted place."""
    *tables, last = dotted.split(".")
    for table in tables:
        record = record[int(table) if table.isdigit() else table]
    record[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.type", "Unigram", r'model\.type: expected "BPE", found "Unigram"'),
        ("model.byte_fallback", True, r"model\.byte_fallback: expected null, found true"),
        ("model.unk_token", "<unk>", r"model\.unk_token: expected null"),
        ("model.dropout", 0.1, r"model\.dropout: expected null"),
        ("model.end_of_word_suffix", "</w>", r"model\.end_of_word_suffix: expected null"),
        ("normalizer", {"type": "NFKC"}, r"normalizer: expected null or NFC, found"),
        ("pre_tokenizer", None, r'pre_tokenizer\.type: expected "ByteLevel", found null'),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "pre_tokenizer: expected ByteLevel, found none"),
        ("pre_tokenizer", {"type": "Metaspace"}, r'pre_tokenizer\.type: expected "ByteLevel", found "Metaspace"'),
        ("pre_tokenizer", {"type": "ByteLevel"}, r"add_prefix_space: expected false, found true"),
        ("added_tokens.0.lstrip", True, r"added token '<\|endoftext\|>': lstrip: expected false, found true"),
        ("added_tokens.0.id", 3, r"expected one id of '<\|endoftext\|>', found 3 and"),
        ("added_tokens.0.id", "3", r"expected a whole number as the id"),
        ("model.vocab.!", 7, r"expected each id once"),
        ("model.vocab.zzzzz", 512, r"expected a merge for each token, found none for 'zzzzz'"),
        ("model.vocab.zzzzz", 10**9, r"expected the ids 0 to "),
        ("model.vocab.Ġ好", 512, r"GPT-2's byte alphabet"),
        ("model.merges.0", ["a", "b", "c"], r"expected merges of two tokens"),
        ("model.merges.0", ["a", 7], r"expected the form of a tokenizer\.json"),
        ("model.vocab", [1, 2], r"expected the form of a tokenizer\.json"),
        ("model", 3, r"expected the form of a tokenizer\.json"),
    ],
)
def test_what_ours_do_not_do_is_refused_by_name(place, value, message, record, tmp_path):
    """The error names the key, what was expected and what was found."""
    change(record, place, value)
    with pytest.raises(ValueError, match=message):
        read(record, tmp_path)


def test_another_split_pattern_is_refused_with_what_was_found(record, tmp_path):
    """Only known spellings of the patterns are accepted."""
    found = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+"
    split = {"type": "Split", "pattern": {"Regex": found}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    record["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    with pytest.raises(ValueError, match=r"expected the split pattern of gpt2, .*, smollm, found .*N\}"):
        read(record, tmp_path)
    record["pre_tokenizer"]["pretokenizers"] = [split, split, level]
    with pytest.raises(ValueError, match="number of splits before the pre_tokenizer ByteLevel: expected 1, found 2"):
        read(record, tmp_path)


def test_digits_must_be_cut_one_by_one(record, tmp_path):
    """SmolLM's files are read, with the defaults that they omit; runs of digits are another pattern."""
    level = {"type": "ByteLevel", "add_prefix_space": False}
    record["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, level],
    }
    assert read(record, tmp_path).pattern == "smollm"
    record["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    with pytest.raises(ValueError, match=r"pre_tokenizer\.individual_digits: expected true, found false"):
        read(record, tmp_path)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pattern", ["llama3", "gpt2"])
def test_merges_that_were_converted_from_ranks_give_the_same_ids(seed, pattern, tmp_path):
    """As in Llama 3: a merge for each split, some of parts that are made later, and tokens that have no merge."""
    tokenizer = from_ranks(seed, pattern=pattern)
    write_tokenizer_json(tokenizer, tmp_path / "tokenizer.json")
    assert from_file(tmp_path / "tokenizer.json").fingerprint() == tokenizer.fingerprint()
    theirs = tokenizers.Tokenizer.from_str(to_json(tokenizer))
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abc ", weights=[5, 5, 5, 1], k=rng.randint(1, 200))) for _ in range(100)]
    for text in [*texts, *(token.decode() for token in tokenizer.vocab.values() if token.isascii())]:
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_ignore_merges_is_left_out_where_it_changes_nothing(record, tokenizer, tmp_path):
    """Merges that make each token of its bytes need no such rule; the tokenizer is the one without it."""
    record["model"]["ignore_merges"] = True
    assert read(record, tmp_path).fingerprint() == tokenizer.fingerprint()
    vocab = {**BYTES, 256: b"bc", 257: b"ab", 258: b"abc"}
    made_otherwise = Tokenizer(vocab, [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")])
    record = json.loads(to_json(made_otherwise))
    assert read(record, tmp_path).encode("abc") == made_otherwise.encode("abc") == [97, 256]
    record["model"]["ignore_merges"] = True
    assert read(record, tmp_path).encode("abc") == [258]


def test_merges_in_another_order_need_ignore_merges(tmp_path):
    """Without it a merge of parts that are made later is refused, and a token without a merge, too."""
    record = json.loads(to_json(from_ranks(0)))
    record["model"]["ignore_merges"] = False
    with pytest.raises(ValueError, match="expected parts that earlier merges make"):
        read(record, tmp_path)
    record["model"]["merges"] = []
    with pytest.raises(ValueError, match="expected a merge for each token, found none for"):
        read(record, tmp_path)


def test_a_normalizer_that_composes_is_warned_of(record, tokenizer, tmp_path):
    """Qwen's does: text that is composed gets the same ids, and ours changes no other."""
    record["normalizer"] = {"type": "NFC"}
    with pytest.warns(UserWarning, match=r"its normalizer \(NFC\) composes letters and their accents; ours changes no"):
        found = read(record, tmp_path)
    assert found.fingerprint() == tokenizer.fingerprint()
    assert verify_tokenizer_json(found, json.dumps(record)).startswith(
        "verified with tokenizers, without its normalizer: "
    )


def test_a_tokenizer_that_lacks_bytes_is_refused_with_the_cause(record, tmp_path):
    """SmolLM2's is such: what it has no id for it drops from a text."""
    del record["model"]["vocab"]["ÿ"]
    with pytest.raises(
        ValueError, match=r"model\.vocab: expected all 256 single bytes, found 255, without 'ÿ' .*SmolLM2"
    ):
        read(record, tmp_path)


def test_tokens_that_are_put_around_a_text_are_warned_of(record, tmp_path):
    """Our tokenizer adds none, and says so."""
    record["post_processor"] = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    with pytest.warns(UserWarning, match="TemplateProcessing"):
        read(record, tmp_path)


def test_an_added_token_that_is_not_special_is_warned_of(record, tokenizer, tmp_path):
    """It is special here, and in exports; the warning names it and no other one."""
    first, second, *_ = record["added_tokens"]
    second["special"] = False
    with pytest.warns(UserWarning, match="not special there, and special tokens here: ") as told:
        found = read(record, tmp_path)
    assert second["content"] in str(told[0].message)
    assert first["content"] not in str(told[0].message)
    assert found.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 1_000_000, '{"model": {}, "model": {}}', '{"model": NaN}'])
def test_a_file_that_is_no_tokenizer_is_refused(text, tmp_path):
    """One line that names the file, whatever is in it."""
    with pytest.raises(ValueError, match=r"tokenizer\.json.*: expected "):
        read(text, tmp_path)


@pytest.mark.parametrize("special", ["Ġ", "é<x>", "«user»"])
def test_a_special_token_that_would_decode_to_other_bytes_is_named(tokenizer, tmp_path, special):
    """Its letters are those with which tokenizer.json spells bytes; nothing is written, whether verified or not."""
    with pytest.raises(ValueError, match=f"found '{special}', which it decodes to the bytes b'"):
        write_tokenizer_json(Tokenizer(BYTES, [], [special]), tmp_path / "tokenizer.json", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_a_special_token_of_other_letters_is_exported(tmp_path):
    """If one character is not in GPT-2's alphabet, the library takes the token literally."""
    tokenizer = Tokenizer(BYTES, [], ["<|é漢|>"])
    write_tokenizer_json(tokenizer, tmp_path / "tokenizer.json")
    assert from_file(tmp_path / "tokenizer.json").special_token_ids == {"<|é漢|>": 256}


def test_a_file_is_replaced_only_when_asked(tokenizer, tmp_path):
    """An existing file is refused, and with overwrite replaced; a directory never is."""
    path = tmp_path / "tokenizer.json"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        write_tokenizer_json(tokenizer, path)
    assert path.read_text() == "mine"
    write_tokenizer_json(tokenizer, path, overwrite=True)
    assert from_file(path).fingerprint() == tokenizer.fingerprint()
    with pytest.raises(ValueError, match="expected a file to overwrite, found a directory"):
        write_tokenizer_json(tokenizer, tmp_path, overwrite=True)
