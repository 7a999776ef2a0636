"""Conversations of a user and an assistant, from templates: what a small model can learn to answer, and a test of it.

Each has one kind of question (`databuilder/questions.py`). A third begins with a system message that asks for short
answers, a third with one that asks for sentences; some go on with another question. The same seed gives the same
conversations on any machine. What the test asks is nowhere in the training set, in any words:

    python -m databuilder.conversations data/chat --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from databuilder.questions import Draw, Kind, Turn, all_kinds, follow_ups, one_of
from transformerlm.utils.files import write_whole
from transformerlm.utils.strings import in_words

TRAIN, TEST = "train.jsonl", "test.jsonl"
DEFAULT_TRAIN, DEFAULT_TEST = 24_000, 800
SHORT_ANSWERS = "Answer with as few words as you can."
SENTENCES = "Answer in a whole sentence."
ANOTHER_SHARE = 0.25  # of the conversations have one more question
_TRIES = 50  # until a kind has no more questions for the test


@dataclass(frozen=True)
class Conversation:
    """The messages of one conversation, and the kind of its questions."""

    kind: str
    messages: tuple[tuple[str, str], ...]

    def to_json(self) -> str:
        """Return the line of a file of conversations."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        return json.dumps({"kind": self.kind, "messages": messages})


def split_kinds(*, seed: int) -> tuple[dict[str, Kind], dict[str, Kind]]:
    """Return the kinds of question for training and those for the test, which have no key in common."""
    kinds = all_kinds(seed=seed)
    halves = {name: _split(kind, seed) for name, kind in kinds.items()}
    sides: list[dict[str, Kind]] = []
    for side in (0, 1):
        some = {name: Kind(keys[side], kinds[name].turns) for name, keys in halves.items()}
        sides.append(some | {"follow-up": follow_ups(some["addition"].keys)})
    return sides[0], sides[1]


def _split(kind: Kind, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the keys for training and those for the test, by the sha256 of their names.

    So kinds with the same keys split alike: a word that the test wants spelled is counted in no training either.
    """

    def digest(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode()).digest()

    names = sorted({kind.name_of(key) for key in kind.keys}, key=digest)
    test = set(names[: round(kind.test_share * len(names))])
    keys = [(key, kind.name_of(key) in test) for key in kind.keys]
    return [key for key, is_test in keys if not is_test], [key for key, is_test in keys if is_test]


def converse(kinds: dict[str, Kind], *, draw: Draw) -> Iterator[Conversation]:
    """Yield conversations for ever, of one kind of question after the other."""
    while True:
        for name, kind in kinds.items():
            yield _conversation(name, kind, draw)


def _conversation(name: str, kind: Kind, draw: Draw) -> Conversation:
    system = one_of((None, SHORT_ANSWERS, SENTENCES), draw)
    key = one_of(kind.keys, draw)
    turns = kind.turns(key, draw)
    if len(turns) == 1 and draw() < ANOTHER_SHARE:
        other = one_of(kind.keys, draw)
        turns += kind.turns(other, draw) if other != key else []
    messages = [] if system is None else [("system", system)]
    for turn in turns:
        messages += [("user", turn.question), ("assistant", _answer(turn, system))]
    return Conversation(name, tuple(messages))


def _answer(turn: Turn, system: str | None) -> str:
    return turn.sentence if system == SENTENCES else turn.answer


def write_conversations(
    directory: str | os.PathLike[str],
    *,
    train: int = DEFAULT_TRAIN,
    test: int = DEFAULT_TEST,
    seed: int = 0,
) -> dict[str, int]:
    """Write `train.jsonl` and `test.jsonl` to a directory, and return how many conversations each has.

    The test has each conversation once, so it has fewer than `test` where a kind has no more.

    Raises:
        ValueError: a number below 1.
    """
    if min(train, test) < 1:
        raise ValueError(f"expected one conversation or more in each file, found {min(train, test)}")
    for_training, for_test = split_kinds(seed=seed)
    draw = random.Random(seed).random  # the only method whose numbers Python promises not to change
    stream = converse(for_training, draw=draw)
    sets = {TRAIN: [next(stream) for _ in range(train)], TEST: _each_once(for_test, test, draw=draw)}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, conversations in sets.items():
        write_whole(Path(directory, name), "".join(f"{one.to_json()}\n" for one in conversations))
    return {name: len(conversations) for name, conversations in sets.items()}


def _each_once(kinds: dict[str, Kind], number: int, *, draw: Draw) -> list[Conversation]:
    """Return conversations that differ, as many of each kind, or all that it has."""
    found: list[Conversation] = []
    for place, (name, kind) in enumerate(kinds.items()):
        wanted = number * (place + 1) // len(kinds) - number * place // len(kinds)
        seen: dict[Conversation, None] = {}
        left = _TRIES
        while len(seen) < wanted and left:
            one = _conversation(name, kind, draw)
            left = left - 1 if one in seen else _TRIES
            seen[one] = None
        found += seen
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Write the conversations to the directory named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m databuilder.conversations",
        description=f"Write conversations for training and for a test, {TRAIN} and {TEST}.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory to write to")
    parser.add_argument(
        "--train",
        type=int,
        default=DEFAULT_TRAIN,
        metavar="N",
        help="conversations for training (default: %(default)s)",
    )
    parser.add_argument(
        "--test", type=int, default=DEFAULT_TEST, metavar="N", help="conversations for the test (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the conversations (default: %(default)s)")
    arguments = parser.parse_args(argv)
    numbers = {"train": arguments.train, "test": arguments.test, "seed": arguments.seed}
    try:
        written = write_conversations(arguments.directory, **numbers)
    except (ValueError, OSError) as error:
        parser.error(in_words(error))
    for name, number in written.items():
        sys.stderr.write(f"{arguments.directory / name}: {number:,} conversations\n")


if __name__ == "__main__":
    main(sys.argv[1:])
