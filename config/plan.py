"""Schema of `transformerlm-plan`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from config.schemas import Count, PositiveInt, Section
from config.train import TrainConfig


class MachineConfig(Section):
    """GPUs of another machine to plan for: memory is estimated, and time follows from their speed; nothing is measured.

    Describe one of them by gpu, or by flops_per_second and memory_gb.
    """

    gpu: Literal["A100-40GB", "A100-80GB", "H100", "H100-PCIe", "H200", "L4", "L40S", "RTX4090"] | None = Field(
        None, description="model of the GPU, whose memory and published bf16 peak are known"
    )
    num_gpus: int = Field(1, ge=1, le=2**20, description="number of GPUs, over all machines")
    flops_per_second: float | None = Field(
        None, gt=0, le=1e18, description="peak of one GPU in the run's precision, without sparsity; none: gpu's"
    )
    memory_gb: float | None = Field(None, gt=0, le=1e6, description="memory of one GPU, in 1e9 bytes; none: gpu's")
    mfu: float = Field(
        0.3,
        gt=0,
        le=1,
        description="assumed model FLOPs utilisation: the share of the peak of all GPUs that the model's FLOPs reach",
    )
    tokens_per_second: PositiveInt | None = Field(
        None, description="tokens a second of all GPUs together, if you know it; replaces mfu x peak"
    )

    @model_validator(mode="after")
    def _check_gpu(self) -> Self:
        if self.gpu is None and self.memory_gb is None:
            raise ValueError("expected gpu, or memory_gb with flops_per_second or tokens_per_second, found neither")
        if self.gpu is None and self.flops_per_second is None and self.tokens_per_second is None:
            raise ValueError(f"memory_gb = {self.memory_gb} needs flops_per_second or tokens_per_second beside it")
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
        if machine is None or machine.flops_per_second or machine.tokens_per_second:
            return self
        if self.training.precision == "fp32":
            raise ValueError(
                'training.precision = "fp32": the peak of machine.gpu is that of bf16; give '
                "machine.flops_per_second or machine.tokens_per_second"
            )
        return self
