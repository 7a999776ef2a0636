"""The switch between the plain forms and the fast ones.

A plain form is the textbook's formula, in the file where one looks first. It may hand its work over to a fast form in
the room's `fast/` folder, which computes the same. Inside `plain_forms` nothing is handed over, so that a test, or a
reader with a debugger, has a whole model or training step in its plain form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_only_plain = False


@contextmanager
def plain_forms() -> Iterator[None]:
    """Compute with plain forms alone, in the whole process, until the block ends."""
    global _only_plain
    before, _only_plain = _only_plain, True
    try:
        yield
    finally:
        _only_plain = before


def may_hand_over() -> bool:
    """Return whether a plain form may hand its work over to its fast one."""
    return not _only_plain
