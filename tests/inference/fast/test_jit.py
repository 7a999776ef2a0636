"""The product whose sums stay in registers, in the forms that processors with and without AVX-512 get."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from transformerlm.inference.fast.instructions import multiply_block


@pytest.mark.parametrize(("lanes", "vectors"), [(16, 4), (8, 2)])
def test_a_block_of_a_product_is_numpys_and_each_row_is_the_one_that_it_is_alone(lanes: int, vectors: int) -> None:
    """Four rows from the second on go to their place in the result, and nothing else of it changes."""
    four, one = multiply_block(4, lanes, vectors), multiply_block(1, lanes, vectors)

    @njit
    def compute(x, strip, out, alone):  # type: ignore[no-untyped-def]
        four(x, 1, strip, out, 2, 3)
        for row in range(4):
            one(x, 1 + row, strip, alone, row, 0)

    width, dice = lanes * vectors, np.random.default_rng(0)
    x = dice.standard_normal((6, 37)).astype(np.float32)
    strip = dice.standard_normal((37, width)).astype(np.float32)
    out, alone = np.full((7, width + 5), np.nan, np.float32), np.empty((4, width), np.float32)
    compute(x, strip.reshape(-1), out, alone)
    block = out[2:6, 3 : 3 + width]
    np.testing.assert_allclose(block, x[1:5] @ strip, rtol=1e-5, atol=1e-5)
    assert np.array_equal(block, alone)
    assert np.isnan(out).sum() == out.size - block.size
