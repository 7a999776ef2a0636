"""Token files hold every document whole and in order, and no output only looks whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from databuilder import Source, build_dataset, checks, dataset_builder, encoding
from databuilder.sources import are_chosen
from tests.utils.packed import write_parquet, zstd
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer, reading
from transformerlm.tokenizer.pair_table import learn_merges
from transformerlm.utils.json_files import values_sha256

EOT = "<|endoftext|>"
MERGES = learn_merges({b" one": 5, b" two": 4, b"three": 3, b"\n\n": 2}, 12)


def _tokenizer(specials: Sequence[str] = (EOT,)) -> Tokenizer:
    tokens = [bytes([value]) for value in range(256)] + [left + right for left, right in MERGES]
    return Tokenizer(dict(enumerate(tokens)), MERGES, specials)


TOKENIZER = _tokenizer()
SEPARATOR_ID = TOKENIZER.special_token_ids[EOT]


def _documents(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [" one", " two", "three", "\n\n", " ", "é漢", "'s", "  x", "42"]
    return ["doc" + "".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(number)]


def _ids(documents: Sequence[str]) -> list[int]:
    return [token_id for document in documents for token_id in [*TOKENIZER.encode(document), SEPARATOR_ID]]


def _build(tmp_path: Path, inputs: object = None, **options: object) -> dataset_builder.BuildReport:
    options = {"tokenizer": TOKENIZER, "train_path": tmp_path / "train.npy", **options}
    return build_dataset(inputs or tmp_path / "in.txt", **options)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[1, 100, 1 << 20])
def _batch_chars(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(encoding, "BATCH_CHARS", request.param)
    return request.param


@pytest.mark.usefixtures("_batch_chars")
@pytest.mark.parametrize("joint", [EOT, f"\n{EOT}\n"])
def test_each_document_is_followed_by_the_separator(tmp_path: Path, joint: str) -> None:
    """The token file holds each document's ids and the separator's id, whatever the size of the batches."""
    documents = _documents(60)
    (tmp_path / "in.txt").write_bytes(joint.join(documents).encode())
    report = _build(tmp_path)
    expected = joint.join(documents).split(EOT)
    tokens = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert (tokens.dtype, tokens.ndim) == (np.uint16, 1)
    assert tokens.tolist() == _ids(expected)
    assert report.train.documents == 60
    assert report.train.bytes == sum(len(text.encode()) for text in expected)
    assert (report.valid, report.invalid_utf8, report.empty_documents) == (None, 0, 0)


def test_all_kinds_of_inputs_are_read_in_order(tmp_path: Path) -> None:
    """Plain text, gzip and JSON lines; a file's end ends a document, a JSON line is one."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(f"two{EOT}three".encode()))
    (tmp_path / "c.jsonl").write_text('{"body": "four"}\n{"body": "five"}\n')
    report = _build(tmp_path, [f"{tmp_path}/a.*", tmp_path / "b.txt.gz", tmp_path / "c.jsonl"], text_field="body")
    assert np.load(tmp_path / "train.npy").tolist() == _ids(["one", "two", "three", "four", "five"])
    assert report.train.documents == 5


def test_the_sidecar_says_what_the_file_is(tmp_path: Path) -> None:
    """Counts, type, both fingerprints and the sources, so that training can check what it is given."""
    (tmp_path / "in.txt").write_text(f"one{EOT}two é")
    report = _build(tmp_path)
    sidecar = json.loads((tmp_path / "train.json").read_text())
    assert sidecar.pop("sidecar_sha256") == values_sha256(sidecar, kept_in="sidecar_sha256")
    assert sidecar == {
        "format": 1,
        "tokens": report.train.tokens,
        "bytes": 9,
        "documents": 2,
        "dtype": "uint16",
        "vocab_size": TOKENIZER.vocab_size,
        "tokenizer_sha256": TOKENIZER.fingerprint(),
        "sha256": hashlib.sha256((tmp_path / "train.npy").read_bytes()).hexdigest(),
        "documents_sha256": hashlib.sha256((tmp_path / "train.documents.npy").read_bytes()).hexdigest(),
        "sources": [{"path": str(tmp_path / "in.txt"), "bytes": 22}],
        "separator": EOT,
        "separator_id": SEPARATOR_ID,
        "invalid_utf8": 0,
    }
    assert np.load(tmp_path / "train.npy").shape == (report.train.tokens,)
    assert _names(tmp_path) == ["in.txt", "train.documents.npy", "train.json", "train.npy"]


