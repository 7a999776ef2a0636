"""The fenced blocks of the pages, and what the line above a block says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^ *```([^\n]*)\n(.*?)^ *```$", flags=re.M | re.S)


class Block(NamedTuple):
    """A fenced block of a page; `why` says why it is not run, and is empty where it is."""

    why: str
    language: str
    text: str

    @property
    def has_own_test(self) -> bool:
        """Whether a test of its own runs the block, such as one that changes the code first."""
        return self.why.startswith("tests/")


def blocks(page: Path) -> list[Block]:
    """Return all fenced blocks of a page."""
    return [Block(*found.groups("")) for found in FENCE.finditer(page.read_text(encoding="utf-8"))]
