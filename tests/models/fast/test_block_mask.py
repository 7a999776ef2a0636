"""FlexAttention within documents has the numbers of the attention that is written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention

from transformerlm.models import functional, transformer
from transformerlm.models.fast.block_mask import block_mask, document_attention
from transformerlm.models.transformer import TransformerLM

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


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_that_makes_the_mask_is_one_graph(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler takes mask, attention and layers that are recomputed as a whole; tests/gpu has CUDA's kernels.

    FlexAttention's backward pass on a CPU, which PyTorch refuses, is the formula's.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    ids = torch.randint(40, (2, 32), generator=torch.Generator().manual_seed(0))
    sizes = {"vocab_size": 40, "context_length": 32, "d_model": 32, "num_layers": 1, "num_heads": 2}
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = TransformerLM(**sizes, document_mask=True, activation_checkpointing=recompute)
        if is_compiled:
            monkeypatch.setattr(transformer, "attention_mask", lambda positions, attention: block_mask(positions))
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        loss = forward(ids, document_positions=functional.document_positions(ids, SEPARATOR)).square().mean()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