def test_large_vocabularies_get_wider_ids(tmp_path: Path) -> None:
    """Beyond 65,536 ids the file is uint32."""
    tokens = [bytes([value]) for value in range(256)] + [f"<{number}>".encode() for number in range(65_300)]
    (tmp_path / "in.txt").write_text("one")
    _build(tmp_path, tokenizer=Tokenizer(dict(enumerate(tokens)), [], [EOT]))
    assert np.load(tmp_path / "train.npy").tolist() == [*b"one", 65_556]
    assert json.loads((tmp_path / "train.json").read_text())["dtype"] == "uint32"


@pytest.mark.usefixtures("_batch_chars")
def test_documents_without_text_are_dropped(tmp_path: Path) -> None:
    """White space between separators is not a document; white space before text belongs to it."""
    (tmp_path / "in.txt").write_text(f"{EOT}\n{EOT}  {EOT}\n\n  one{EOT}\n\n{EOT}\n")
    report = _build(tmp_path)
    assert np.load(tmp_path / "train.npy").tolist() == _ids(["\n\n  one"])
    assert (report.train.documents, report.empty_documents) == (1, 4)


@pytest.mark.usefixtures("_batch_chars")
def test_longer_and_other_special_tokens_stay_in_their_document(tmp_path: Path) -> None:
    """Only the separator itself ends a document, not a special token that begins with it."""
    tokenizer = _tokenizer([EOT, EOT + EOT, "<|pad|>"])
    text = f"one{EOT}{EOT}two<|pad|>\n\n<|pad|>three{EOT}four"
    (tmp_path / "in.txt").write_text(text)
    report = _build(tmp_path, tokenizer=tokenizer)
    assert np.load(tmp_path / "train.npy").tolist() == tokenizer.encode(text + EOT)
    assert report.train.documents == 2


