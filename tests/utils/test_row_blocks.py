"""Blocks of rows hold all rows once, in order, and none is larger than allowed."""

from __future__ import annotations

import pytest
import torch

from transformerlm.utils import row_blocks as blocks


@pytest.mark.parametrize(("rows", "columns", "elements"), [(10, 3, 9), (10, 3, 1), (1, 100, 7), (0, 4, 8), (6, 2, 12)])
def test_blocks_cover_all_rows_once(rows: int, columns: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block has as many rows as fit, and at least one; the last has the rest."""
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", elements)
    x = torch.arange(rows * columns).view(rows, columns)
    parts = [x[block] for block in blocks.row_blocks(x)]
    assert torch.equal(torch.cat([*parts, x[:0]]), x)
    limit = elements * torch.get_num_threads()
    assert all(0 < part.numel() <= max(limit, columns) for part in parts)


def test_other_devices_take_everything_at_once() -> None:
    """A tensor of usual size is one block on a device without a processor's cache."""
    assert list(blocks.row_blocks(torch.empty(4096, 1000, device="meta"))) == [slice(0, 2**27 // 1000)]
