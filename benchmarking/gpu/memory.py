"""What we predict about memory and compilation before a run, against what happens in it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarking.gpu.gpt2 import GPT2
from benchmarking.gpu.shapes import SMALL, TINY
from benchmarking.gpu.task import Task
from config.train import TrainConfig
from transformerlm.distributed.world import World
from transformerlm.training.planning import micro_batch
from transformerlm.training.planning.calibration import calibrate, trainer_on_random_tokens
from transformerlm.utils.device import device_memory_bytes

# Six shapes that differ in what takes most memory: logits, activations, weights, the optimizer's states.
_SMALL, _TINY = SMALL.model(), TINY.model()
_LONG = {**GPT2, "d_model": 1024, "d_ff": 2752, "num_layers": 24, "num_heads": 16, "context_length": 4096}
SHAPES: tuple[tuple[str, dict[str, Any], int, str, str], ...] = (
    ("22.7 M", _SMALL, 128, "bf16", "adamw"),
    ("22.7 M, fp32", _SMALL, 64, "fp32", "adamw"),
    ("124 M", GPT2, 16, "bf16", "adamw"),
    ("124 M, recomputed", {**GPT2, "activation_checkpointing": True}, 32, "bf16", "adamw"),
    ("124 M, Muon, qk_norm", {**GPT2, "qk_norm": True, "tie_embeddings": True}, 8, "bf16", "muon"),
    ("350 M, long context", _LONG, 2, "bf16", "adamw"),
)
# How far off the estimate may be, as a share of the peak; on a CPU it was within 14 % (docs/usage.md).
_BAND = 0.25
_MANY = 2**12  # more sequences than fit, so that "auto" has something to decide


def run(task: Task) -> None:
    """Compare the estimates, choose a micro-batch, and count compilations."""
    _estimates(task)
    _automatic(task)
    _recompilations(task)


def _config(
    task: Task, model: dict[str, Any], batch_size: int, optimizer: str = "adamw", **training: Any
) -> TrainConfig:
    names = {"train": "unused.npy", "tokenizer": "unused"}
    settings = {"max_steps": 100, "batch_size": batch_size, "device": task.device, "compile": False, **training}
    tree = {"model": model, "data": names, "training": settings, "optimizer": {"name": optimizer}}
    return TrainConfig.model_validate({**tree, "schedule": {"warmup_steps": 0}})


def _estimates(task: Task) -> None:
    device = torch.device(task.device)
    for name, model, size, precision, optimizer in SHAPES[:1] if task.tiny else SHAPES:
        config = _config(task, _TINY if task.tiny else model, 2 if task.tiny else size, optimizer)
        settings: dict[str, Any] = {"device": device, "precision": precision}
        estimate = micro_batch.memory_by_part(config, micro_batch_size=config.training.batch_size, **settings)["total"]
        what = f"{name}: the memory estimate is within {_BAND:.0%} of the peak"
        if estimate > device_memory_bytes(device):
            task.row(
                "Memory: estimate and peak", shape=name, sequences=size, estimate_gb=estimate / 1e9, peak_gb="too large"
            )
            continue
        try:
            peak = calibrate(config, 2, **settings).peak_bytes or 0
        except Exception:  # out of memory, although the estimate said that it fits
            task.failed(what)
            continue
        cells = {"estimate_gb": estimate / 1e9, "peak_gb": peak / 1e9, "error": estimate / max(1, peak) - 1}
        task.row("Memory: estimate and peak", shape=name, sequences=size, **cells)
        if device.type == "cuda":
            task.check(what, abs(cells["error"]) <= _BAND, f"{cells['error']:+.0%}")


def _automatic(task: Task) -> None:
    """Check that `micro_batch_size = "auto"` chooses what then runs, and report how much of the device that takes."""
    device = torch.device(task.device)
    batch_size = 4 if task.tiny else _MANY
    config = _config(task, _TINY if task.tiny else GPT2, batch_size, micro_batch_size="auto")
    settings: dict[str, Any] = {"device": device, "precision": "bf16"}
    size = micro_batch.resolve(config, world=World(), **settings).training.micro_batch_size
    assert isinstance(size, int), "resolve gives a number"
    one_pass = config.training.model_copy(update={"batch_size": size, "micro_batch_size": size})
    peak = calibrate(config.model_copy(update={"training": one_pass}), 2, **settings).peak_bytes or 0
    share = peak / device_memory_bytes(device)
    task.row('micro_batch_size = "auto", 124 M', sequences=size, peak_gb=peak / 1e9, share_of_the_device=share)


def _recompilations(task: Task) -> None:
    """Count the graphs compiled in the first step and after it: validations and later steps compile none."""
    model = _TINY if task.tiny else _SMALL
    windows = 10 * model["context_length"]  # the last batch of a validation is smaller than the others
    config = _config(task, model, 8, compile=True, micro_batch_size=4, eval_interval=1, eval_tokens=windows)
    trainer = trainer_on_random_tokens(config, device=torch.device(task.device), precision="bf16")
    trainer.model = torch.compile(trainer.raw_model, backend=task.backend)  # type: ignore[assignment]
    trainer.step()
    first = _num_graphs()
    for _ in range(3):
        trainer.validate()
        trainer.step()
    after = _num_graphs() - first
    task.row("Compilation", graphs_in_the_first_step=first, graphs_after_it=after)
    task.check("validations and later steps compile nothing", after == 0, f"{after} graphs")


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
