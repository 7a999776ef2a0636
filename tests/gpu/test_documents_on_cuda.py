"""Attention within documents on a CUDA device: FlexAttention has the numbers of the attention that is written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformerlm.models import functional
from transformerlm.models.fast.block_mask import block_mask, document_attention
from transformerlm.models.transformer import TransformerLM
from transformerlm.training.loop import batch_loss
from transformerlm.training.reading import Reading
from transformerlm.utils.dtypes import autocast

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


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_model_keeps_documents_apart(recompute: bool) -> None:
    """It makes its mask within, also where layers are recomputed: loss and gradients in bf16 are the CPU's in fp32."""
    ids = torch.randint(40, (2, 257), generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = {"vocab_size": 40, "context_length": 256, "d_model": 64, "num_layers": 1, "num_heads": 4}
    results = []
    for device, precision in (("cpu", "fp32"), (DEVICE, "bf16")):
        torch.manual_seed(0)
        model = TransformerLM(**sizes, document_mask=True, activation_checkpointing=recompute).to(device)
        forward: Any = torch.compile(model) if device == DEVICE else model
        inputs, targets = ids[:, :-1].to(device), ids[:, 1:].to(device)
        with autocast(torch.device(device), precision):  # type: ignore[arg-type]
            _, loss = batch_loss(forward, inputs, targets, reading=Reading(SEPARATOR))
        loss.backward()  # type: ignore[no-untyped-call]
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append((loss.item(), torch.cat([grad.flatten().cpu() for grad in grads])))
    (expected, plain), (found, compiled) = results
    assert found == pytest.approx(expected, rel=0.01)
    assert (compiled - plain).norm() < 0.05 * plain.norm()
