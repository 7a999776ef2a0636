"""Sums of rows: exact enough, and the same in any batch."""

from __future__ import annotations

import pytest
import torch

from transformerlm.inference.row_sums import row_sums


@pytest.mark.parametrize("size", [1, 5000, 70_001])
def test_a_row_has_the_same_sum_in_any_batch(size: int) -> None:
    """To the last bit, with one thread or two, also where torch would sum a single row in several threads."""
    rows, before = torch.rand(5, size, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [row_sums(rows), torch.cat([row_sums(row.unsqueeze(0)) for row in rows])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(sums, found[0]) for sums in found)
    torch.testing.assert_close(found[0], rows.double().sum(dim=-1), rtol=1e-6, atol=0)
