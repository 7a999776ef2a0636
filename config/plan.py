"""Schema of `transformerlm-plan`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from config.schemas import Count, PositiveInt, Section
from config.train import TrainConfig

_BYTES = {"GB": 10**9, "GiB": 2**30}
# What a GPU has of which nothing is said: an A100 and an H100 with the usual memory.
_USUAL_MEMORY_GB = 80.0

Size = Annotated[
    str,
    Field(pattern=r"^([1-9]\d{0,5}(\.\d{1,3})?|0\.\d{0,2}[1-9]) ?(GB|GiB)$", json_schema_extra={"format": "size"}),
]
"""An amount of memory with its unit: 80GB, 24 GiB."""


def size_bytes(text: str) -> int:
    """Return the bytes in a `Size`."""
    unit = text.lstrip("0123456789.").lstrip()
    return int(float(text.removesuffix(unit)) * _BYTES[unit])


class MachineConfig(Section):
    """GPUs of other machines to plan for: memory is estimated, and time follows from their speed; nothing is measured.

    Describe one of them by gpu, or by memory_gb and, for the time, flops_per_second or tokens_per_second.
    """

    gpu: Literal["A100-40GB", "A100-80GB", "H100", "H100-PCIe", "H200", "L4", "L40S", "RTX4090"] | None = Field(
        None, description="model of the GPU, whose memory and published bf16 peak are known"
    )
    num_gpus: int = Field(
        1,
        ge=1,
        le=2**20,
        description="number of GPUs, over all machines; --gpus is short for it",
        json_schema_extra={"short": "gpus"},
    )
    gpus_per_node: int = Field(8, ge=1, le=1024, description="GPUs of each machine")
    flops_per_second: float | None = Field(
        None, gt=0, le=1e17, description="peak of one GPU in the run's precision, without sparsity; none: gpu's"
    )
    memory_gb: Annotated[float, Field(gt=0, le=1e6)] | Size | None = Field(
        None,
        description="memory of one GPU, in 1e9 bytes; none: gpu's, or 80; --gpu_memory is short for it",
        json_schema_extra={"short": "gpu_memory"},
    )
    storage_gb_per_second: float = Field(
        2.0, gt=0, le=1e6, description="1e9 bytes a second that all machines together write to runs_dir"
    )
    mfu: float = Field(
        0.3,
        gt=0,
        le=1,
        description="assumed model FLOPs utilisation: the share of the peak of all GPUs that the model's FLOPs reach",
    )
    tokens_per_second: PositiveInt | None = Field(
        None, description="tokens a second of all GPUs together, if you know it; replaces mfu x peak"
    )

    @property
    def memory_bytes(self) -> int | None:
        """The memory of one GPU as the configuration says it; None: that of the `gpu`."""
        if self.memory_gb is None and self.gpu:
            return None
        size = _USUAL_MEMORY_GB if self.memory_gb is None else self.memory_gb
        return size_bytes(size) if isinstance(size, str) else int(size * 1e9)

    @model_validator(mode="after")
    def _check_speed(self) -> Self:
        if self.is_changed("mfu") and self.gpu is None and self.flops_per_second is None:
            raise ValueError(f"mfu = {self.mfu} needs gpu or flops_per_second beside it, whose share it is")
        return self


class PlanConfig(TrainConfig):
    """Estimate what a training run will need before it starts: parameters, FLOPs, memory, disk and time.

    It takes the TOML file of transformerlm-train unchanged; the token files need not exist yet.
    """

    calibration_steps: Count = Field(
        10, description="steps of the model on random tokens to measure; 0, or a [machine]: none"
    )
    machine: MachineConfig | None = None

    @model_validator(mode="after")
    def _check_peak(self) -> Self:
        machine = self.machine
        if machine is None or machine.gpu is None or machine.flops_per_second or machine.tokens_per_second:
            return self
        if self.training.precision == "fp32":
            raise ValueError(
                'training.precision = "fp32": the peak of machine.gpu is that of bf16; give '
                "machine.flops_per_second or machine.tokens_per_second"
            )
        return self
