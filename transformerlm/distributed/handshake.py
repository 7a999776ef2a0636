"""Whether all ranks are about to train the same run, asked before anything is loaded or written.

Ranks that differ would not fail: each would load what it finds, their gradients would be averaged, and a checkpoint of
the mixture would be published.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from transformerlm.distributed.rendezvous import in_words
from transformerlm.distributed.world import World, gather_text, is_main, together

LATE_SECONDS = 20.0
"""How long a file that another machine has just written may stay invisible on a shared file system."""
_MARK = ".same-directory"
_BLOCK = 4096
_MOST_BLOCKS = 32
_MOST_FILES = 16
_MOST_SHOWN = 4


def difference(facts: Mapping[str, str], world: World) -> str | None:
    """Return a line that says where the ranks' facts differ from rank 0's, the same on all ranks; None: nowhere.

    It names each fact with its values, and the ranks and machines that have them.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(gather_text(digest, world))) == 1:
        return None
    all_facts = [json.loads(text) for text in gather_text(json.dumps(facts), world)]
    first = all_facts[0]
    names = list(dict.fromkeys(name for theirs in all_facts for name in theirs))
    found = []
    for name in names:
        others: dict[str, list[int]] = {}
        for rank, theirs in enumerate(all_facts):
            if theirs.get(name) != first.get(name):
                others.setdefault(theirs.get(name, "not there"), []).append(rank)
        found += [_in_words(name, first.get(name, "not there"), value, ranks, world) for value, ranks in others.items()]
    more = f"; and {len(found) - _MOST_SHOWN} more differences" if len(found) > _MOST_SHOWN else ""
    return f"the ranks would not train the same run: {'; '.join(found[:_MOST_SHOWN])}{more}"


def _in_words(name: str, expected: str, value: str, ranks: list[int], world: World) -> str:
    hosts = list(dict.fromkeys(world.hosts[rank] for rank in ranks))
    where = ", ".join(hosts[:3]) + (", ..." if len(hosts) > 3 else "")
    here = f"rank 0 on {world.hosts[0]}"
    return f"{name} is {expected} on {here}, but {value} on {in_words(ranks, world.world_size)} on {where}"


def shared_directory(directory: Path, world: World, *, look: Callable[[], str]) -> str | None:
    """Return a line that says which ranks do not see rank 0's directory, or see something else in it; None: all do.

    Rank 0 leaves a file there for a moment, so the directory must exist on rank 0; nothing else is written. What is to
    be the same in it, `look` returns in words. A shared file system may show a change late: the others look again for
    some seconds before they say that they see something else.

    Raises:
        ValueError, OSError: a rank cannot read it, or rank 0 cannot write it.
    """
    mark = directory / _MARK
    try:
        with together(world):
            nonce = uuid.uuid4().hex if is_main(world) else ""
            if is_main(world):
                mark.write_text(nonce, encoding="utf-8")
            expected = look() if is_main(world) else ""
        said = json.loads(gather_text(json.dumps([nonce, expected, str(directory)]), world)[0])
        with together(world):
            sees, found = _wait_to_see(mark, look, said) if not is_main(world) else (True, expected)
        place = said[2] if sees else f"{directory}, without the file that rank 0 wrote,"
        return difference({"the run's directory": place, "its newest checkpoint": found}, world)
    finally:
        if is_main(world):
            with suppress(OSError):
                mark.unlink()


def _wait_to_see(mark: Path, look: Callable[[], str], said: Sequence[str]) -> tuple[bool, str]:
    """Return whether the mark is here, and what `look` finds, as soon as both are as rank 0 said, or after a while."""
    end = time.monotonic() + LATE_SECONDS
    while True:
        with suppress(OSError):
            os.listdir(mark.parent)  # makes NFS ask its server
        try:
            sees = mark.read_text(encoding="utf-8") == said[0]
        except FileNotFoundError:
            sees = False
        found = look()
        if (sees and found == said[1]) or time.monotonic() > end:
            return sees, found
        time.sleep(0.2)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what a step computes."""
    found = {"the version of torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):  # it may run from its sources
        found["the version of transformerlm"] = version("transformerlm")
    return found


def sampled(files: Sequence[Path]) -> dict[str, str]:
    """Return the size of files and a sha256 over a few blocks of a few of them, which tells copies apart.

    It reads 32 blocks of 4 kB, or two a file, whatever the size: enough to notice another file, one that was cut, or a
    damaged end; not every flipped bit.
    """
    chosen = [files[index] for index in _spread(len(files), _MOST_FILES)]
    digest, size = hashlib.sha256(), 0
    for path in chosen:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            size += length
            digest.update(length.to_bytes(8, "little"))
            last = max(0, length - _BLOCK)
            for share in _spread(_MOST_BLOCKS + 1, max(2, _MOST_BLOCKS // len(chosen))):
                file.seek(last * share // _MOST_BLOCKS)
                digest.update(file.read(_BLOCK))
    return {"files": str(len(files)), "bytes": f"{size:,}", "sampled sha256": digest.hexdigest()[:16]}


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [index * (count - 1) // (most - 1) for index in range(most)]
