"""Numbers drawn ahead are those of the generator."""

from __future__ import annotations

import torch

from transformerlm.inference.random_numbers import RandomNumbers, uniform


def test_numbers_drawn_ahead_are_those_of_the_generator() -> None:
    """One by one they are the same, whoever asks; the last ones can be had again."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    ahead = [RandomNumbers(torch.Generator().manual_seed(seed), torch.device("cpu")) for seed in range(3)]
    for _ in range(150):
        one = uniform(3, generators, torch.device("cpu"))
        assert torch.equal(uniform(3, ahead, torch.device("cpu")), one)
    again = RandomNumbers(torch.Generator().manual_seed(0), torch.device("cpu"))
    first = [again.take() for _ in range(100)]
    again.put_back(64)
    assert [again.take() for _ in range(64)] == first[36:]
    assert torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist() == first
