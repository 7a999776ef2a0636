"""L2 norms of each block's weights and outputs, which show where a run goes wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformerlm.models.transformer import TransformerLM


class NormRecorder:
    """Watches the blocks of a model and reports, on demand, the norms of the last forward pass in training."""

    def __init__(self, model: TransformerLM) -> None:
        self._model = model
        self._activations: dict[str, Tensor] = {}
        for index, layer in enumerate(model.layers):
            layer.register_forward_hook(self._hook(f"layers.{index}"))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: object, output: Tensor) -> None:
            if module.training:
                # (batch, seq, d_model): the norm of each token's vector, then the mean over tokens.
                self._activations[name] = output.detach().float().norm(dim=-1).mean()

        return record

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """Return `activation_l2_norm.layers.{i}` (mean over tokens) and `weight_l2_norm.layers.{i}` (whole block)."""
        activations = {f"activation_l2_norm.{name}": norm.item() for name, norm in self._activations.items()}
        weights = {
            f"weight_l2_norm.layers.{index}": torch.stack([p.norm() for p in layer.parameters()]).norm().item()
            for index, layer in enumerate(self._model.layers)
        }
        return activations | weights
