"""What a safetensors header may say: what the library writes passes, what the file does not bear out does not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transformerlm.checkpoints.validation import TensorFacts, check_weights, read_header

SHAPES = {"a": (2, 3), "b": (), "c": (0, 4)}


def write(path: Path) -> None:
    """Write a file as the library does."""
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, path, metadata={"more": "facts"})


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    """Names, dtypes and shapes are those that were saved, those of one number and of none too."""
    write(tmp_path / "w.safetensors")
    assert read_header(tmp_path / "w.safetensors") == {
        name: TensorFacts("F32", shape) for name, shape in SHAPES.items()
    }
    check_weights(tmp_path / "w.safetensors", SHAPES)


@pytest.mark.parametrize("cut", [0, 7, 8, 20, -1])
def test_a_file_cut_anywhere_is_refused(cut: int, tmp_path: Path) -> None:
    """The header's length and the tensors' offsets must be within the file."""
    path = tmp_path / "w.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"w\.safetensors: "):
        read_header(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [3, 3]}, "expected offsets that hold the shape"),
        ({"data_offsets": [4, 28]}, "expected its data at offset"),
        ({"shape": [True, 6]}, "expected whole numbers >= 0"),
        ({"dtype": "F8"}, "expected a dtype such as F32, found 'F8'"),
        ({"more": 1}, "expected dtype, shape and data_offsets"),
    ],
)
def test_an_entry_that_lies_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    """Each lie about one tensor is named with the tensor."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(ValueError, match=f"a: {message}"):
        read_header(tmp_path / "w.safetensors")
