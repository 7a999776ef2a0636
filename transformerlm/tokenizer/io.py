"""A tokenizer's files in GPT-2's format; they are checked when they are read.

`vocab.json` is an object of token -> id, `merges.txt` a line per merge with its two parts and a space between, after a
line `#version: 0.2` that may be missing. Both write a token's bytes in GPT-2's alphabet: printable Latin-1 characters
stand for themselves, the other 68 bytes for U+0100 and up (a space is `Ġ`). Special tokens are written as they are,
which is the same thing where they are plain ASCII without spaces.

Every error is a ValueError of one line: the file (and line), what was expected, what was found.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformerlm.tokenizer.pretokenize import PATTERNS
from transformerlm.utils.json_files import read_json_object, read_limited
from transformerlm.utils.strings import check_is_no_string

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
SPECIALS_FILE = "special_tokens.json"

_LOOKS_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]+\|>")
_VERSION_LINE = "#version: 0.2"
MAX_FILE_BYTES = 1 << 27
MAX_SPECIALS_BYTES = 1 << 20
MAX_SPECIALS = 10_000  # finding them in a text takes time for each
_LONG_TOKENS = "a long run without a blank makes long tokens: split it into lines, or choose a smaller vocab_size"


@cache
def byte_alphabet() -> dict[int, str]:
    """Return GPT-2's character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + n) for n, value in enumerate(others)}


@cache
def _bytes_of_alphabet() -> dict[str, int]:
    return {character: value for value, character in byte_alphabet().items()}


def token_to_text(token: bytes) -> str:
    """Write a token's bytes in GPT-2's alphabet."""
    alphabet = byte_alphabet()
    return "".join(alphabet[value] for value in token)


def text_to_token(text: str) -> bytes:
    """Read a token from GPT-2's alphabet.

    Raises:
        ValueError: a character that is not of the alphabet.
    """
    try:
        return bytes(map(_bytes_of_alphabet().__getitem__, text))
    except KeyError as error:
        character = error.args[0]
        raise ValueError(
            f"expected characters of GPT-2's byte alphabet, found {character!r} (U+{ord(character):04X}) in {text!r}"
        ) from None


def vocab_as_text(vocab: Mapping[int, bytes], path: Path, special_tokens: Iterable[str] = ()) -> str:
    """Return what `vocab.json` holds: a token a line in the order of the ids; `path` is for errors.

    Raises:
        ValueError: a special token reads as another token.
    """
    check_is_no_string(special_tokens, "special_tokens")
    specials = {special.encode(): special for special in special_tokens}
    ids: dict[str, int] = {}
    for token_id, token in sorted(vocab.items()):
        name = specials.get(token) or token_to_text(token)
        if name in ids:
            raise ValueError(
                f"{path}: expected each token to be written differently, found the special token {name!r}, which reads "
                "as another token"
            )
        ids[name] = token_id
    return json.dumps(ids, ensure_ascii=False, indent=0) + "\n"


def merges_as_text(merges: Sequence[tuple[bytes, bytes]]) -> str:
    """Return what `merges.txt` holds: the merges in order."""
    lines = [_VERSION_LINE, *(f"{token_to_text(left)} {token_to_text(right)}" for left, right in merges)]
    return "\n".join(lines) + "\n"


