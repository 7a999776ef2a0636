"""The logged norms are those of the blocks' weights and of their outputs in the last training pass."""

from __future__ import annotations

import pytest
import torch

from transformerlm.models.transformer import TransformerLM
from transformerlm.training.norm_metrics import NormRecorder


def make_model(**changes) -> TransformerLM:
    """Return a small model."""
    sizes = {"vocab_size": 20, "context_length": 8, "d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 32}
    return TransformerLM(**{**sizes, **changes})


def test_norms_equal_those_worked_out_by_hand():
    """A block's weight norm is that of all its parameters together; its activation norm is the mean over tokens."""
    model, ids = make_model(), torch.arange(16).view(2, 8)
    recorder = NormRecorder(model)
    outputs = []
    model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    model(ids)
    norms = recorder.norms()
    weights = torch.cat([p.flatten() for p in model.layers[1].parameters()])
    assert norms["weight_l2_norm.layers.1"] == pytest.approx(weights.norm().item(), rel=1e-5)
    assert norms["activation_l2_norm.layers.1"] == pytest.approx(outputs[0].norm(dim=-1).mean().item(), rel=1e-5)
    assert set(norms) == {f"{kind}_l2_norm.layers.{i}" for kind in ("weight", "activation") for i in range(3)}


@pytest.mark.parametrize("recompute", [False, True])
def test_recording_changes_neither_outputs_nor_gradients(recompute):
    """With and without a recorder the model computes the same, activation checkpointing included."""
    results = []
    for record in (False, True):
        torch.manual_seed(0)
        model = make_model(activation_checkpointing=recompute)
        recorder = NormRecorder(model) if record else None
        loss = model(torch.arange(8).unsqueeze(0)).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert recorder is not None
    assert len(recorder.norms()) == 6
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_validation_passes_are_not_recorded():
    """A pass in evaluation mode changes no norms; before the first training pass there are only those of weights."""
    model = make_model()
    recorder = NormRecorder(model)
    assert {name.split(".")[0] for name in recorder.norms()} == {"weight_l2_norm"}
    model(torch.arange(8).unsqueeze(0))
    before = recorder.norms()
    model.eval()(torch.arange(8, 16).unsqueeze(0))
    assert recorder.norms() == before