@settings(max_examples=80, deadline=None)
@given(
    text=st.lists(st.sampled_from([EOT, "<|", "|>", " ", "\n", "one", "'", "s", "漢", "x" * 30, "\u3000"])).map(
        "".join
    ),
    batch_chars=st.integers(1, 40),
)
def test_any_text_gives_the_ids_of_its_documents(
    text: str, batch_chars: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For any text and any batch size the file is the documents' ids, and the counts are theirs."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "in.txt").write_bytes(text.encode())
    documents = [document for document in text.split(EOT) if document.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARS", batch_chars)
        if not documents:
            with pytest.raises(ValueError, match="input: expected text, found none"):
                _build(folder)
            return
        report = _build(folder)
    assert np.load(folder / "train.npy").tolist() == _ids(documents)
    assert report.train.documents == len(documents)
    assert report.train.bytes == sum(len(document.encode()) for document in documents)


@pytest.mark.parametrize("batch", [1, 30, 5000])
def test_files_read_as_bytes_give_the_same_token_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """The compiled engine reads plain text in chunks of bytes: ids, split, counts and sidecars are the reference's."""
    pytest.importorskip("numba")
    monkeypatch.setattr(encoding, "BATCH_CHARS", batch)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 100)
    rng = random.Random(batch)
    for name in ("b.txt", "c.txt", "d.txt"):
        text = "".join(
            rng.choices([EOT, "<|end", "one", " ", "\n", "é", "漢字", "'s", "\u3000", "\ufffd"], k=150)
        ).encode()
        (tmp_path / name).write_bytes(text[:400] + b"\xff\xe2\x82 " + text[400:] + b" \xf0\x9f")
    (tmp_path / "a.txt").write_text(f"small{EOT}file")
    (tmp_path / "c2.jsonl").write_text('{"text": "a line"}\n' * 20)
    (tmp_path / "c3.zst").write_bytes(zstd(f"packed{EOT}text".encode() * 20 + b"\xff\xe2\x82 \xf0\x9f"))
    write_parquet(tmp_path / "c4.parquet", {"text": ["a row", "漢字"] * 50})
    built = []
    for engine in ("reference", "compiled"):
        tokenizer = Tokenizer(TOKENIZER.vocab, MERGES, TOKENIZER.special_tokens, engine=engine)  # type: ignore[arg-type]
        options = {"valid_path": tmp_path / "v.npy", "valid_fraction": 0.3, "overwrite": True}
        report = _build(tmp_path, [f"{tmp_path}/*.txt", f"{tmp_path}/c[234].*"], tokenizer=tokenizer, **options)
        files = [(tmp_path / file).read_bytes() for file in ("train.npy", "train.json", "v.npy", "v.json")]
        built.append((files, report.invalid_utf8, report.empty_documents))
    assert built[0] == built[1]
    assert built[0][1] >= 9


def test_the_split_takes_whole_documents(tmp_path: Path) -> None:
    """Both files together hold each document once, in order, close to the fraction; the sidecars count their own."""
    documents = _documents(200)
    (tmp_path / "in.txt").write_bytes(EOT.join(documents).encode())
    report = _build(tmp_path, valid_path=tmp_path / "valid.npy", valid_fraction=0.1)
    is_held_out = are_chosen(np.arange(200), 0.1)
    held_out = [document for document, chosen in zip(documents, is_held_out, strict=True) if chosen]
    kept = [document for document, chosen in zip(documents, is_held_out, strict=True) if not chosen]
    assert np.load(tmp_path / "train.npy").tolist() == _ids(kept)
    assert np.load(tmp_path / "valid.npy").tolist() == _ids(held_out)
    assert report.valid is not None
    assert (report.train.documents, report.valid.documents) == (180, 20)
    assert json.loads((tmp_path / "valid.json").read_text())["documents"] == 20


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_split_is_even_everywhere(fraction: float) -> None:
    """In any stretch of 200 documents the number of held-out ones is that of the fraction, give or take two."""
    chosen = are_chosen(np.arange(5000), fraction)
    assert chosen[0]
    for start in range(0, 4800, 37):
        assert abs(sum(chosen[start : start + 200]) - 200 * fraction) <= 2
    assert not are_chosen(np.arange(100), 0.0).any()


def test_a_split_with_an_empty_side_is_refused(tmp_path: Path) -> None:
    """A single document cannot be on both sides; the message says how documents end."""
    (tmp_path / "in.txt").write_text("just one document")
    with pytest.raises(ValueError, match=r"at least one document on each side, found 1 in all at 0\.1 \(documents end"):
        _build(tmp_path, valid_path=tmp_path / "valid.npy", valid_fraction=0.1)
    assert _names(tmp_path) == ["in.txt"]


def test_workers_do_not_change_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process or two: the same bytes, sidecars included."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", 500)
    (tmp_path / "in.txt").write_bytes(EOT.join(_documents(300)).encode())
    reports: list[tuple[str, int, int]] = []
    contents = []
    for workers in (1, 2):
        files = {"train_path": tmp_path / "t.npy", "valid_path": tmp_path / "v.npy", "valid_fraction": 0.1}
        _build(tmp_path, **files, num_workers=workers, overwrite=True, progress=lambda *now: reports.append(now))
        contents.append([(tmp_path / name).read_bytes() for name in ("t.npy", "t.json", "v.npy", "v.json")])
    assert contents[0] == contents[1]
    size = (tmp_path / "in.txt").stat().st_size
    assert reports[-1] == ("encode", size, size)
    assert [done for _, done, _ in reports[: len(reports) // 2]] == sorted(
        done for _, done, _ in reports[: len(reports) // 2]
    )


def test_invalid_bytes_are_replaced_and_reported(tmp_path: Path) -> None:
    """Invalid UTF-8 does not stop a build, but it is counted."""
    (tmp_path / "in.txt").write_bytes(b"one\xff two")
    report = _build(tmp_path)
    assert report.invalid_utf8 == 1
    assert TOKENIZER.decode(np.load(tmp_path / "train.npy")) == f"one\ufffd two{EOT}"


@pytest.mark.parametrize("existing", ["train.npy", "train.json", "valid.npy", "valid.json"])
def test_existing_outputs_are_refused_before_any_work(tmp_path: Path, existing: str) -> None:
    """Without `overwrite` nothing is read, written or changed."""
    (tmp_path / "in.txt").write_text(f"one{EOT}two")
    (tmp_path / existing).write_text("precious")
    with pytest.raises(FileExistsError, match=f"{existing}: expected no such file yet"):
        _build(tmp_path, valid_path=tmp_path / "valid.npy", valid_fraction=0.5)
    assert (tmp_path / existing).read_text() == "precious"
    assert _names(tmp_path) == sorted(["in.txt", existing])


def test_a_failed_overwrite_keeps_the_old_files(tmp_path: Path) -> None:
    """Old files are replaced at the very end only; a build that fails before leaves them as they were."""
    (tmp_path / "in.txt").write_text("one")
    _build(tmp_path)
    old = (tmp_path / "train.npy").read_bytes(), (tmp_path / "train.json").read_bytes()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: expected the field 'text'"):
        _build(tmp_path, tmp_path / "bad.jsonl", overwrite=True)
    assert ((tmp_path / "train.npy").read_bytes(), (tmp_path / "train.json").read_bytes()) == old
    assert not any("tmp" in name for name in _names(tmp_path))
    (tmp_path / "in.txt").write_text("two")
    _build(tmp_path, overwrite=True)
    assert np.load(tmp_path / "train.npy").tolist() == _ids(["two"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": 0.1}, "valid_path: expected exactly when valid_fraction is above 0, found None with 0.1"),
        ({"valid_path": "v.npy"}, "valid_path: expected exactly when"),
        (
            {"valid_path": "v.npy", "valid_fraction": 1.0},
            "valid_fraction: expected 0 or more and less than 1, found 1.0",
        ),
        ({"valid_path": "v.npy", "valid_fraction": float("nan")}, "valid_fraction: expected"),
        ({"valid_path": "train.npy", "valid_fraction": 0.1}, "expected another file than train_path"),
        ({"train_path": "train.bin"}, r"expected token files that end in \.npy, found"),
        ({"train_path": "folder.npy"}, "expected a file to write, found a folder"),
        ({"valid_path": "in.txt/v.npy", "valid_fraction": 0.5}, "expected a directory, found the file"),
        ({"separator": "<|sep|>"}, r"\('<\|endoftext\|>'\), found '<\|sep\|>'"),
        ({"tokenizer": _tokenizer(())}, r"special token of the tokenizer \(none at all\)"),
        ({"inputs": "gone.txt"}, "found nothing at"),
        ({"inputs": "out.npy.txt", "train_path": "in.npy"}, "found nothing"),
        ({"num_workers": 0}, "num_workers: expected at least 1"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, found 0"),
        ({"max_tokens": 1}, "max_tokens: expected the first document within 1 tokens, found a longer one"),
    ],
)
def test_requests_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    """Each mistake is one line, and nothing is left behind."""
    (tmp_path / "in.txt").write_text("one")
    (tmp_path / "folder.npy").mkdir()
    paths = {key: tmp_path / str(options[key]) for key in ("train_path", "valid_path", "inputs") if key in options}
    before = _names(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        _build(tmp_path, **{**options, **paths})
    assert "\n" not in str(caught.value)
    assert _names(tmp_path) == before


def test_names_and_sources_in_one_list_are_refused(tmp_path: Path) -> None:
    """The message says how to turn a name into a source."""
    (tmp_path / "in.txt").write_text("one")
    for mixed in ([str(tmp_path / "in.txt"), Source("b.txt")], [Source("b.txt"), "in.txt"]):
        with pytest.raises(TypeError, match=r"inputs: expected names alone or sources alone, found both \(Source\('"):
            _build(tmp_path, mixed)
    with pytest.raises(ValueError, match="max_tokens: expected input, found weighted sources"):
        _build(tmp_path, [Source(tmp_path / "in.txt")], max_tokens=10)


@pytest.mark.usefixtures("_batch_chars")
@pytest.mark.filterwarnings("ignore:rows spell")
@pytest.mark.parametrize("engine", ["reference", "compiled"])
def test_rows_are_plain_text_unless_special_tokens_are_allowed(tmp_path: Path, engine: str) -> None:
    """A separator spelled in a row does not end a document; in a text file beside it, it does."""
    tokenizer = Tokenizer(TOKENIZER.vocab, MERGES, (EOT, "<|user|>", "one"), engine=engine)  # type: ignore[arg-type]
    rows = [f"GPT-2's {EOT} ends a text.", f"<|user|> one{EOT}", "bone" * 50]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    write_parquet(tmp_path / "b.parquet", {"text": rows})
    (tmp_path / "c.txt").write_text(rows[0])
    with pytest.warns(UserWarning, match=r"rows spell <\|endoftext\|>, which is plain text there; allow_special makes"):
        _build(tmp_path, tmp_path / "a.jsonl", tokenizer=tokenizer)
    for allow_special, encode, num_rows in ((False, tokenizer.encode_ordinary, 3), (True, tokenizer.encode, 4)):
        report = _build(
            tmp_path, f"{tmp_path}/[abc].*", tokenizer=tokenizer, allow_special=allow_special, overwrite=True
        )
        expected = [token_id for row in 2 * rows for token_id in [*encode(row), SEPARATOR_ID]]
        expected += [*tokenizer.encode(rows[0]), SEPARATOR_ID]
        if allow_special:  # nothing is between the separator at the second row's end and the row's own end
            assert expected.count(SEPARATOR_ID) == report.train.documents + 2
        else:
            assert np.load(tmp_path / "train.npy").tolist() == expected
        assert report.train.documents == 2 * num_rows + 2


@pytest.mark.usefixtures("_batch_chars")
@pytest.mark.parametrize("max_tokens", [400, 900, 10**6])
def test_max_tokens_stops_at_the_last_document_that_fits(tmp_path: Path, max_tokens: int) -> None:
    """Whole documents from the first on, in all outputs together; what comes after is not read."""
    documents = _documents(60)
    (tmp_path / "in.txt").write_text(EOT.join(documents), newline="")
    ends = np.cumsum([len(_ids([document])) for document in documents])
    number = int(np.count_nonzero(ends <= max_tokens))
    report = _build(tmp_path, max_tokens=max_tokens)
    assert np.load(tmp_path / "train.npy").tolist() == _ids(documents[:number])
    assert report.train.documents == number
    assert report.train.bytes == sum(len(document.encode()) for document in documents[:number])
    assert json.loads((tmp_path / "train.json").read_text())["max_tokens"] == max_tokens
    options = {"valid_path": tmp_path / "v.npy", "valid_fraction": 0.3, "overwrite": True}
    both = _build(tmp_path, max_tokens=max_tokens, **options)
    assert both.valid is not None
    assert both.train.documents + both.valid.documents == number
    assert both.train.tokens + both.valid.tokens == report.train.tokens


def test_beyond_max_tokens_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad line after the sample is never read."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", 10)
    lines = [json.dumps({"text": f"document {number}"}) for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "no JSON"]))
    assert _build(tmp_path, tmp_path / "a.jsonl", max_tokens=60).train.documents >= 3


@pytest.mark.parametrize("engine", ["reference", "compiled"])
def test_what_is_read_ahead_of_max_tokens_shows_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Invalid bytes and a bad line beyond the sample change neither files nor numbers, for any number of workers."""
    pytest.importorskip("numba")
    monkeypatch.setattr(encoding, "BATCH_CHARS", 20)
    lines = [b'{"text": "document %d \xff"}' % number for number in range(8)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b"no JSON"]))
    tokenizer = Tokenizer(TOKENIZER.vocab, MERGES, TOKENIZER.special_tokens, engine=engine)  # type: ignore[arg-type]
    built = []
    for workers in (1, 2, 4):
        report = _build(
            tmp_path, tmp_path / "a.jsonl", tokenizer=tokenizer, max_tokens=60, num_workers=workers, overwrite=True
        )
        built.append([report.invalid_utf8, *((tmp_path / name).read_bytes() for name in ("train.npy", "train.json"))])
    assert built[0] == built[1] == built[2]
    assert built[0][0] == 6


@pytest.mark.parametrize("separator", [EOT, "\ufffd t"])
def test_special_tokens_that_invalid_bytes_may_spell_are_found_by_both_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    """Where U+FFFD is part of a special token, the file is read as text, so the size of chunks changes no id."""
    pytest.importorskip("numba")
    monkeypatch.setattr(encoding, "BATCH_CHARS", 7)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 7)
    data = b"one \xff two \xff three <|endoftext|>" * 20
    (tmp_path / "in.txt").write_bytes(data)
    for engine in ("reference", "compiled"):
        tokenizer = Tokenizer(TOKENIZER.vocab, MERGES, (EOT, "\ufffd t"), engine=engine)  # type: ignore[arg-type]
        _build(tmp_path, tokenizer=tokenizer, separator=separator, overwrite=True, num_workers=1)
        expected = tokenizer.encode(data.decode("utf-8", "replace"))
        if separator != EOT:
            expected.append(tokenizer.special_token_ids[separator])
        assert np.load(tmp_path / "train.npy").tolist() == expected


def test_an_output_among_the_inputs_is_refused(tmp_path: Path) -> None:
    """Even with `overwrite` an input is never overwritten."""
    (tmp_path / "train.json").write_text("one")
    with pytest.raises(ValueError, match="expected an output that is not an input"):
        _build(tmp_path, tmp_path / "train.json", overwrite=True)
    assert (tmp_path / "train.json").read_text() == "one"


def test_too_small_a_disk_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch shows how much disk the whole will take."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", 1000)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    (tmp_path / "in.txt").write_text("漢字 one two\n" * 100_000)
    with pytest.raises(OSError, match=r"expected about 2 MB for the token files, found 1 MB free"):
        _build(tmp_path)
    assert _names(tmp_path) == ["in.txt"]


_SCRIPT = """
import resource, sys
from databuilder import Source, build_dataset, encoding
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer, reading
from transformerlm.utils.json_files import values_sha256
if __name__ == "__main__":
    folder, workers, file_limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    encoding.BATCH_CHARS = 50_000
    tokenizer = Tokenizer({value: bytes([value]) for value in range(256)}, [], ["<|endoftext|>"])
    try:
        build_dataset(folder + "/in.txt", tokenizer=tokenizer, train_path=folder + "/train.npy", num_workers=workers,
                      overwrite=True, progress=lambda *now: print(*now, flush=True))
    except OSError as error:
        sys.exit(str(error))
"""


def _start_build(folder: Path, *, workers: int = 1, file_limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SCRIPT, str(folder), str(workers), str(file_limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path: Path, workers: int) -> None:
    """After SIGKILL in the middle there is neither token file nor sidecar, and the next build takes over."""
    (tmp_path / "in.txt").write_text("one two three\n" * 400_000)
    process = _start_build(tmp_path, workers=workers)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("encode ")
    process.kill()
    process.communicate(timeout=600)
    assert [name for name in _names(tmp_path) if "tmp" not in name] == ["in.txt"]
    (tmp_path / "in.txt").write_text("one")
    _build(tmp_path)
    assert _names(tmp_path) == ["in.txt", "train.documents.npy", "train.json", "train.npy"]
    assert np.load(tmp_path / "train.npy").tolist() == _ids(["one"])


@pytest.mark.skipif(os.name != "posix", reason="sets a limit on file sizes")
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    """If the system refuses to write more, the build ends with one line that names the file; old files stay."""
    (tmp_path / "in.txt").write_text("one two three\n" * 40_000)
    (tmp_path / "train.npy").write_text("old")
    process = _start_build(tmp_path, file_limit=300_000)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "File too large after" in error
    assert "train.npy" in error
    assert "Traceback" not in error
    assert _names(tmp_path) == ["in.txt", "train.npy"]
    assert (tmp_path / "train.npy").read_text() == "old"


def test_offsets_say_where_each_document_begins(tmp_path: Path) -> None:
    """Beside each token file is one number a document, and the end: what lies between is the document's ids."""
    texts = ["one", "two é", "three\n\nlines", "four", "five", "six"]
    (tmp_path / "in.txt").write_text(EOT.join(texts))
    _build(tmp_path, valid_path=tmp_path / "valid.npy", valid_fraction=0.3)
    found = []
    for name in ("train", "valid"):
        data = TokenDataset(tmp_path / f"{name}.npy")
        offsets = data.document_offsets
        assert offsets is not None
        assert offsets.dtype == np.int64
        assert len(offsets) == data.num_documents + 1
        found += [TOKENIZER.decode(data.tokens[start : end - 1].tolist()) for start, end in pairwise(offsets.tolist())]
    assert sorted(found) == sorted(texts)
