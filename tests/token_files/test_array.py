"""A token file is opened without trusting it; what numpy writes for a row of ids is what is read."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from transformerlm.token_files.array import open_token_array


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [0, 1, 1000, 70_000])
def test_what_numpy_writes_is_read(tmp_path: Path, dtype: type, length: int) -> None:
    """Rows of both types and any length come back, read-only, as from numpy's own reader."""
    np.save(tmp_path / "a.npy", np.arange(length).astype(dtype))
    tokens = open_token_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(tokens, np.load(tmp_path / "a.npy"))
    assert tokens.dtype == dtype
    assert not tokens.flags.writeable


def test_a_size_that_the_file_does_not_have_takes_no_memory(tmp_path: Path) -> None:
    """A header that promises 10^18 ids is refused with both sizes, and nothing is allocated for them."""
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16))
    content = (tmp_path / "a.npy").read_bytes()
    header = content[:128].replace(b"(1000,), }" + b" " * 15, b"(1000000000000000000,), }")
    (tmp_path / "a.npy").write_bytes(header + content[128:])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected 2,000,000,000,000,000,128 bytes for .*, found 2,128; run"):
            open_token_array(tmp_path / "a.npy")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
