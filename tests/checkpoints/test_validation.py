"""What a safetensors header and a state may say: what we write passes, what contradicts the file does not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.helpers import make_snapshot
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.validation import (
    CheckpointError,
    TensorFacts,
    check_weights,
    fingerprint,
    read_header,
    verify,
)
from transformerlm.utils.files import file_sha256
from transformerlm.utils.json_files import values_sha256

SHAPES = {"a": (2, 3), "b": (), "c": (0, 4)}


def write(path: Path) -> None:
    """Write a file as the library does."""
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, path, metadata={"more": "facts"})


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    """Names, dtypes and shapes are those that were saved, also of a tensor with one number or with none."""
    write(tmp_path / "w.safetensors")
    found = read_header(tmp_path / "w.safetensors")
    assert found == {name: TensorFacts("F32", shape) for name, shape in SHAPES.items()}
    check_weights(tmp_path, found, SHAPES)


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
    """The error for a lie about a tensor names the tensor."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(ValueError, match=f"a: {message}"):
        read_header(tmp_path / "w.safetensors")


HOSTILE = {
    "list": "[]",
    "number": "7",
    "deep": "[" * 100_000,
    "not-utf8": b"\xff\xfe\x00",
    "empty": "",
    "no-step": '{"format": 1, "sha256": {}}',
    "text-step": '{"format": 1, "step": "2", "sha256": {}}',
    "true-step": '{"format": 1, "step": true, "sha256": {}}',
    "list-sha": '{"format": 1, "step": 2, "sha256": []}',
    "no-files": '{"format": 1, "step": 2, "sha256": {}}',
    "escape": '{"format": 1, "step": 2, "sha256": {"../../state.json": "00"}}',
    "huge-number": '{"format": 1, "step": ' + "9" * 5000 + ', "sha256": {}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_state_is_a_checkpoint_error(name, files, tmp_path):
    """Whatever is in `state.json`, reading it raises only CheckpointError, in one line."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    text = HOSTILE[name]
    if isinstance(text, str) and text.startswith("{") and name != "huge-number":  # by somebody who knows the format
        state = json.loads(text)
        text = json.dumps({**state, "state_sha256": values_sha256(state, kept_in="state_sha256")})
    (directory / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        verify(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["tokens", "step", "optimizer", "sha256"])
def test_a_changed_value_in_the_state_is_found(key, files, tmp_path):
    """`state.json` has a checksum of its own: a value that was edited or damaged is noticed."""
    directory = save_checkpoint(tmp_path, 2, make_snapshot(files))
    state = json.loads((directory / "state.json").read_text())
    state[key] = state[key] + 1 if isinstance(state[key], int) else {**state[key], "more": "00"}
    (directory / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json|more"):
        verify(directory)


def test_a_fingerprint_is_the_step_and_the_beginning_of_the_sum_of_the_weights(files, tmp_path):
    """It is the file's own sha256; of several files, it changes with each of them, and with nothing else."""
    state = verify(save_checkpoint(tmp_path, 2, make_snapshot(files)))
    sums = state["sha256"]
    assert fingerprint(state) == f"2-{file_sha256(tmp_path / 'step-00000002' / 'model.safetensors')[:8]}"
    assert fingerprint({"step": 2, "sha256": {**sums, "optimizer.safetensors": "00"}}) == fingerprint(state)
    several = verify(save_checkpoint(tmp_path, 3, make_snapshot(files), max_file_bytes=60_000))
    parts = [name for name in several["sha256"] if name.startswith("model-")]
    found = {fingerprint({**several, "sha256": {**several["sha256"], name: "00"}}) for name in parts}
    assert len(found | {fingerprint(several)}) == len(parts) + 1 > 2
