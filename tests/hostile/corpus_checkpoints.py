"""Checkpoints that lie."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.corpus import (
    DEEP,
    Good,
    Payload,
    case,
    copy_checkpoint,
    evaluate,
    infer,
    read_safetensors,
    resume,
    sign,
    write_safetensors,
    write_state,
)
from transformerlm.checkpoints.document_ids import DocumentIds

Header = dict[str, Any]
Change = Callable[[Header], Header | bytes | None]
WEIGHTS = "model.safetensors"
FIRST, SECOND = "layers.0.ln1.weight", "layers.0.ln2.weight"  # of one shape


def weights_case(name: str, **parts: Any) -> Callable[[Change], Change]:
    """Put a weights file whose header a function has changed into the corpus, signed."""

    def register(change: Change) -> Change:
        def build(home: Path, good: Good) -> list[str]:
            directory = copy_checkpoint(home, good)
            header, data = read_safetensors(directory / WEIGHTS)
            changed = change(header)
            write_safetensors(directory / WEIGHTS, header if changed is None else changed, data, **parts)
            sign(directory)
            return infer(directory)

        case(name, "infer", "step-00000001")(build)
        return change

    return register


@weights_case("a header of 2^63 bytes", length=2**63)
@weights_case("a header longer than the file", length=10**9)
@weights_case("a header that ends early", length=40)
def _(header: Header) -> None: ...


@weights_case("a header that is no JSON")
def _(header: Header) -> bytes:
    return b"\x80\x04not json"


@weights_case("a header nested a million levels deep")
def _(header: Header) -> bytes:
    return DEEP.encode()


@weights_case("a header with one tensor twice")
def _(header: Header) -> bytes:
    return json.dumps(header).replace(SECOND, FIRST).encode()


@weights_case("tensors that overlap")
def _(header: Header) -> None:
    header[SECOND]["data_offsets"] = header[FIRST]["data_offsets"]


@weights_case("negative offsets")
def _(header: Header) -> None:
    header[FIRST]["data_offsets"] = [-128, 0]


@weights_case("offsets beyond the file")
def _(header: Header) -> None:
    header[FIRST]["data_offsets"] = [2**40, 2**40 + 128]


@weights_case("offsets of 2^64")
def _(header: Header) -> None:
    header[FIRST]["data_offsets"] = [2**64, 2**64 + 128]


@weights_case("offsets as text")
def _(header: Header) -> None:
    header[FIRST]["data_offsets"] = "0:128"


@weights_case("a shape of 2^80 numbers")
def _(header: Header) -> None:
    header[FIRST]["shape"] = [2**40, 2**40]


@weights_case("a shape whose size overflows to the right one")
def _(header: Header) -> None:
    header[FIRST]["shape"] = [2**32, 2**32, 32]


@weights_case("half-precision weights of the right size")
def _(header: Header) -> None:
    header[FIRST] |= {"dtype": "F16", "shape": [64]}


@weights_case("a dtype that nobody knows")
def _(header: Header) -> None:
    header[FIRST]["dtype"] = "PICKLE"


@weights_case("a tensor under another name")
def _(header: Header) -> None:
    header["__class__"] = header.pop(FIRST)


@weights_case("a shape of as many numbers")
def _(header: Header) -> None:
    header[FIRST]["shape"] = [16, 2]


@case("a tensor too many", "infer", "step-00000001")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    header, data = read_safetensors(directory / WEIGHTS)
    header["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    write_safetensors(directory / WEIGHTS, header, data + b"\0\0\0\0")
    sign(directory)
    return infer(directory)


@case("weights that are not numbers", "infer", FIRST)
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    header, data = read_safetensors(directory / WEIGHTS)
    begin = header[FIRST]["data_offsets"][0]
    write_safetensors(directory / WEIGHTS, header, data[:begin] + struct.pack("<f", math.nan) + data[begin + 4 :])
    sign(directory)
    return infer(directory)


@case("a flipped bit", "infer", WEIGHTS)
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    return infer(directory)


@case("a pickle in the place of the weights", "infer", WEIGHTS)
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    (directory / WEIGHTS).write_bytes(pickle.dumps(Payload(home / "code-has-run")))
    sign(directory)
    return infer(directory)


@case("a .pt file", "infer", "model.pt")
def _(home: Path, good: Good) -> list[str]:
    (home / "model.pt").write_bytes(pickle.dumps(Payload(home / "code-has-run")))
    return infer(home / "model.pt")


# --- paths ---------------------------------------------------------------------------------------------------------


def manifest_case(name: str, path: str) -> None:
    """Put a checkpoint whose list of files names one outside of it into the corpus."""

    @case(name, "infer", "step-00000001")
    def _(home: Path, good: Good) -> list[str]:
        directory = copy_checkpoint(home, good)
        (home / "secret").write_text("secret")
        state = json.loads((directory / "state.json").read_text())
        state["sha256"][path.format(home=home)] = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
        write_state(directory, state)
        return infer(directory)


manifest_case("a list of files with ..", "../../../secret")
manifest_case("a list of files with an absolute path", "{home}/secret")


@case("weights that are a link out of the checkpoint", "infer", "step-00000001")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(good.checkpoint / WEIGHTS)
    return infer(directory)


@case("a tokenizer that is a link out of the checkpoint", "infer", "step-00000001")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    (directory / "tokenizer").rename(home / "outside")
    (directory / "tokenizer").symlink_to("../../../outside")
    return infer(directory)


@case("a checkpoint that is a link out of the run", "infer", "none of its 1 checkpoints is whole")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    directory.rename(home / "outside")
    directory.symlink_to(home / "outside")
    return infer(home / "run")


@case("a `latest` that names a directory elsewhere", "infer", "latest")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    directory.rename(home / "outside")
    (directory.parent / "latest").write_text("..")
    return infer(directory.parent / "latest")


@case("a `latest` that links elsewhere", "infer", "latest")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    (directory.parent / "latest").symlink_to(good.checkpoint)
    return infer(directory.parent / "latest")


# --- state.json and config.toml ------------------------------------------------------------------------------------


def state_case(name: str, change: Callable[[str], str]) -> None:
    """Put a checkpoint whose `state.json` a function has changed as text into the corpus."""

    @case(name, "infer", "state.json")
    def _(home: Path, good: Good) -> list[str]:
        path = copy_checkpoint(home, good) / "state.json"
        path.write_text(change(path.read_text()))
        return infer(path.parent)


state_case("a state nested a million levels deep", lambda text: f'{{"format": 1, "step": {DEEP}')
state_case("a state nested a hundred levels deep", lambda text: f'{{"format": 1, "x": {"[" * 100}{"]" * 100}}}')
state_case("a state with one key twice", lambda text: text.replace("{", '{"step": 9,', 1))
state_case("a state with NaN", lambda text: text.replace("5.0", "NaN"))
state_case("a state with an infinite number", lambda text: text.replace("5.0", "1e999"))
state_case("a state with a number of 5,000 digits", lambda text: text.replace('"step": 1', f'"step": {"9" * 5000}'))
state_case("a state that ends early", lambda text: text[: len(text) // 2])
state_case("a state with a value changed", lambda text: text.replace('"tokens": 128', '"tokens": 129'))


@case("a state of 65 MB", "infer", "state.json")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    with (directory / "state.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    return infer(directory)


def value_case(name: str, **changes: Any) -> None:
    """Put a checkpoint whose `state.json` has other values into the corpus, signed."""

    @case(name, "infer", "state.json")
    def _(home: Path, good: Good) -> list[str]:
        directory = copy_checkpoint(home, good)
        sign(directory, changes)
        return infer(directory)


value_case("a step that is text", step="1")
value_case("a best loss of no step", best_val_loss=1.0, best_step=None)
value_case("a model that was imported from a number", imported_from=7)


for where, lie in (
    ("begin", {"bos_token_id": 290}),
    ("end", {"eos_token_ids": [2**62]}),
    ("pad", {"pad_token_id": 290}),
):

    @case(f"documents that {where} at an id that is not there", "eval", "document_ids")
    def _(home: Path, good: Good, lie: dict[str, Any] = lie) -> list[str]:
        directory = copy_checkpoint(home, good)
        sign(directory, {"document_ids": {**DocumentIds(289, (289,)).to_state(), **lie}})
        return evaluate(directory, good)


def config_case(name: str, old: str, new: str, blames: str) -> None:
    """Put a checkpoint whose `config.toml` says something else into the corpus, signed."""

    @case(name, "infer", blames)
    def _(home: Path, good: Good) -> list[str]:
        directory = copy_checkpoint(home, good)
        text = (directory / "config.toml").read_text()
        assert old in text
        (directory / "config.toml").write_text(text.replace(old, new, 1))
        sign(directory)
        return infer(directory)


config_case("a model of 10^15 numbers", "d_model = 32", "d_model = 1048576", "step-00000001")
config_case("a model of 4,096 layers", "num_layers = 2", "num_layers = 4096", "step-00000001")
config_case("a table of angles of 1 GB", "context_length = 16", "context_length = 16777216", "table of angles")
config_case("a key that names code", "[model]", '[model]\nclass = "os.system"', "class")


# --- resuming ------------------------------------------------------------------------------------------------------


def resume_case(name: str, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put a checkpoint whose state a function has changed into the corpus, signed, for a run to resume."""

    @case(name, "train", "step-00000001")
    def _(home: Path, good: Good) -> list[str]:
        directory = copy_checkpoint(home, good)
        sign(directory, changes(json.loads((directory / "state.json").read_text())))
        return resume(home, good)


