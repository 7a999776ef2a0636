"""Which files of a checkpoint hold which tensors: one file while they fit, else several and an index.

    model.safetensors
    model-00001-of-00003.safetensors  ...  model.safetensors.index.json

A tensor is always whole in one file. The plan follows from names and sizes alone, so that all ranks make the same, and
any number of them. Names and index are those of Hugging Face.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

MODEL, OPTIMIZER = "model", "optimizer"
"""The kinds of tensors in a checkpoint."""

_PART = re.compile(r"(?P<kind>[a-z]+)-(?P<number>\d{5,6})-of-(?P<total>\d{5,6})\.safetensors")


def single_name(kind: str) -> str:
    """Return the name of the only file of a kind of tensors."""
    return f"{kind}.safetensors"


def index_name(kind: str) -> str:
    """Return the name of the index of several files."""
    return f"{single_name(kind)}.index.json"


def part_names(kind: str, total: int) -> list[str]:
    """Return the names of `total` files; of one file, the name without a number."""
    if total == 1:
        return [single_name(kind)]
    return [f"{kind}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def kind_of(name: str) -> str | None:
    """Return which kind of tensors a file of a checkpoint holds or indexes; None: it is another file."""
    for kind in (MODEL, OPTIMIZER):
        part = _PART.fullmatch(name)
        if name in (single_name(kind), index_name(kind)) or (part is not None and part["kind"] == kind):
            return kind
    return None


def plan_files(kind: str, sizes: Mapping[str, int], *, max_bytes: int) -> dict[str, list[str]]:
    """Return the files, each with the names of its tensors: in order, as many as `max_bytes` hold, and at least one.

    `sizes` are the tensors' bytes by name, in the order of the model.
    """
    parts: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if parts[-1] and size > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(name)
        room -= size
    return dict(zip(part_names(kind, len(parts)), parts, strict=True))


def index_text(files: Mapping[str, Collection[str]], *, total_bytes: int) -> str:
    """Return the index of several files: where each tensor is."""
    places = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2) + "\n"


def parts_of_index(kind: str, weight_map: object) -> dict[str, list[str]]:
    """Return the files that the `weight_map` of an index names, each with the names of its tensors.

    Raises:
        ValueError: the files are not all of `part_names`, and only those.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"expected weight_map to be an object with a file for each tensor, found {_short(weight_map)}")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        found = _PART.fullmatch(file) if isinstance(file, str) else None
        if found is None or found["kind"] != kind:
            raise ValueError(
                f"expected weight_map to name files such as {part_names(kind, 2)[0]}, found {_short(file)}"
            )
        files.setdefault(file, []).append(name)
        total = int(found["total"])
    if len(files) != total or files.keys() != set(part_names(kind, total)):
        expected = f"all {total} files of which {file[:60]} is one"
        raise ValueError(f"expected weight_map to name {expected}, found {len(files)} files")
    return files


def missing_files(names: AbstractSet[str], *, may_be_several: bool) -> list[str]:
    """Return which files a checkpoint should list besides `names`."""
    missing = {"config.toml"} - names
    for kind in (MODEL, OPTIMIZER):
        if not (may_be_several and index_name(kind) in names):
            missing |= {single_name(kind)} - names
            continue
        parts = [found for found in map(_PART.fullmatch, names) if found and found["kind"] == kind]
        total = max((int(found["total"]) for found in parts), default=1)
        if len(parts) != total:
            missing.add(f"{total - len(parts)} of the {total} files of {index_name(kind)}")
    return sorted(missing)


def _short(value: object) -> str:
    return repr(str(value)[:80])
