"""Behaviour of the tokenizer's files: what is written can be read, and each mistake gets one line of error."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tokenizer.from_ranks import from_ranks
from transformerlm.tokenizer import Tokenizer, io

EOT = "<|endoftext|>"
MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"\n", b"\n"), (b"\xc3", b"\xa9"), (b"#", b"#")]


def _tokenizer(specials: tuple[str, ...] = (EOT,)) -> Tokenizer:
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in MERGES]
    return Tokenizer(dict(enumerate(tokens)), MERGES, specials)


def test_the_alphabet_is_gpt2s() -> None:
    """Printable characters stand for themselves, a space is G with a dot; each byte has one character of its own."""
    alphabet = io.byte_alphabet()
    assert len(set(alphabet.values())) == len(alphabet) == 256
    assert (alphabet[32], alphabet[10], alphabet[0], alphabet[ord("a")], alphabet[0xAD]) == ("Ġ", "Ċ", "Ā", "a", "Ń")
    assert io.text_to_token(io.token_to_text(bytes(range(256)))) == bytes(range(256))


def test_the_alphabet_agrees_with_transformers() -> None:
    """The published GPT-2 tokenizer writes each byte the same way."""
    gpt2 = pytest.importorskip("transformers.convert_slow_tokenizer")
    assert gpt2.bytes_to_unicode() == io.byte_alphabet()


@pytest.mark.parametrize("specials", [(), (EOT,), ("<|a b|>", "<|結束|>", "<|é|>")])
def test_saved_files_load_as_the_same_tokenizer(tmp_path: Path, specials: tuple[str, ...]) -> None:
    """Vocabulary, merges, special tokens and fingerprint come back, whatever the special tokens' characters."""
    tokenizer = _tokenizer(specials)
    tokenizer.save(tmp_path / "deep/tokenizer")
    loaded = Tokenizer.from_directory(tmp_path / "deep/tokenizer")
    assert (loaded.vocab, loaded.merges, loaded.special_token_ids) == (
        tokenizer.vocab,
        tokenizer.merges,
        tokenizer.special_token_ids,
    )
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_saving_is_deterministic_and_leaves_nothing_else(tmp_path: Path) -> None:
    """Two saves give the same bytes, over older files too, and leave no unfinished file."""
    for name in ("a", "b", "b"):
        _tokenizer().save(tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "merges.txt",
        "special_tokens.json",
        "vocab.json",
    ]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert (tmp_path / "a/merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\nĠ t\nh e\nĠt he\n")


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_a_failed_save_keeps_the_old_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A flush that fails, of whichever file or name, changes nothing; if it is the last, the new tokenizer is there."""
    for name, specials in (("old", (EOT,)), ("new", ())):
        _tokenizer(specials).save(tmp_path / name)
    old, new = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("old", "new"))
    flushed: list[int] = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == number:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _tokenizer(()).save(tmp_path / "old")
    found = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    assert found == (old if number < 6 else new)


def test_ignore_merges_is_saved_and_copied(tmp_path: Path) -> None:
    """Loaded, copied or with more special tokens, it is still set; it is part of the fingerprint."""
    tokenizer = from_ranks(0)
    tokenizer.save(tmp_path)
    others = [Tokenizer.from_directory(tmp_path), copy.deepcopy(tokenizer)]
    assert [other.fingerprint() for other in others] == 2 * [tokenizer.fingerprint()]
    assert all(other.ignore_merges for other in (*others, tokenizer.with_special_tokens(["<|new|>"])))
    learned = Tokenizer(_tokenizer().vocab, MERGES)
    assert Tokenizer(learned.vocab, MERGES, ignore_merges=True).fingerprint() != learned.fingerprint()


@pytest.mark.parametrize(
    ("limit", "most", "message"),
    [
        ("MAX_FILE_BYTES", 1000, r"vocab\.json: expected at most 1,000 bytes to write, .* found \d,\d+ \(a long run"),
        ("MAX_SPECIALS_BYTES", 50, r"special_tokens\.json: expected at most 50 bytes to write, .* \(choose shorter"),
        ("MAX_SPECIALS", 1, "special_tokens: expected 1 in a tokenizer at most, found 2"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int, message: str
) -> None:
    """Loading has limits; what is beyond them is refused before anything is written."""
    monkeypatch.setattr(io, limit, most)
    with pytest.raises(ValueError, match=message):
        _tokenizer((EOT, "<|pad|>")).save(tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_takes_its_place_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take a folder with a vocab.json for one that holds a whole tokenizer."""
    replace, moved = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda path, to: (moved.append(to.name), replace(path, to))[1])
    _tokenizer().save(tmp_path)
    assert moved == ["merges.txt", "special_tokens.json", "vocab.json"]


