"""A machine that is not here, and what the names of GPUs mean."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from config.plan import MachineConfig
from transformerlm.training.planning.machine import GPUS, Machine


def test_the_schema_knows_the_gpus_of_the_table():
    """Each name that the schema allows has a memory and a peak."""
    names, _ = get_args(MachineConfig.model_fields["gpu"].annotation)
    assert list(get_args(names)) == list(GPUS)


def test_what_is_said_of_a_gpu_goes_before_what_is_known_of_it():
    """Memory and peak come from the table or from the user; all memory is free, and the device is CUDA."""
    there = Machine.of(MachineConfig(gpu="H100", num_gpus=8))
    assert (there.name, there.num_processes, there.device) == ("8 x H100", 8, torch.device("cuda"))
    assert (there.memory_bytes, there.available_bytes, there.flops_per_second) == (80e9, 80e9, 989e12)
    there = Machine.of(MachineConfig(gpu="H100", memory_gb=64.0, flops_per_second=2e14))
    assert (there.memory_bytes, there.flops_per_second, there.is_here) == (64e9, 2e14, False)


def test_this_machine_is_one_process_that_shares_its_memory():
    """The memory is that of the device, and no more than that is free."""
    here = Machine.here(torch.device("cpu"))
    assert (here.name, here.num_processes, here.is_here) == ("cpu", 1, True)
    assert 0 < here.available_bytes <= here.memory_bytes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 80e9), ({"memory_gb": 24.5}, 24.5e9), ({"memory_gb": "0.5 GB"}, 5e8), ({"memory_gb": "24GiB"}, 24 * 2**30)],
)
def test_memory_is_a_number_or_has_its_unit(settings, expected):
    """A GPU of which nothing is said has the usual memory, and no speed: the plan then gives no time."""
    there = Machine.of(MachineConfig(**settings))
    assert (there.memory_bytes, there.flops_per_second) == (expected, None)
    assert there.expected_tokens_per_second(MachineConfig(**settings), flops_per_token=1) is None


@pytest.mark.parametrize(("num_gpus", "expected"), [(1, 1), (4, 4), (8, 8), (64, 8)])
def test_a_machine_has_eight_gpus_at_most(num_gpus, expected):
    """Fewer GPUs are in one machine."""
    assert Machine.of(MachineConfig(num_gpus=num_gpus)).local_world_size == expected


@pytest.mark.parametrize("size", ["80", "0GB", "0.0GB", "-1GB", "80 TB", "1e2GB", "80GB "])
def test_a_size_has_a_number_and_a_unit(size):
    """Zero, and other units, are refused."""
    with pytest.raises(ValueError, match="should match pattern"):
        MachineConfig(memory_gb=size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mfu": 0.4}, "mfu = 0.4 needs gpu or flops_per_second"),
        ({"memory_gb": 24.0, "mfu": 0.2}, "mfu = 0.2 needs gpu or flops_per_second"),
    ],
)
def test_a_gpu_of_which_too_little_is_said_is_refused(settings, message):
    """Without a name its memory and its speed must be given."""
    with pytest.raises(ValueError, match=message):
        MachineConfig(**settings)
