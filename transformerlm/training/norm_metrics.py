"""L2 norms of each block's weights and outputs, which show where a run goes wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformerlm.distributed.sharding import Shards
from transformerlm.models.transformer import TransformerLM

_NONE = -1.0  # no pass yet


class NormRecorder:
    """Watches the blocks of a model and reports, on demand, the norms of the last forward pass in training."""

    def __init__(self, model: TransformerLM, shards: Shards | None = None) -> None:
        self._shards = shards or Shards.whole(model)
        self._num_layers = len(model.layers)
        # Each has its key from the start: a compiled model would be compiled once more for a key that is new.
        self._activations = {f"layers.{index}": torch.tensor(_NONE) for index in range(self._num_layers)}
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
        """Return `activation_l2_norm.layers.{i}` (mean over tokens) and `weight_l2_norm.layers.{i}` (whole block).

        Activations are those of this rank's tokens. All ranks call it together.
        """
        activations = {
            f"activation_l2_norm.{name}": found
            for name, norm in self._activations.items()
            if (found := norm.item()) != _NONE
        }
        norms = torch.stack([self._weight_norm(f"layers.{index}.") for index in range(self._num_layers)])
        weights = {
            f"weight_l2_norm.layers.{i}": norm for i, norm in enumerate(self._shards.whole_norms(norms).tolist())
        }
        return activations | weights

    def _weight_norm(self, prefix: str) -> Tensor:
        norms = [p.norm() for name, p in self._shards.parameters.items() if name.startswith(prefix)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm
