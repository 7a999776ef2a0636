"""Ids travel to a device with as few bytes as they have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transformerlm.training.to_device import as_signed, widened


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4", ">u4", "u1", "<i4", "<i8"])
def test_ids_travel_as_they_are_in_the_file_and_are_widened_after(dtype: str) -> None:
    """No byte more goes to a device than the ids have, and there they are the same int64, the largest too."""
    limits = np.iinfo(np.dtype(dtype))
    ids = np.array([[0, 1, limits.max], [limits.max // 2 + 1, 7, 2]]).astype(dtype)
    signed, bits = as_signed(ids)
    assert signed.nbytes == ids.nbytes
    assert torch.equal(widened(signed, bits), torch.from_numpy(ids.astype(np.int64)))
