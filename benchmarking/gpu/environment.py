"""What the suite runs on: the card, its driver, the versions, and the best speeds of the card."""

from __future__ import annotations

import shutil
import subprocess

import torch

from benchmarking.gpu.results import Results
from benchmarking.gpu.task import Task
from benchmarking.limits import CopyBandwidth, MatmulPeak
from benchmarking.machine import describe
from transformerlm.utils.environment import cpu_model

_PACKAGES = ("triton", "transformers", "safetensors", "pydantic", "numba", "tokenizers", "wandb")
_ROUNDS = 3


def run(task: Task) -> None:
    """Write the line about the environment, then the limits."""
    device = torch.device(task.device)
    found = describe(threads=torch.get_num_threads(), device=task.device, packages=_PACKAGES)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    facts = {key.removeprefix("versions."): value for key, value in found.items() if key.startswith("versions.")}
    facts |= {"cores": found["hardware.cores"], "ram_gb": found["hardware.ram_gb"]} | _card(device)
    Results(task.out).write(
        "environment", part=task.part, device_name=name, **{key: value for key, value in facts.items() if value}
    )
    for dtype in (torch.bfloat16, torch.float32):
        peaks = [MatmulPeak(device, dtype)()["flops_per_second"] for _ in range(_ROUNDS)]
        task.row("Limits", what=f"product of two square matrices, {dtype}", best=max(peaks) / 1e12, unit="TFLOP/s")
    copies = [CopyBandwidth(device)()["bytes_per_second"] for _ in range(_ROUNDS)]
    task.row("Limits", what="copy, bytes read and written", best=max(copies) / 1e9, unit="GB/s")


def _card(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {}
    memory = torch.cuda.get_device_properties(device).total_memory
    return {"gpu_memory_gb": round(memory / 1e9, 1), "cuda": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None
