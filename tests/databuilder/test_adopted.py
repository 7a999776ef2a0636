"""Ids of other programs become token files: checked, described, and never changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from databuilder import adopted, build_dataset
from databuilder.adopted import adopt_ids
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.tokenizer import Tokenizer

EOT = "<|endoftext|>"
TOKENIZER = Tokenizer({number: bytes([number]) for number in range(256)}, [], [EOT])
TEXTS = ["one", "two é", "three\n\nlines"]


@pytest.fixture
def ours(tmp_path: Path) -> TokenDataset:
    """What make-data makes of the texts."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made/in.txt").write_text(EOT.join(TEXTS))
    build_dataset(tmp_path / "made/in.txt", tokenizer=TOKENIZER, train_path=tmp_path / "made/train.npy")
    return TokenDataset(tmp_path / "made/train.npy")


def adopt(source: Path, **options: object) -> adopted.AdoptReport:
    """Adopt a file with the tokenizer of these tests."""
    return adopt_ids(source, **{"tokenizer": TOKENIZER, "separator": EOT, **options})


def names(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_an_npy_is_described_where_it_is(
    ours: TokenDataset, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file keeps its bytes, and the sidecar and the offsets beside it are those of make-data."""
    monkeypatch.setattr(adopted, "BLOCK_TOKENS", block)
    path = tmp_path / "theirs.npy"
    path.write_bytes(ours.path.read_bytes())
    os.chmod(path, 0o444)
    told: list[tuple[str, int, int]] = []
    report = adopt(path, progress=lambda *done: told.append(done))
    assert path.read_bytes() == ours.path.read_bytes()
    found = TokenDataset(path)
    found.check()
    about_the_text = ("sources", "invalid_utf8", "sidecar_sha256")
    same = {key: value for key, value in ours.metadata.items() if key not in about_the_text}
    assert {key: value for key, value in found.metadata.items() if key not in about_the_text} == same
    np.testing.assert_array_equal(found.document_offsets, ours.document_offsets)
    assert (report.tokens, report.documents, report.bytes) == (ours.num_tokens, 3, ours.num_bytes)
    assert report.ends_documents
    assert report.beginning.startswith("'one<|endoftext|>two")
    assert told[-1] == ("check", 2 * ours.num_tokens, 2 * ours.num_tokens)
    assert names(tmp_path) == ["made", "theirs.documents.npy", "theirs.json", "theirs.npy"]


@pytest.mark.parametrize("form", ["bin", "bin of uint32", "int64", "int32", "uint64", "uint32"])
def test_other_forms_are_copied(ours: TokenDataset, tmp_path: Path, form: str) -> None:
    """Ids without a header, or of wide types, give the very file that make-data writes; the original stays."""
    source = tmp_path / ("theirs.bin" if "bin" in form else "theirs.npy")
    options = {"raw_dtype": "uint32"} if form == "bin of uint32" else {}
    if "bin" in form:
        ours.tokens[:].astype(options.get("raw_dtype", "uint16")).tofile(source)
    else:
        np.save(source, ours.tokens[:].astype(form))
    before = source.read_bytes()
    adopt(source, output=tmp_path / "data/train.npy", **options)
    assert source.read_bytes() == before
    assert (tmp_path / "data/train.npy").read_bytes() == ours.path.read_bytes()
    found = TokenDataset(tmp_path / "data/train.npy")
    assert found.metadata["sources"] == [{"path": str(source), "bytes": len(before)}]
    np.testing.assert_array_equal(found.document_offsets, ours.document_offsets)
    assert names(tmp_path / "data") == ["train.documents.npy", "train.json", "train.npy"]


def test_a_last_document_needs_no_separator(tmp_path: Path) -> None:
    """What follows the last separator is a document; without any separator, so is the whole, and the report says so."""
    np.save(tmp_path / "a.npy", np.array([65, 256, 66, 67], dtype=np.uint16))
    report = adopt(tmp_path / "a.npy")
    assert (report.documents, report.bytes, report.ends_documents) == (2, 3, True)
    offsets = TokenDataset(tmp_path / "a.npy").document_offsets
    assert offsets is not None
    assert offsets.tolist() == [0, 2, 4]
    np.save(tmp_path / "b.npy", np.array([65, 66], dtype=np.uint16))
    report = adopt(tmp_path / "b.npy")
    assert (report.documents, report.ends_documents) == (1, False)


def save(array: np.ndarray) -> Callable[[Path], object]:
    """Return what writes this array."""
    return lambda path: np.save(path, array)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "a.npy",
            save(np.array([1, 257], dtype=np.uint16)),
            "ids below 257, .*found 257 at position 1; give the token",
        ),
        (
            "a.npy",
            save(np.zeros((2, 2), dtype=np.uint16)),
            "expected a 1-D array of uint16 or uint32, found 2-D uint16",
        ),
        ("a.npy", save(np.zeros(2, dtype=np.int64)), "found 1-D int64; give an output, and it is copied"),
        ("a.npy", save(np.zeros(2, dtype=np.float32)), "found 1-D float32"),
        ("a.npy", save(np.zeros(2, dtype=">u2")), "found 1-D"),
        ("a.npy", save(np.zeros(0, dtype=np.uint16)), "expected ids, found an empty file"),
        ("a.npy", lambda path: path.write_bytes(b"text"), "not a readable .npy file"),
        ("a.npy", lambda path: None, "a.npy: no such file"),
        ("a.npy", lambda path: path.mkdir(), "a.npy: no such file"),
        ("a.documents.npy", save(np.zeros(2, dtype=np.uint16)), "does not end in .documents.npy"),
        ("a.bin", lambda path: path.write_bytes(b"abc"), "expected ids of 2 bytes each, found 3 bytes in all"),
        ("a.bin", lambda path: path.write_bytes(b""), "expected ids, found an empty file"),
        ("b.npy", save(np.array([3, -1], dtype=np.int64)), "ids below 257, .*found -1 at position 1"),
    ],
)
def test_what_is_no_file_of_ids_is_refused(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    """One line says what was expected and found, and nothing is left behind."""
    write(tmp_path / name)
    before = names(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        adopt(tmp_path / name, output=None if name.startswith("a.") and name != "a.bin" else tmp_path / "out.npy")
    assert names(tmp_path) == before


@pytest.mark.parametrize("taken", ["a.json", "a.documents.npy", "out.npy", "out.json", "out.documents.npy"])
def test_nothing_is_replaced(tmp_path: Path, taken: str) -> None:
    """A file where one would be written is refused, and stays."""
    np.save(tmp_path / "a.npy", np.array([65, 256], dtype=np.uint16))
    (tmp_path / taken).write_text("mine")
    before = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names(tmp_path)}
    with pytest.raises(FileExistsError, match=rf"{taken}: is there already"):
        adopt(tmp_path / "a.npy", output=None if taken.startswith("a.") else tmp_path / "out.npy")
    assert {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names(tmp_path)} == before


def test_a_call_that_was_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets without a sidecar, as a kill between the two leaves them, are taken; those of other ids are not."""
    np.save(tmp_path / "a.npy", np.array([65, 256, 66], dtype=np.uint16))

    rename = adopted.OffsetsWriter.rename

    def rename_and_die(offsets: adopted.OffsetsWriter) -> None:
        rename(offsets)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adopted.OffsetsWriter, "rename", rename_and_die)
        with pytest.raises(KeyboardInterrupt):
            adopt(tmp_path / "a.npy")
    assert names(tmp_path) == ["a.documents.npy", "a.npy"]
    assert adopt(tmp_path / "a.npy").documents == 2
    assert TokenDataset(tmp_path / "a.npy").document_offsets is not None
    assert names(tmp_path) == ["a.documents.npy", "a.json", "a.npy"]
    (tmp_path / "a.json").unlink()
    np.save(tmp_path / "a.npy", np.array([65, 66, 67], dtype=np.uint16))
    with pytest.raises(FileExistsError, match=r"a.documents.npy: is there already, with other offsets"):
        adopt(tmp_path / "a.npy")


def test_a_full_disk_leaves_nothing_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets get their name only if the sidecar can be written."""
    np.save(tmp_path / "a.npy", np.array([65, 256, 66], dtype=np.uint16))

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        adopt(tmp_path / "a.npy")
    assert names(tmp_path) == ["a.npy"]


def test_a_name_that_no_sidecar_can_hold_is_refused(tmp_path: Path) -> None:
    """Before the file is read."""
    with pytest.raises(ValueError, match=r"source: expected text in UTF-8, found '.*a\\udcff\.npy'"):
        adopt(tmp_path / "a\udcff.npy")


def test_the_separator_is_one_of_the_tokenizer(tmp_path: Path) -> None:
    """Another one is refused, with those that there are."""
    np.save(tmp_path / "a.npy", np.array([65], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"separator: .*\('<\|endoftext\|>'\), found '<\|end\|>'"):
        adopt(tmp_path / "a.npy", separator="<|end|>")
