"""Attention within documents on a CUDA device: FlexAttention has the numbers of the attention that is written out."""

from __future__ import annotations

import pytest
import torch

from transformerlm.models import functional
from transformerlm.models.fast.block_mask import block_mask, document_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SEPARATOR = 0


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_and_its_gradients_are_the_written_out_ones(num_kv_heads: int) -> None:
    """For documents of many lengths, over the edge of a block of 128, and with heads that are shared."""
    dice = torch.Generator().manual_seed(0)
    positions = functional.document_positions(torch.randint(40, (2, 256), generator=dice), SEPARATOR).to(DEVICE)
    shapes = [(2, heads, 256, 32) for heads in (4, num_kv_heads, num_kv_heads)]
    inputs = [torch.randn(shape, generator=dice).to(DEVICE).requires_grad_() for shape in shapes]
    results = []
    for attention, mask in (
        (functional.document_attention, functional.document_mask(positions)),
        (document_attention, block_mask(positions)),
    ):
        found = attention(*inputs, mask)
        results.append([found, *torch.autograd.grad(found.square().mean(), inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
