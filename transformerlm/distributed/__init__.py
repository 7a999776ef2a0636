"""Data parallelism applied from outside: the model, the loss and the optimizer do not know about it."""

from __future__ import annotations

from transformerlm.distributed.parallel import (
    World,
    all_reduce_min,
    all_reduce_sum,
    average_gradients,
    barrier,
    broadcast_parameters,
    init_from_env,
    is_main,
    shutdown,
)

__all__ = [
    "World",
    "all_reduce_min",
    "all_reduce_sum",
    "average_gradients",
    "barrier",
    "broadcast_parameters",
    "init_from_env",
    "is_main",
    "shutdown",
]
