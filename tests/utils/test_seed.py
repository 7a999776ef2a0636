"""Random states that survive JSON."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from transformerlm.utils.seed import rng_state, seed_everything, set_rng_state


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(20).tolist()]


def test_same_seed_same_numbers() -> None:
    """All three libraries repeat themselves, for seeds beyond numpy's 32 bits too."""
    for seed in (0, 2**40 + 3):
        seed_everything(seed)
        first = draw()
        seed_everything(seed)
        assert draw() == first


def test_state_through_json_continues_where_it_was() -> None:
    """Restored from its JSON text, every generator continues bit for bit, cached Gaussians included."""
    seed_everything(1)
    draw()
    state = json.loads(json.dumps(rng_state()))
    expected = draw()
    seed_everything(99)
    set_rng_state(state)
    assert draw() == expected


NUMPY = rng_state()["numpy"]


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"python": 3},
        {**rng_state(), "torch": "AAAA"},
        {**rng_state(), "numpy": []},
        {**rng_state(), "numpy": [*NUMPY[:2], 10**7, *NUMPY[3:]]},  # numpy would read there
        {**rng_state(), "numpy": [NUMPY[0], [-1] * 624, *NUMPY[2:]]},
        {**rng_state(), "python": [3, [2**70] * 625, None]},
    ],
    ids=range(7),
)
def test_malformed_state_is_refused(broken: dict[str, object]) -> None:
    """Anything but what rng_state returned is a ValueError."""
    with pytest.raises(ValueError, match="rng state: expected the dict"):
        set_rng_state(broken)


@pytest.mark.gpu
def test_cuda_generators_are_restored() -> None:
    """The CUDA generators continue too."""
    state = rng_state()
    expected = torch.randn(3, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.randn(3, device="cuda"), expected)