resume_case("an optimizer without state", lambda state: {"optimizer": {"param_groups": []}})
resume_case("an optimizer with a tensor that is not there", lambda state: {"optimizer": _rename(state["optimizer"])})
resume_case(
    "an optimizer with a parameter too many",
    lambda state: {
        "optimizer": {**state["optimizer"], "state": {**state["optimizer"]["state"], "99": {"step": 1}}},
    },
)
resume_case("a guard that is a number", lambda state: {"guard": 7})
resume_case("a guard that remembers text", lambda state: {"guard": {"data_offset": "1"}})
resume_case("a guard that remembers what no guard does", lambda state: {"guard": {"__class__": 1}})
resume_case("a machine that is a number", lambda state: {"computed_with": 7})
resume_case("random numbers from beyond numpy's memory", lambda state: {"rng": _numpy(state["rng"], 2, 10**7)})
resume_case("random numbers from numbers below 0", lambda state: {"rng": _numpy(state["rng"], 1, [-1] * 624)})
resume_case("data of another run", lambda state: {"data": {**state["data"], "train_sha256": "0" * 64}})
resume_case("an optimizer whose tensors have another shape", lambda state: {"optimizer": _swap(state["optimizer"])})


def _rename(optimizer: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(optimizer["state"].values()))
    key = next(key for key, value in first.items() if isinstance(value, dict))
    first[key] = {"__tensor__": "../../secret"}
    return optimizer


def _numpy(rng: dict[str, Any], place: int, value: Any) -> dict[str, Any]:
    rng["numpy"][place] = value
    return rng


def _swap(optimizer: dict[str, Any]) -> dict[str, Any]:
    states = optimizer["state"]
    names = list(states)
    states[names[0]], states[names[-1]] = states[names[-1]], states[names[0]]
    return optimizer
