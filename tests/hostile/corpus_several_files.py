"""Checkpoints of several files that lie."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.hostile.corpus import DEEP, Good, case, copy_checkpoint, infer, resume, sign
from transformerlm.checkpoints.layout import index_name, part_names

INDEX = index_name("model")
PARTS = part_names("model", 2)


def split(directory: Path, kind: str = "model") -> None:
    """Turn a file of a checkpoint into two and an index, as the product would write them."""
    tensors = load_file(directory / f"{kind}.safetensors")
    (directory / f"{kind}.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate(part_names(kind, 2)):
        half = names[number * len(names) // 2 : (number + 1) * len(names) // 2]
        save_file({name: tensors[name] for name in half}, directory / part)
        weight_map |= dict.fromkeys(half, part)
    (directory / index_name(kind)).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def several_case(name: str, blames: str) -> Callable[[Callable[[Path], object]], None]:
    """Put a checkpoint of two files that a function has changed into the corpus, signed."""

    def register(change: Callable[[Path], object]) -> None:
        def build(home: Path, good: Good) -> list[str]:
            directory = copy_checkpoint(home, good)
            split(directory)
            change(directory)
            sign(directory, {"format": 2})
            return infer(directory)

        case(name, "infer", blames)(build)

    return register


def change_index(directory: Path, changes: dict[str, Any]) -> None:
    """Change what an index says about tensors."""
    index = json.loads((directory / INDEX).read_text())
    (directory / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], **changes}}))


for place in (
    "../../../../etc/passwd",
    "/etc/passwd",
    "x" * 100_000,
    "optimizer-00001-of-00002.safetensors",
    ["x"],
    None,
):

    @several_case(f"an index that names {str(place)[:30]}", INDEX)
    def _(directory: Path, place: Any = place) -> None:
        change_index(directory, {"lm_head.weight": place})


@several_case("an index of a million files", INDEX)
def _(directory: Path) -> None:
    change_index(directory, {"lm_head.weight": "model-00001-of-999999.safetensors"})


@several_case("an index with a tensor that no file has", PARTS[0])
def _(directory: Path) -> None:
    change_index(directory, {"more": PARTS[0]})


@several_case("an index that puts a tensor into the other file", INDEX)
def _(directory: Path) -> None:
    change_index(directory, {min(load_file(directory / PARTS[0])): PARTS[1]})


@several_case("a tensor in two files", PARTS[1])
def _(directory: Path) -> None:
    first, second = (load_file(directory / part) for part in PARTS)
    name = min(first)
    save_file({**second, name: first[name]}, directory / PARTS[1])


@several_case("a tensor in no file", "step-00000001")
def _(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    tensors = load_file(directory / PARTS[0])
    name = min(tensors)
    del index["weight_map"][name], tensors[name]
    save_file(tensors, directory / PARTS[0])
    (directory / INDEX).write_text(json.dumps(index))


@several_case("an index nested a million levels deep", INDEX)
def _(directory: Path) -> None:
    (directory / INDEX).write_text(DEEP)


@several_case("an index that is a list", INDEX)
def _(directory: Path) -> None:
    (directory / INDEX).write_text("[1]")


@several_case("an index without a weight_map", INDEX)
def _(directory: Path) -> None:
    (directory / INDEX).write_text("{}")


@several_case("a file beside an index", "model.safetensors")
def _(directory: Path) -> None:
    save_file(load_file(directory / PARTS[0]), directory / "model.safetensors")


@several_case("a missing part", INDEX)
def _(directory: Path) -> None:
    (directory / PARTS[1]).unlink()


@several_case("a part that is a link out of the checkpoint", PARTS[1])
def _(directory: Path) -> None:
    (directory / PARTS[1]).rename(directory.parents[1] / "elsewhere")
    (directory / PARTS[1]).symlink_to(directory.parents[1] / "elsewhere")


@several_case("not a number in the second file", "lm_head.weight")
def _(directory: Path) -> None:
    part = next(part for part in PARTS if "lm_head.weight" in load_file(directory / part))
    tensors = load_file(directory / part)
    tensors["lm_head.weight"][0, 0] = math.nan
    save_file(tensors, directory / part)


@case("a flipped bit in the second file", "infer", PARTS[1])
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    split(directory)
    sign(directory, {"format": 2})
    content = bytearray((directory / PARTS[1]).read_bytes())
    content[-1] ^= 1
    (directory / PARTS[1]).write_bytes(content)
    return infer(directory)


@case("several files in the first format", "infer", "model.safetensors")
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    split(directory)
    sign(directory)
    return infer(directory)


@case("an optimizer's index that names the weights", "train", index_name("optimizer"))
def _(home: Path, good: Good) -> list[str]:
    directory = copy_checkpoint(home, good)
    split(directory, "optimizer")
    path = directory / index_name("optimizer")
    path.write_text(path.read_text().replace("optimizer-", "model-"))
    sign(directory, {"format": 2})
    return resume(home, good)
