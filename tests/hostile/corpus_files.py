"""Tokenizers, token files, configurations and texts that lie."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from config.io import dump_toml
from tests.hostile.corpus import (
    DEEP,
    Good,
    Payload,
    case,
    change_tokenizer,
    make_data,
    npy,
    train_on,
    train_tokenizer,
)
from tests.training.tiny_run import tiny_config
from tests.utils.packed import parquet_bytes, zstd

# --- tokenizers ----------------------------------------------------------------------------------------------------


def tokenizer_case(name: str, file: str, change: Callable[[str], str | bytes]) -> None:
    """Put a tokenizer with one file changed into the corpus."""

    @case(f"{file}: {name}", "make_data", file)
    def _(home: Path, good: Good) -> list[str]:
        return change_tokenizer(home, good, file, change)


def record(**changes: Any) -> Callable[[str], str]:
    """Return a function that changes values of a JSON object."""
    return lambda text: json.dumps({**json.loads(text), **changes})


VOCAB, MERGES, SPECIALS = "vocab.json", "merges.txt", "special_tokens.json"
tokenizer_case("a million levels", VOCAB, lambda text: f'{{"a": {DEEP}')
tokenizer_case("one key twice", VOCAB, lambda text: text.replace("{", '{"a": 7,', 1))
tokenizer_case("an id of 5,000 digits", VOCAB, lambda text: text.replace(": 97", f": {'9' * 5000}", 1))
tokenizer_case("an id of 2^62", VOCAB, record(a=2**62))
tokenizer_case("an id that is NaN", VOCAB, record(a=float("nan")))
tokenizer_case("an id that is a table", VOCAB, record(a={"id": 97}))
tokenizer_case("a token outside of the alphabet", VOCAB, lambda text: text.replace("{", '{"\\u6f22": 290,', 1))
tokenizer_case("half a character", VOCAB, lambda text: text.replace("{", '{"\\ud800": 290,', 1))
tokenizer_case("a list", VOCAB, lambda text: "[1, 2, 3]")
tokenizer_case("cut", VOCAB, lambda text: text[:-40])
tokenizer_case("no UTF-8", VOCAB, lambda text: b"\xff\xfe" + text.encode("utf-16-le"))
tokenizer_case("nothing at all", VOCAB, lambda text: "")
tokenizer_case("a pickle", VOCAB, lambda text: pickle.dumps({"a": 1}))
tokenizer_case("a merge of three", MERGES, lambda text: text + "a b c\n")
tokenizer_case("a merge that needs itself", MERGES, lambda text: text.replace("\n", "\nab a\n", 1))
tokenizer_case("a circle of merges", MERGES, lambda text: "#version: 0.2\n" + "\n".join(text.splitlines()[:0:-1]))
tokenizer_case("a merge twice", MERGES, lambda text: text + text.splitlines()[1] + "\n")
tokenizer_case("cut", MERGES, lambda text: text[: text.rindex("\n", 0, -1) + 1])
tokenizer_case("NUL", MERGES, lambda text: text + "\0 \0\n")
tokenizer_case("one long line", MERGES, lambda text: text + "a" * 1_000_000)
tokenizer_case("a pattern of its own", SPECIALS, record(pattern="(a+)+$"))
tokenizer_case("a pattern that is a table", SPECIALS, record(pattern={"regex": "(a+)+$"}))
tokenizer_case("a key that names code", SPECIALS, record(tokenizer_class="os.system"))
tokenizer_case("a token twice", SPECIALS, record(special_tokens=["<|endoftext|>"] * 2))
tokenizer_case("a token that is empty", SPECIALS, record(special_tokens=[""]))
tokenizer_case("a token that is a number", SPECIALS, record(special_tokens=[7]))
tokenizer_case("20,000 tokens", SPECIALS, record(special_tokens=[f"<{number}>" for number in range(20_000)]))
tokenizer_case("2 MB", SPECIALS, record(special_tokens=["x" * 2_000_000]))
tokenizer_case("a format to come", SPECIALS, record(format=2))
tokenizer_case("the sha256 of another", SPECIALS, record(sha256="0" * 64))


@case("special_tokens.json: half a character", "make_data", "special_tokens")
def _(home: Path, good: Good) -> list[str]:
    return change_tokenizer(home, good, SPECIALS, record(special_tokens=["\ud800"]))


@case("vocab.json: two tokens that change places", "make_data", "tokenizer")
def _(home: Path, good: Good) -> list[str]:
    swap = lambda text: text.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97')  # noqa: E731
    return change_tokenizer(home, good, VOCAB, swap)


# --- token files ---------------------------------------------------------------------------------------------------

IDS = np.arange(280, dtype=np.uint16)
HEADER = "{'descr': '<u2', 'fortran_order': False, 'shape': (%s,), }\n"


def array_case(name: str, data: Callable[[Path], bytes | np.ndarray], **facts: Any) -> None:
    """Put a token file into the corpus, with a sidecar that fits it but for `facts`."""

    @case(name, "train", "data.npy")
    def _(home: Path, good: Good) -> list[str]:
        return train_on(home, good, data(home), {"tokens": 280, **facts})


array_case("pickled objects", lambda home: _pickled(home))
array_case("a pickle", lambda home: pickle.dumps(Payload(home / "code-has-run")))
array_case("a zip of arrays", lambda home: _zipped(home))
array_case("a header with an expression", lambda home: npy(HEADER % "__import__('os').mkdir('code-has-run')"))
array_case("a header of deep brackets", lambda home: npy("(" * 3000))
array_case("a header of 4 GB", lambda home: npy(HEADER % 280, bytes(560), version=b"\x02\x00", length=2**32 - 1))
array_case("an array's header longer than the file", lambda home: npy(HEADER % 280, bytes(560), length=65_000))
array_case("two dimensions", lambda home: IDS.reshape(2, 140))
array_case("two dimensions in Fortran order", lambda home: np.asfortranarray(IDS.reshape(2, 140)))
array_case("numbers with a point", lambda home: IDS.astype(np.float32))
array_case("the other byte order", lambda home: IDS.astype(">u2"))
array_case("a shape beyond the file", lambda home: npy(HEADER % 10**9, bytes(560)), tokens=10**9)
array_case("a shape of 2^62", lambda home: npy(HEADER % 2**62, bytes(560)), tokens=2**62)
array_case("a shape that overflows", lambda home: npy(HEADER % (2**63 + 280), bytes(560)), tokens=2**63 + 280)
array_case("a negative shape", lambda home: npy(HEADER % -280, bytes(560)))
array_case("bytes behind the last id", lambda home: npy(HEADER % 280, bytes(5600)))
array_case("a file of four bytes", lambda home: b"\x93NUM")
array_case("an empty file", lambda home: b"")
array_case("ids beyond the vocabulary", lambda home: np.full(280, 65535, dtype=np.uint16))
array_case("a sha256 of another file", lambda home: IDS, sha256="0" * 64)
array_case("a sidecar with more tokens", lambda home: IDS, tokens=281)
array_case("a sidecar with another dtype", lambda home: IDS, dtype="uint32")


def _pickled(home: Path) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = Payload(home / "code-has-run")
    return array


def _zipped(home: Path) -> bytes:
    np.savez(home / "arrays.npz", IDS)
    return (home / "arrays.npz").read_bytes()


def sidecar_case(name: str, text: str) -> None:
    """Put a sidecar into the corpus."""

    @case(f"a sidecar {name}", "train", "data.json")
    def _(home: Path, good: Good) -> list[str]:
        return train_on(home, good, IDS, text)


sidecar_case("nested a million levels deep", DEEP)
sidecar_case("with one key twice", '{"format": 1, "format": 1}')
sidecar_case("with NaN", '{"format": 1, "tokens": NaN}')
sidecar_case("with a negative number", '{"format": 1, "tokens": -1}')
sidecar_case("with a number of 5,000 digits", f'{{"format": 1, "tokens": {"9" * 5000}}}')
sidecar_case("that is a list", "[]")


# --- configurations ------------------------------------------------------------------------------------------------


def toml_case(name: str, content: bytes | Callable[[bytes], bytes]) -> None:
    """Put a TOML file into the corpus."""

    @case(f"TOML: {name}", "train", "bad.toml")
    def _(home: Path, good: Good) -> list[str]:
        config = dump_toml(tiny_config(good.files, home)).encode()
        path = home / "bad.toml"
        path.write_bytes(content if isinstance(content, bytes) else content(config))
        return [f"--config={path}"]


toml_case("a million levels", b"v = " + DEEP.encode()[:900_000])
toml_case("deep tables", b"v = " + b"{a = " * 100_000)
toml_case("a key of 400,000 parts", b"a." * 400_000 + b"a = 1")
toml_case("a table of 400,000 parts", b"[" + b"a." * 400_000 + b"a]")
toml_case("a quoted key of 100,000 parts", b'"" . ' * 100_000 + b"a = 1")
toml_case("one key twice", lambda text: text.replace(b"seed = 1", b"seed = 1\nseed = 2"))
toml_case("one table twice", lambda text: text + b"[model]\n")
toml_case("nan", lambda text: text.replace(b"learning_rate = 0.003", b"learning_rate = nan"))
toml_case("-inf", lambda text: text.replace(b"learning_rate = 0.003", b"learning_rate = -inf"))
toml_case("a number of 5,000 digits", lambda text: text.replace(b"d_model = 32", b"d_model = " + b"9" * 5000))
toml_case("a number of 40 digits", lambda text: text.replace(b"d_model = 32", b"d_model = " + b"9" * 40))
toml_case("a date", lambda text: text.replace(b"d_model = 32", b"d_model = 2026-01-01"))
toml_case("a byte order mark", lambda text: b"\xef\xbb\xbf" + text)
toml_case("UTF-16", lambda text: text.decode().encode("utf-16"))
toml_case("NUL", lambda text: text.replace(b"uns_dir = ", b"uns_dir = \0"))
toml_case("NUL in a path", lambda text: text.replace(b"train.npy", b"train\\u0000.npy"))
toml_case("no UTF-8", lambda text: text + b"# \xff\n")
toml_case("carriage returns alone", lambda text: text.replace(b"\n", b"\r"))
toml_case("a key with line ends and escapes", lambda text: text + b'"a\\nb\\u001b[2J" = 1\n')
toml_case("a key of 900,000 characters", lambda text: text + b"\n[x]\n" + b"k" * 900_000 + b" = 1\n")
toml_case("a run that leaves its directory", lambda text: text.replace(b'run_name = "run"', b'run_name = "../run"'))


@case("TOML: a line of 100 MB", "train", "bad.toml")
def _(home: Path, good: Good) -> list[str]:
    with (home / "bad.toml").open("wb") as file:
        file.write(b"a = '")
        file.truncate(100_000_000)
    return [f"--config={home / 'bad.toml'}"]


# --- texts ---------------------------------------------------------------------------------------------------------


def text_case(name: str, file: str, content: bytes | Callable[[], bytes], *options: str) -> None:
    """Put a text into the corpus, once for each command that reads texts."""

    def write(home: Path) -> Path:
        (home / file).write_bytes(content if isinstance(content, bytes) else content())
        return home / file

    case(f"{name}, to train-tokenizer", "train_tokenizer", file)(
        lambda home, good: [*train_tokenizer(home, write(home)), *options]
    )
    case(f"{name}, to make-data", "make_data", file)(
        lambda home, good: [*make_data(home, good, text=write(home)), *options]
    )


text_case("JSON lines nested a million levels deep", "a.jsonl", b'{"text": ' + DEEP.encode())
text_case("JSON lines with two texts", "a.jsonl", b'{"text": "a", "text": "b"}')
text_case("JSON lines with a number of 5,000 digits", "a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}")
text_case("JSON lines with a number as the text", "a.jsonl", b'{"text": NaN}')
text_case("JSON lines with a list", "a.jsonl", b"[1, 2]")
text_case("JSON lines that end early", "a.jsonl", b'{"text": "a"}\n{"text": "b')
text_case("JSON lines with NUL", "a.jsonl", b'{"text": "a\0b"}')
text_case("a gzip file cut", "a.gz", lambda: gzip.compress(b"some text " * 1000)[:-9])
text_case("a gzip file that is none", "a.txt.gz", b"plain text")
text_case("a gzip file with a flipped bit", "a.gz", lambda: _flipped(gzip.compress(b"some text " * 1000)))
text_case("70 kB of gzip with a line of 70 MB", "a.jsonl.gz", lambda: gzip.compress(bytes(70_000_000), 1))
text_case("a zstd file cut", "a.zst", lambda: zstd(b"some text " * 1000)[:-3])
text_case("a zstd file that is none", "a.txt.zst", b"plain text")
text_case("a few kB of zstd with a line of 70 MB", "a.jsonl.zst", lambda: zstd(bytes(70_000_000)))
text_case("a zstd file that wants a window of 2 GB", "a.zst", bytes.fromhex("28b52ffd00a800010000"))
text_case("a Parquet file that is none", "a.parquet", b"PAR1 and more PAR1")
text_case("a Parquet file cut", "a.parquet", lambda: parquet_bytes({"text": ["some text"] * 100})[:-9])
text_case("a Parquet file with flipped bits", "a.parquet", lambda: _flipped(parquet_bytes({"text": ["text"] * 100})))
text_case("a Parquet file whose texts are numbers", "a.parquet", lambda: parquet_bytes({"text": [1, 2]}))
text_case("a Parquet file with a row of nothing", "a.parquet", lambda: parquet_bytes({"text": ["a", None]}))
text_case("a text that is no UTF-8", "a.txt", b"ab\xffcd", "--invalid_utf8=refuse")
text_case("a text with half a character", "a.jsonl", b'{"text": "\\ud83d"}', "--invalid_utf8=refuse")
text_case("an empty text", "a.txt", b"")


@case("20 kB of gzip with 20 MB of one letter, to make-data", "make_data", "a.gz")
def _(home: Path, good: Good) -> list[str]:
    (home / "a.gz").write_bytes(gzip.compress(b"a" * 20_000_000))
    return make_data(home, good, text=home / "a.gz")


@case("20 kB of gzip with 20 MB of NUL, to train-tokenizer", "train_tokenizer", "a.gz")
def _(home: Path, good: Good) -> list[str]:
    (home / "a.gz").write_bytes(gzip.compress(bytes(20_000_000)))
    return train_tokenizer(home, home / "a.gz")


@case("a zip archive", "make_data", "a.zip")
def _(home: Path, good: Good) -> list[str]:
    with zipfile.ZipFile(home / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../escaped.txt", "a" * 1_000_000)
    return make_data(home, good, text=home / "a.zip")


@case("a pipe in the place of a token file's sidecar", "train", "data.json")
def _(home: Path, good: Good) -> list[str]:
    arguments = train_on(home, good, IDS)
    (home / "data.json").unlink()
    os.mkfifo(home / "data.json")
    return arguments


@case("a folder in the place of a vocabulary", "make_data", "vocab.json")
def _(home: Path, good: Good) -> list[str]:
    folder = home / "tokenizer"
    shutil.copytree(good.files.tokenizer, folder)
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").mkdir()
    return make_data(home, good, tokenizer=folder)


def _flipped(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 4]) + data[41:]
