"""The gate with a backward pass of its own: the numbers of its plain form and of torch's, in any blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.fast import checks
from transformerlm.models import functional
from transformerlm.models.fast import gated_silu

SHAPE = (3, 5, 6)


fast, plain = gated_silu.gated_silu, functional.gated_silu


def from_torch(gate: Tensor, x: Tensor) -> Tensor:
    return F.silu(gate) * x


@pytest.mark.parametrize("elements", [1, 13, 10**6])
def test_values_and_gradients_are_those_of_the_plain_form(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of torch, whatever the blocks, for a tensor that is not contiguous."""
    checks.check_equals(fast, [plain, from_torch], SHAPE, elements, monkeypatch)


def test_gradients_are_those_of_finite_differences() -> None:
    """torch's gradcheck agrees, in float64."""
    assert torch.autograd.gradcheck(fast, checks.make_inputs(SHAPE))


def test_half_precision_comes_back_as_it_went_in() -> None:
    """Results and gradients have the inputs' dtypes and are near those of float64."""
    checks.check_half_precision(fast, from_torch, SHAPE)


def test_without_gradients_the_formula_is_the_same() -> None:
    """Evaluation and training see the same numbers, and the inputs are left as they were."""
    checks.check_without_gradients(plain, SHAPE)


def test_only_the_inputs_wait_for_the_backward_pass() -> None:
    """The sigmoid and the products are recomputed."""
    checks.check_keeps_only_inputs(fast, SHAPE)
