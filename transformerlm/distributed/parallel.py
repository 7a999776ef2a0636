"""Data parallelism: each rank holds the whole model and its own rows of the batch.

After backward the gradients are averaged, weighted by tokens, so that every rank takes the step that a single process
would take with the whole batch. The code here knows tensors, not models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transformerlm.distributed.world import World

# Large enough that a transfer is bandwidth-bound, small enough not to show in the memory of a step.
_BUCKET_BYTES = 32 * 1024 * 1024


def broadcast_parameters(model: nn.Module, world: World) -> None:
    """Give every rank the parameters and buffers of rank 0, in place."""
    if world.is_distributed:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: Iterable[nn.Parameter], world: World, *, share: float | Tensor) -> None:
    """Replace each rank's gradients, in place, by the sum over the ranks of gradients times `share`.

    If the gradients are those of a mean loss, and `share` is this rank's share of all ranks' tokens, the result is the
    gradient of the mean over all tokens. A parameter without a gradient on this rank counts as zeros, so every rank
    must pass the same parameters in the same order. No call waits for the device.
    """
    if not world.is_distributed:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).mul_(share)
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbouring gradients of one dtype and device up to the size of a bucket."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        grown = size + gradient.numel() * gradient.element_size()
        alike = not bucket or (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (grown > _BUCKET_BYTES or not alike):
            yield bucket
            bucket, grown = [], gradient.numel() * gradient.element_size()
        bucket.append(gradient)
        size = grown
    if bucket:
        yield bucket
