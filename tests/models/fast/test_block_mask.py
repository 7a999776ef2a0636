"""FlexAttention within documents has the numbers of the attention that is written out."""

from __future__ import annotations

import pytest
import torch

from transformerlm.models import functional
from transformerlm.models.fast.block_mask import block_mask, document_attention

SEPARATOR = 0


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_is_the_written_out_attention(num_kv_heads: int) -> None:
    """Results agree for documents of many lengths, over the edge of a block of 128, and with heads that are shared."""
    torch.manual_seed(0)
    ids = torch.randint(40, (2, 150))
    positions = functional.document_positions(ids, SEPARATOR)
    query = torch.randn(2, 4, 150, 16)
    key, value = (torch.randn(2, num_kv_heads, 150, 16) for _ in range(2))
    expected = functional.document_attention(query, key, value, functional.document_mask(positions))
    found = document_attention(query, key, value, block_mask(positions))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, functional.causal_attention(query, key, value))