def test_the_version_line_and_crlf_are_optional(tmp_path: Path) -> None:
    """Merges without a header, as GPT-2's are often passed on, and with Windows line ends are read alike."""
    tokenizer = _tokenizer()
    tokenizer.save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "merges.txt").write_bytes("\r\n".join(lines[1:]).encode())
    assert Tokenizer.from_directory(tmp_path).merges == MERGES


def test_a_special_token_that_reads_as_another_token_cannot_be_saved(tmp_path: Path) -> None:
    """A file that would hold one key twice is refused."""
    with pytest.raises(ValueError, match="expected each token to be written differently"):
        _tokenizer(("Ġt",)).save(tmp_path)


Damage = Callable[[dict[str, object], list[str]], object]


def _without(key: str) -> Damage:
    def damage(vocab: dict[str, object], merges: list[str]) -> None:
        del vocab[key]
        vocab.update({name: number for number, name in enumerate(vocab)})

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda vocab, merges: "[1, 2]", r"vocab\.json: expected a JSON object, found an array"),
        (lambda vocab, merges: '{"a": 1,', r"vocab\.json:1: expected JSON, found"),
        (lambda vocab, merges: '{"a": 0, "a": 1}', r"vocab\.json: expected each key once, found 'a' twice"),
        (lambda vocab, merges: b'{"\xff": 0}', r"vocab\.json: expected UTF-8, found byte 0xff at offset 2"),
        (
            lambda vocab, merges: vocab.update(a="7"),
            r"vocab\.json: expected a whole number as the id of 'a', found '7'",
        ),
        (lambda vocab, merges: vocab.update(a=True), "expected a whole number as the id of 'a', found True"),
        (lambda vocab, merges: vocab.update(a=1.0), "expected a whole number as the id of 'a', found 1.0"),
        (lambda vocab, merges: vocab.update(a=98), r"expected each id once, found 98 for b'a' and 'b'"),
        (lambda vocab, merges: vocab.update(a=999), "expected the ids 0 to 262 for 263 tokens, found none with id 97"),
        (lambda vocab, merges: vocab.update(a=-1), "expected the ids 0 to 262 for 263 tokens, found none with id 97"),
        (lambda vocab, merges: vocab.update({"a b": 263}), r"byte alphabet, found ' ' \(U\+0020\) in 'a b'"),
        (lambda vocab, merges: vocab.update({"": 263}), "at least one byte, found an empty one with id 263"),
        (_without("a"), r"vocab\.json: expected all 256 single bytes, found none for byte 97 \(written 'a'\)"),
        (_without("Ġthe"), r"merges\.txt:4: expected tokens of the vocabulary, found 'Ġthe'"),
        (lambda vocab, merges: merges.append("h e"), r"merges\.txt:8: expected each merge once, found 'h e' again"),
        (lambda vocab, merges: merges.append("he"), r"merges\.txt:8: expected two tokens with one space.* found 'he'"),
        (lambda vocab, merges: merges.append("a b c"), r"merges\.txt:8: expected two tokens"),
        (lambda vocab, merges: merges.insert(3, ""), r"merges\.txt:4: expected two tokens"),
        (lambda vocab, merges: merges.append("x yz"), r"merges\.txt:8: expected tokens of the vocabulary, found 'yz'"),
        (lambda vocab, merges: merges.append("漢 a"), r"merges\.txt:8: expected characters of GPT-2's byte alphabet"),
        (lambda vocab, merges: merges.reverse(), r"merges\.txt:.* expected"),
        (lambda vocab, merges: merges.pop(1), r"merges\.txt:3: expected parts that earlier merges make, found 'Ġt'"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage: Damage, message: str) -> None:
    """Each kind of damage is named with the file, what was expected and what was found."""
    _tokenizer().save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    replaced = damage(vocab, merges)
    is_file = isinstance(replaced, bytes) or (isinstance(replaced, str) and replaced[0] in "[{")
    content = replaced if is_file else json.dumps(vocab)
    (tmp_path / "vocab.json").write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"format": 2, "pattern": "gpt2", "special_tokens": []}, "expected format 1, found 2"),
        (
            {"format": 1, "pattern": "gpt4", "special_tokens": []},
            "expected the pattern 'gpt2' or 'cl100k' or 'llama3' or 'qwen2' or 'smollm', found 'gpt4'",
        ),
        (
            {"format": 1, "pattern": "gpt2", "special_tokens": [], "ignore_merges": "yes"},
            "expected ignore_merges to be true or false, found 'yes'",
        ),
        ({"format": 1, "pattern": "gpt2"}, "expected special_tokens to be a list of non-empty strings, found None"),
        ({"format": 1, "pattern": "gpt2", "special_tokens": [1]}, "expected special_tokens to be a list"),
    ],
)
def test_a_bad_special_tokens_file_is_refused(tmp_path: Path, record: dict[str, object], message: str) -> None:
    """Format and pattern are checked, so that a later format is not read as this one."""
    _tokenizer().save(tmp_path)
    (tmp_path / "special_tokens.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"special_tokens\.json: " + message):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "special_tokens.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """The error says which of the three files is missing."""
    _tokenizer().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: expected a tokenizer file"):
        Tokenizer.from_directory(tmp_path)


def test_a_file_far_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointing at a corpus by mistake gives an error and does not fill the memory."""
    _tokenizer().save(tmp_path)
    monkeypatch.setattr(io, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match=r"expected at most 100 bytes, found"):
        Tokenizer.from_directory(tmp_path)


def test_merges_that_remake_a_token_after_its_use_are_refused() -> None:
    """Otherwise the order of merges would depend on the algorithm."""
    tokens = [bytes([value]) for value in range(256)] + [b"ab", b"bc", b"abc", b"abcd"]
    merges = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"abc", b"d"), (b"a", b"bc")]
    with pytest.raises(ValueError, match="merge 4: expected 'abc' to be made before it is used"):
        Tokenizer(dict(enumerate(tokens)), merges)


def test_files_with_a_prefix_are_a_tokenizer_too(tmp_path: Path) -> None:
    """`gpt2` stands for `gpt2-vocab.json` and `gpt2-merges.txt`; what they do not say is guessed with a warning."""
    tokenizer = _tokenizer((EOT, "<|pad|>"))
    tokenizer.save(tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens.json"):
        (tmp_path / name).rename(tmp_path / f"gpt2-{name}")
    assert Tokenizer.from_directory(tmp_path / "gpt2").fingerprint() == tokenizer.fingerprint()
    (tmp_path / "gpt2-special_tokens.json").unlink()
    with pytest.warns(UserWarning, match=r"special tokens are taken to be <\|endoftext\|>, <\|pad\|>, and the pattern"):
        assert Tokenizer.from_directory(tmp_path / "gpt2").fingerprint() == tokenizer.fingerprint()
    (tmp_path / "gpt2-merges.txt").unlink()
    with (
        pytest.warns(UserWarning, match="no such file"),
        pytest.raises(FileNotFoundError, match=r"gpt2-merges\.txt: expected a tokenizer file"),
    ):
        Tokenizer.from_directory(tmp_path / "gpt2")
    with pytest.raises(FileNotFoundError, match=r"other.*special_tokens\.json: expected a tokenizer file, found none"):
        Tokenizer.from_directory(tmp_path / "other")