def load_vocab(path: Path, special_tokens: Iterable[str] = ()) -> dict[int, bytes]:
    """Read and check `vocab.json`; keys equal to a special token are taken as they are.

    Raises:
        ValueError: anything but an object of token -> id with ids 0..n-1, each once, and all 256 bytes.
    """
    check_is_no_string(special_tokens, "special_tokens")
    specials = set(special_tokens)
    vocab: dict[int, bytes] = {}
    for name, token_id in read_json_file(path, max_bytes=MAX_FILE_BYTES).items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ValueError(f"{path}: expected a whole number as the id of {name!r}, found {token_id!r}")
        if token_id in vocab:
            raise ValueError(f"{path}: expected each id once, found {token_id} for {vocab[token_id]!r} and {name!r}")
        try:
            vocab[token_id] = name.encode() if name in specials else text_to_token(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    check_vocab(vocab, where=str(path))
    return vocab


def load_merges(
    path: Path, vocab: Mapping[int, bytes], special_tokens: Iterable[str] = (), *, in_order: bool = True
) -> list[tuple[bytes, bytes]]:
    """Read `merges.txt` and check it against the vocabulary and its special tokens.

    Raises:
        ValueError: a line that is no pair of known tokens, or a merge that comes twice. With `in_order` also a merge
            that comes before its parts, or a token of two bytes or more that no merge makes, and that neither is
            special nor looks so, as `<|endoftext|>` does.
    """
    lines = _read_text(path).split("\n")
    first_line = 2 if lines[0].startswith("#version") else 1
    lines = lines[first_line - 1 :]
    while lines and not lines[-1].strip():
        lines.pop()
    merges: list[tuple[bytes, bytes]] = []
    for number, line in enumerate(lines, first_line):
        parts = line.removesuffix("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}:{number}: expected two tokens with one space between, found {line[:80]!r}")
        try:
            merges.append((text_to_token(parts[0]), text_to_token(parts[1])))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    made = check_merges(merges, vocab, where=f"{path}:", first=first_line, in_order=in_order)
    made |= {token.encode("utf-8", "replace") for token in special_tokens}
    for token_id, token in vocab.items() if in_order else ():
        if len(token) > 1 and token not in made and not _LOOKS_SPECIAL.fullmatch(token.decode("utf-8", "replace")):
            raise ValueError(
                f"{path}: expected a merge for each token that is not special, found none for "
                f"{token_to_text(token)[:80]!r} (id {token_id}); the file was cut, or special_tokens lacks this one"
            )
    return merges


def tokenizer_files(path: Path) -> tuple[Path, Path, Path]:
    """Return the paths of a tokenizer's vocabulary, merges and special tokens.

    They are in the directory `path`, or their names begin with it and a dash: `gpt2-vocab.json`, `gpt2-merges.txt`.
    """
    names = (VOCAB_FILE, MERGES_FILE, SPECIALS_FILE)
    if not path.is_dir() and path.with_name(f"{path.name}-{VOCAB_FILE}").exists():
        vocab, merges, specials = (path.with_name(f"{path.name}-{name}") for name in names)
    else:
        vocab, merges, specials = (path / name for name in names)
    return vocab, merges, specials


def special_names(path: Path) -> list[str]:
    """Return the tokens of a `vocab.json` that look special, as `<|endoftext|>` does; GPT-2's files do not say it."""
    return [name for name in read_json_file(path, max_bytes=MAX_FILE_BYTES) if _LOOKS_SPECIAL.fullmatch(name)]


class SpecialsFile(NamedTuple):
    """What `special_tokens.json` says; `sha256` is the tokenizer's fingerprint, where the file names one."""

    special_tokens: list[str]
    pattern: str
    ignore_merges: bool = False
    sha256: str | None = None


def load_special_tokens(path: Path) -> SpecialsFile:
    """Read `special_tokens.json`.

    Raises:
        ValueError: the file is not valid; the message says what was expected and found.
    """
    record = read_json_file(path, max_bytes=MAX_SPECIALS_BYTES)
    if unknown := sorted(record.keys() - {"format", "pattern", "special_tokens", "sha256", "ignore_merges"}):
        raise ValueError(
            f"{path}: expected format, pattern, special_tokens, sha256 and ignore_merges, found {unknown[0]!r}"
        )
    if record.get("format") != 1:
        raise ValueError(f"{path}: expected format 1, found {record.get('format')!r}")
    pattern = record.get("pattern")
    if not isinstance(pattern, str) or pattern not in PATTERNS:
        names = " or ".join(map(repr, PATTERNS))
        raise ValueError(f"{path}: expected the pattern {names}, found {pattern!r}")
    tokens = record.get("special_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(f"{path}: expected special_tokens to be a list of non-empty strings, found {tokens!r}")
    if len(set(tokens)) < len(tokens) or len(tokens) > MAX_SPECIALS:
        raise ValueError(
            f"{path}: expected each special token once and {MAX_SPECIALS:,} at most, found {len(tokens):,}, "
            f"of which {len(set(tokens)):,} differ"
        )
    sha256 = record.get("sha256")
    if sha256 is not None and not isinstance(sha256, str):
        raise ValueError(f"{path}: expected sha256 to be a string, found {sha256!r}")
    ignore_merges = record.get("ignore_merges", False)
    if not isinstance(ignore_merges, bool):
        raise ValueError(f"{path}: expected ignore_merges to be true or false, found {ignore_merges!r}")
    return SpecialsFile(tokens, pattern, ignore_merges, sha256)


def check_special_tokens(special_tokens: Iterable[str]) -> None:
    """Refuse one string in the place of a list, and tokens of one byte, which are tokens already.

    Raises:
        TypeError: one string.
        ValueError: a token of one byte.
    """
    check_is_no_string(special_tokens, "special_tokens")
    for token in special_tokens:
        if len(token.encode("utf-8", "replace")) == 1:
            raise ValueError(f"special_tokens: expected two bytes or more, found {token!r}, which is a token as it is")


def check_can_be_loaded(contents: Mapping[Path, bytes], special_tokens: Sequence[str]) -> None:
    """Refuse a tokenizer whose files could be written but not read: too large, or with too many special tokens.

    Raises:
        ValueError: it is one; the message names the file.
    """
    _check_number(special_tokens)
    for path, data in contents.items():
        most = MAX_SPECIALS_BYTES if path.name == SPECIALS_FILE else MAX_FILE_BYTES
        if len(data) > most:
            advice = "choose shorter special tokens" if path.name == SPECIALS_FILE else _LONG_TOKENS
            raise ValueError(
                f"{path}: expected at most {most:,} bytes to write, as no more are read, found {len(data):,} ({advice})"
            )


def too_many_bytes(num_merges: int) -> ValueError:
    """Return the error for a learning whose tokens have more bytes in all than a tokenizer's files can hold."""
    return ValueError(
        f"input: expected tokens of at most {MAX_FILE_BYTES:,} bytes in all, as a file of a tokenizer has no more, "
        f"found more after {num_merges:,} merges ({_LONG_TOKENS})"
    )


def _check_number(special_tokens: Sequence[str]) -> None:
    if len(special_tokens) > MAX_SPECIALS:
        raise ValueError(
            f"special_tokens: expected {MAX_SPECIALS:,} in a tokenizer at most, found {len(special_tokens):,}"
        )


def check_special_tokens_to_save(special_tokens: Sequence[str]) -> None:
    """Refuse special tokens that `vocab.json` may not tell from the tokens that a training learns, and too many.

    Special tokens are written as they are, all others in GPT-2's alphabet, in which `§` is a byte and `Ġthe` a word.

    Raises:
        ValueError: a token that reads as another token, named, or more than `MAX_SPECIALS`.
    """
    _check_number(special_tokens)
    for token in special_tokens:
        other = reads_as(token)
        if other is not None and (len(other) == 1 or _is_in_some_text(other)):
            raise ValueError(
                f"special_tokens: expected tokens that {VOCAB_FILE} can tell from all others, found {token!r}, which "
                f"is how it writes the bytes {other!r} (choose ASCII characters)"
            )


def reads_as(special_token: str) -> bytes | None:
    """Return the bytes that GPT-2's alphabet reads in a special token, where these are not its own."""
    try:
        data = text_to_token(special_token)
    except ValueError:
        return None
    return data if data != special_token.encode() else None


def _is_in_some_text(data: bytes) -> bool:
    """Return whether bytes, which may begin and end within a character, can be a part of UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data.lstrip(bytes(range(0x80, 0xC0))))
    except UnicodeDecodeError:
        return False
    return True


def check_vocab(vocab: Mapping[int, bytes], *, where: str = "vocab") -> None:
    """Refuse a vocabulary whose ids are not 0..n-1, whose tokens are not distinct, or that lacks a byte."""
    if set(vocab) != set(range(len(vocab))):
        missing = next(token_id for token_id in range(len(vocab)) if token_id not in vocab)
        raise ValueError(
            f"{where}: expected the ids 0 to {len(vocab) - 1} for {len(vocab)} tokens, found none with id {missing}"
        )
    tokens: dict[bytes, int] = {}
    for token_id, token in vocab.items():
        if not token:
            raise ValueError(f"{where}: expected tokens of at least one byte, found an empty one with id {token_id}")
        if token in tokens:
            raise ValueError(
                f"{where}: expected each token once, found {token!r} with the ids {tokens[token]} and {token_id}"
            )
        tokens[token] = token_id
    for value in range(256):
        if bytes([value]) not in tokens:
            name = byte_alphabet()[value]
            raise ValueError(f"{where}: expected all 256 single bytes, found none for byte {value} (written {name!r})")


def check_merges(
    merges: Iterable[tuple[bytes, bytes]],
    vocab: Mapping[int, bytes],
    *,
    where: str = "merge ",
    first: int = 0,
    in_order: bool = True,
) -> set[bytes]:
    """Return the tokens that merges make, and the bytes.

    Raises:
        ValueError: a merge that comes twice, uses or makes an unknown token, or, with `in_order`, comes before the
            merges of its parts.
    """
    tokens = set(vocab.values())
    seen: set[tuple[bytes, bytes]] = set()
    made = {bytes([value]) for value in range(256)}
    used: set[bytes] = set()
    for number, (left, right) in enumerate(merges, first):
        new = left + right
        if unknown := [token_to_text(token) for token in (left, right, new) if token not in tokens]:
            raise ValueError(f"{where}{number}: expected tokens of the vocabulary, found {unknown[0]!r}, not in it")
        if in_order and (unmade := [token_to_text(part) for part in (left, right) if part not in made]):
            raise ValueError(f"{where}{number}: expected parts that earlier merges make, found {unmade[0]!r}")
        if (left, right) in seen:
            again = f"{token_to_text(left)} {token_to_text(right)}"
            raise ValueError(f"{where}{number}: expected each merge once, found {again!r} again")
        if in_order and new in used:
            raise ValueError(f"{where}{number}: expected {token_to_text(new)!r} to be made before it is used")
        seen.add((left, right))
        made.add(new)
        used.update((left, right))
    return made


def read_json_file(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read one of a tokenizer's JSON files, each key once (Python's reader would keep the last in silence)."""
    _check_there(path)
    return read_json_object(path, max_bytes=max_bytes)


def _check_there(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a tokenizer file, found none; run transformerlm-train-tokenizer")


def _read_text(path: Path) -> str:
    _check_there(path)
    try:
        return read_limited(path, max_bytes=MAX_FILE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8, found byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from None
