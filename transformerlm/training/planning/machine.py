"""What a run is planned for: this machine, or GPUs that are not here, with their memory and speed on paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from config.plan import MachineConfig
from transformerlm.utils.device import available_memory_bytes, device_memory_bytes

# Peak FLOPs per second of dense bf16 products with fp32 sums, and bytes of memory. The source is NVIDIA's data sheets
# (half of the speed where they give it with sparsity) and, for the RTX 4090, the paper on the Ada architecture.
GPUS = {
    "A100-40GB": (312e12, 40e9),
    "A100-80GB": (312e12, 80e9),
    "H100": (989e12, 80e9),
    "H100-PCIe": (756e12, 80e9),
    "H200": (989e12, 141e9),
    "L4": (121e12, 24e9),
    "L40S": (362e12, 48e9),
    "RTX4090": (165e12, 24e9),
}


@dataclass(frozen=True)
class Machine:
    """Where a run would compute; memory and peak speed are those of each of its `num_processes` devices.

    `local_world_size` of them are in each machine.
    """

    name: str
    device: torch.device
    memory_bytes: int
    available_bytes: int
    num_processes: int = 1
    local_world_size: int = 1
    flops_per_second: float | None = None
    is_here: bool = False

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Return this machine, for one process on `device`."""
        return cls(str(device), device, device_memory_bytes(device), available_memory_bytes(device), is_here=True)

    @classmethod
    def of(cls, config: MachineConfig) -> Machine:
        """Return the GPUs that a configuration describes, all of their memory free."""
        peak, memory = GPUS[config.gpu] if config.gpu else (None, 0.0)
        memory_bytes = int(memory) if config.memory_bytes is None else config.memory_bytes
        return cls(
            name=f"{config.num_gpus} x {config.gpu or 'GPU'}",
            device=torch.device("cuda"),
            memory_bytes=memory_bytes,
            available_bytes=memory_bytes,
            num_processes=config.num_gpus,
            local_world_size=min(config.gpus_per_node, config.num_gpus),
            flops_per_second=config.flops_per_second or peak,
        )

    def expected_tokens_per_second(self, config: MachineConfig, *, flops_per_token: int) -> float | None:
        """Return the tokens per second of all processes: as the configuration says, or by its share of the peak.

        Without a peak it is unknown: None.
        """
        if config.tokens_per_second is not None:
            return float(config.tokens_per_second)
        if self.flops_per_second is None:
            return None
        return config.mfu * self.flops_per_second * self.num_processes / flops_per_token
