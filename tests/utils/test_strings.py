"""Errors in words; what else `strings` does is tested where it is used."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from transformerlm.utils.strings import in_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a\n  b"), "a b"),
        (MemoryError(), "MemoryError"),
        (OSError("x: is there"), "x: is there"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "Bad file descriptor"),
        (OSError(errno.ENOENT, "No such file or directory", b"a/b"), "a/b: No such file or directory"),
        (OSError(errno.ENOTDIR, "Not a directory", "nowhere/at/all"), "nowhere/at/all: Not a directory"),
    ],
)
def test_an_error_is_one_line(error: Exception, words: str) -> None:
    """Of a file's error the path and the reason, of others the message, or the kind where there is none."""
    assert in_words(error) == words


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_file_in_the_place_of_a_directory_is_named(below: str, tmp_path: Path) -> None:
    """Whatever was to be made below it, with its parents or not."""
    file = tmp_path / "file"
    file.touch()
    for parents in (True, False):
        with pytest.raises(OSError, match=r"exists|Not a dir") as caught:
            (file / below).mkdir(parents=parents, exist_ok=True)
        assert in_words(caught.value) == f"{file}: expected a directory, found a file"
