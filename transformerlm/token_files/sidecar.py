"""The sidecar of a token file: the JSON beside the `.npy` that says what its ids are, and that the file is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformerlm.utils.files import whole_files, write_whole
from transformerlm.utils.json_files import read_json_object, values_sha256

FORMAT = 1
"""The version of a token file, which its sidecar names."""
OFFSETS_SUFFIX = ".documents.npy"
_OWN_SHA256 = "sidecar_sha256"
MAX_BYTES = 1 << 28
"""Of a sidecar or an index: some 800,000 shards. What would be larger is not written, as nobody could read it."""
FACTS: dict[str, type] = {
    "tokens": int,
    "bytes": int,
    "documents": int,
    "dtype": str,
    "vocab_size": int,
    "tokenizer_sha256": str,
    "sha256": str,
}
"""The facts that every sidecar and index holds, with their types."""


def sidecar_path(path: Path) -> Path:
    """Return the path of a token file's sidecar: `train.json` beside `train.npy`."""
    return path.with_suffix(".json")


def offsets_path(path: Path) -> Path:
    """Return the path of the file that says where documents begin: `train.documents.npy` beside `train.npy`."""
    return path.with_suffix(OFFSETS_SUFFIX)


@contextmanager
def new_sidecars(sidecars: Mapping[Path, Mapping[str, Any]]) -> Iterator[None]:
    """Write the sidecars of token files beside their places; they take these when the block, which moves ids, ends.

    So a disk that fills up is met before an old file is touched.

    Args:
        sidecars: the facts of each token file by its path; a sidecar holds the format, the facts, and the sha256 of
            these values.

    Raises:
        ValueError: one would be larger than `MAX_BYTES`.
        OSError: one cannot be written; the error names it.
    """
    contents = {sidecar_path(path): {"format": FORMAT, **facts} for path, facts in sidecars.items()}
    with whole_files({path: _as_json(path, facts) for path, facts in contents.items()}):
        yield


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the facts in the sidecar of the token file at `path`.

    Raises:
        FileNotFoundError: the token file or its sidecar is missing.
        ValueError: another format, a fact that is missing or of another type, or values that were changed.
    """
    sidecar = sidecar_path(path)
    _check_both_there(path, sidecar)
    return read_facts(sidecar, form=FORMAT)


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts and the sha256 of their values to a JSON file, which appears whole or not at all.

    Raises:
        ValueError: it would be larger than `MAX_BYTES`.
    """
    write_whole(path, _as_json(path, facts))


def _as_json(path: Path, facts: Mapping[str, Any]) -> bytes:
    own = {_OWN_SHA256: values_sha256(facts, kept_in=_OWN_SHA256)}
    data = (json.dumps({**facts, **own}, ensure_ascii=False, indent=2) + "\n").encode()
    if len(data) > MAX_BYTES:
        advice = "give fewer and larger input files, a larger cluster.part_mb or smaller weights"
        raise ValueError(f"{path}: expected at most {MAX_BYTES:,} bytes to write, found {len(data):,}; {advice}")
    return data


def read_facts(path: Path, *, form: int) -> dict[str, Any]:
    """Return the facts in the JSON file at `path`, which is of the format `form`.

    Raises:
        ValueError: another format, a fact that is missing or of another type, or values that were changed.
    """
    try:
        facts = read_json_object(path, max_bytes=MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"{error}; run transformerlm-make-data again") from None
    if facts.get("format") != form:
        raise ValueError(
            f"{path}: expected format {form}, found {facts.get('format')!r}; run transformerlm-make-data again"
        )
    check_types(facts, FACTS, where=str(path))
    promised = facts.get(_OWN_SHA256)  # the first sidecars had none
    if promised is not None and promised != (found := values_sha256(facts, kept_in=_OWN_SHA256)):
        raise ValueError(
            f"{path}: its values have changed since it was written (their sha256 is {found}, sidecar_sha256 "
            f"{promised}); run transformerlm-make-data again"
        )
    return facts


def check_types(facts: Mapping[str, Any], types: Mapping[str, type], *, where: str) -> None:
    """Refuse facts of which one is missing, of another type, or a number below 0; `where` begins the error.

    Raises:
        ValueError: one is.
    """
    for key, kind in types.items():
        if type(facts.get(key)) is not kind:
            expected = f"expected {key} of type {kind.__name__}, found {repr(facts.get(key))[:80]}"
            raise ValueError(f"{where}: {expected}; run transformerlm-make-data again")
        if isinstance(facts[key], int) and facts[key] < 0:
            raise ValueError(f"{where}: expected {key} >= 0, found {facts[key]}; make the file again")


def _check_both_there(path: Path, sidecar: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such token file; run transformerlm-make-data to write it")
    if not sidecar.is_file() and path.suffix != ".npy":
        raise FileNotFoundError(
            f"{path}: expected a token file (.npy, with a .json beside it), found neither; transformerlm-make-data "
            "makes one from text"
        )
    if not sidecar.is_file():
        raise FileNotFoundError(f"{sidecar}: missing beside {path.name}; run transformerlm-make-data to write both")
