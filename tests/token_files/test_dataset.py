"""A token file is read as it was written, and what contradicts its sidecar is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transformerlm.token_files import dataset
from transformerlm.token_files.dataset import TokenDataset
from transformerlm.training.data import get_batch

TOKENS = np.arange(1000, dtype=np.uint16)
BATCH = {"batch_size": 12, "context_length": 8, "seed": 3, "step": 7}


def write_dataset(directory: Path, array: Any = TOKENS, **changes: Any) -> Path:
    """Write a token file with its sidecar; `changes` replace entries of the sidecar, None removes one."""
    path = directory / "train.npy"
    np.save(path, array)
    metadata = {
        "format": 1,
        "tokens": len(array),
        "bytes": 4000,
        "documents": 3,
        "dtype": array.dtype.name,
        "vocab_size": 1000,
        "tokenizer_sha256": "ab" * 32,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sources": [],
        "separator": "<|endoftext|>",
        **changes,
    }
    kept = {key: value for key, value in metadata.items() if value is not None}
    path.with_suffix(".json").write_text(json.dumps(kept))
    return path


def test_dataset_is_mapped_and_knows_its_sidecar(tmp_path: Path) -> None:
    """The tokens are a read-only memory map, the facts are attributes, and a batch is cut from it."""
    tokens = TokenDataset(write_dataset(tmp_path))
    assert isinstance(tokens.tokens, np.memmap)
    assert not tokens.tokens.flags.writeable
    assert (len(tokens), tokens.num_documents, tokens.vocab_size) == (1000, 3, 1000)
    assert tokens.tokenizer_sha256 == "ab" * 32
    tokens.check()
    assert torch.equal(get_batch(tokens.tokens, **BATCH)[0], get_batch(TOKENS, **BATCH)[0])


def test_the_largest_id_is_found_in_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan goes block by block and finds a maximum in the last, smaller one."""
    monkeypatch.setattr(dataset, "_SCAN_ELEMENTS", 300)
    assert TokenDataset(write_dataset(tmp_path)).check() == 999
    assert TokenDataset(write_dataset(tmp_path, TOKENS[:0])).check() == -1


def test_a_check_notices_a_changed_byte(tmp_path: Path) -> None:
    """The sha256 reveals a token that was changed later."""
    path = write_dataset(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sha256 is .* in train.json, found .*run transformerlm-make-data again"):
        TokenDataset(path).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "expected format 1, found 2"),
        ({"tokens": 999}, "tokens is 999 in train.json, found 1000 in the file"),
        ({"dtype": "uint32"}, "dtype is uint32 in train.json, found uint16 in the file"),
        ({"vocab_size": "1000"}, "expected vocab_size of type int, found '1000'"),
        ({"sha256": None}, "expected sha256 of type str, found None"),
        ({"sidecar_sha256": "00" * 32}, "its values have changed since it was written"),
    ],
)
def test_sidecar_that_is_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The error names the key, what it should be, what it is, and the command that repairs it."""
    with pytest.raises(ValueError, match=f"{message}.*run transformerlm-make-data again"):
        TokenDataset(write_dataset(tmp_path, **changes))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS.reshape(10, 100), "found 2-D uint16"),
        (TOKENS.astype(np.int64), "found 1-D int64"),
        (TOKENS.astype(np.float32), "found 1-D float32"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, tokens: Any, message: str) -> None:
    """Only a 1-D array of uint16 or uint32 is a token file."""
    with pytest.raises(ValueError, match=message):
        TokenDataset(write_dataset(tmp_path, tokens))


def test_files_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    """A missing token file, a text, no sidecar, a sidecar without JSON, a cut file, a pickle: each gets one line."""
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(
        FileNotFoundError, match=r"corpus.txt: expected a token file .*transformerlm-make-data makes one"
    ):
        TokenDataset(tmp_path / "corpus.txt")
    with pytest.raises(FileNotFoundError, match="no such token file; run transformerlm-make-data"):
        TokenDataset(tmp_path / "absent.npy")
    path = write_dataset(tmp_path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"train.json:1: expected JSON, found .*run transformerlm-make-data again"):
        TokenDataset(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.json: missing beside train.npy"):
        TokenDataset(path)
    path = write_dataset(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"not a readable .npy file"):
        TokenDataset(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a readable .npy file"):
        TokenDataset(path)
