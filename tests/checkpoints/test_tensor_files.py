"""Files of tensors: what the library would write, and what an index may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from transformerlm.checkpoints.layout import index_text, plan_files
from transformerlm.checkpoints.tensor_files import TensorFileWriter, read_rows, stored_tensors
from transformerlm.checkpoints.validation import CheckpointError

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file, each tensor in two parts."""
    writer = TensorFileWriter(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    for name in writer.names:
        data = tensors[name].reshape(-1).view(torch.uint8)
        writer.write(data[:3])
        writer.write(data[3:])
    writer.finish()


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_the_file_is_what_the_library_writes(number, tmp_path):
    """Every dtype, any order of names, tensors of one number and of none: the same bytes as `save_file`."""
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for index in torch.randperm(len(DTYPES), generator=generator).tolist()[: 4 * number]:
        for shape in ((), (0, 3), (5,), (2, index + 1)):
            name = f"{'zyx'[len(shape)]}.{index}.{'é' * number}"
            tensors[name] = torch.randint(0, 2, shape, generator=generator).to(DTYPES[index])
    save_file(tensors, tmp_path / "theirs")
    write(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_dtype_without_a_name_is_refused(tmp_path):
    """Complex numbers have no place in such a file, and nothing is written."""
    with pytest.raises(
        ValueError, match=r"w: expected a dtype that a safetensors file can hold, found torch.complex64"
    ):
        TensorFileWriter(tmp_path / "w", {"w": (torch.complex64, (2,))})
    assert not list(tmp_path.iterdir())


def test_an_error_waits_until_the_file_is_finished(tmp_path):
    """Where the file cannot be opened, `write` returns, and `finish` raises the error."""
    path = tmp_path / "none" / "w"
    writer = TensorFileWriter(path, {"w": (torch.uint8, (2**20,))})
    writer.write(torch.zeros(2**20, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError) as caught:
        writer.finish()
    assert caught.value.filename == str(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_the_error_of_a_full_disk_names_the_file():
    """The first error is the one that is raised, although closing the file fails, too."""
    writer = TensorFileWriter(Path("/dev/full"), {"w": (torch.uint8, (2**20,))})
    writer.write(torch.zeros(2**20, dtype=torch.uint8))
    with pytest.raises(OSError, match="No space left") as caught:
        writer.finish()
    assert caught.value.filename == "/dev/full"


def test_files_hold_whole_tensors_in_order():
    """A file takes what fits, and a tensor larger than the limit has a file of its own."""
    sizes = {"a": 4, "b": 4, "c": 3, "d": 20, "e": 1, "f": 9}
    first, second, third, fourth = (f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4))
    plan = plan_files("model", sizes, max_bytes=10)
    assert plan == {first: ["a", "b"], second: ["c"], third: ["d"], fourth: ["e", "f"]}
    assert plan_files("model", sizes, max_bytes=41) == {"model.safetensors": list(sizes)}
    assert plan_files("optimizer", {}, max_bytes=1) == {"optimizer.safetensors": []}


# --- several files and their index -----------------------------------------------------------------------------------


PARTS = {f"model-0000{number}-of-00003.safetensors": [f"{number}.a", f"{number}.b"] for number in (1, 2, 3)}


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Write three files of two tensors, and their index."""
    for number, (file, names) in enumerate(PARTS.items()):
        write(tmp_path / file, {name: torch.full((4, 2), float(number)) for name in names})
    (tmp_path / "model.safetensors.index.json").write_text(index_text(PARTS, total_bytes=192))
    return tmp_path


def test_rows_are_read_from_several_files(several):
    """Each tensor comes from its file, whole or some rows of it."""
    stored = stored_tensors(several, "model")
    assert list(stored) == [name for names in PARTS.values() for name in names]
    found = {name: values.clone() for name, values in read_rows(stored, {"3.a": range(1, 3), "1.b": None})}
    assert found.keys() == {"3.a", "1.b"}
    assert torch.equal(found["3.a"], torch.full((2, 2), 2.0))
    assert torch.equal(found["1.b"], torch.zeros(4, 2))


def test_a_file_that_was_cut_after_its_header_was_read_is_named(several):
    """A file that shrinks meanwhile is an error that names it."""
    stored = stored_tensors(several, "model")
    path = several / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: not a whole safetensors file"):
        list(read_rows(stored, {"2.a": None}))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to say what is mapped")
def test_what_is_read_is_not_mapped(several):
    """A file that is cut while its tensors are in use cannot end the process: they are in its own memory."""
    stored = stored_tensors(several, "model")
    path = several / "model-00001-of-00003.safetensors"
    name, values = next(read_rows(stored, {"1.a": None}))
    assert str(path.resolve()) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    assert (name, values.tolist()) == ("1.a", [[0.0, 0.0]] * 4)


FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.a": "../model-00001-of-00003.safetensors"}, r"expected weight_map to name files such as model-00001"),
        ({"1.a": "/etc/passwd"}, "expected weight_map to name files such as model-00001"),
        ({"1.a": "optimizer-00001-of-00003.safetensors"}, "expected weight_map to name files such as model-00001"),
        ({"1.a": "model.safetensors"}, "expected weight_map to name files such as model-00001"),
        ({"1.a": ["x"]}, "expected weight_map to name files such as model-00001"),
        ({"1.a": "model-00004-of-00003.safetensors"}, "expected weight_map to name all 3 files"),
        ({"1.a": "model-00001-of-00004.safetensors"}, "expected weight_map to name all 3 files"),
        ({"4.a": FIRST}, "found others; they differ in 4.a"),
        ({"2.a": FIRST}, "found others; they differ in 2.a"),
        ({"1.a": None}, "expected weight_map to name files such as model-00001"),
    ],
)
def test_an_index_that_lies_is_refused(change, message, several):
    """An index names the files beside it, all of them, and for each tensor the file that holds it."""
    index = several / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**known["weight_map"], **change}}))
    with pytest.raises(ValueError, match=message):
        stored_tensors(several, "model")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_an_index_without_files_is_refused(weight_map, several):
    """`weight_map` must be an object that is not empty."""
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json: expected weight_map to be an object with a file for each"):
        stored_tensors(several, "model")


def test_a_tensor_in_two_files_is_refused(several):
    """What the index does not say about a file is an error, even if the file itself is in order."""
    write(several / FIRST, {name: torch.zeros(4, 2) for name in ("1.a", "1.b", "2.a")})
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors: expected the tensors .* they differ in 2\.a"):
        stored_tensors(several, "model")


def test_a_single_file_beside_an_index_is_refused(several):
    """Nobody could know which of the two counts."""
    write(several / "model.safetensors", {"1.a": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match=r"expected an index or model\.safetensors, found both"):
        stored_tensors(several, "model")


def test_a_missing_file_is_named(several):
    """The error says which of the files is not there."""
    (several / FIRST).unlink()
    with pytest.raises(FileNotFoundError, match=FIRST):
        stored_tensors(several, "model")
