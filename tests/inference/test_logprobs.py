"""Log-probabilities of the ids of a text."""

from __future__ import annotations

import pytest
import torch

from transformerlm.inference.logprobs import log_probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_log_softmax(dtype: torch.dtype) -> None:
    """Of the id of each row, and of the most likely ids, in descending order."""
    logits = (3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = torch.log_softmax(logits.double(), dim=-1)
    found = log_probabilities(logits, [7, 0, 39, 7, 3], num_top=4)
    assert [one.token_id for one in found] == [7, 0, 39, 7, 3]
    for row, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[row, one.token_id]), abs=1e-5)
        values, ids = zip(*((value, token_id) for token_id, value in one.top), strict=True)
        torch.testing.assert_close(torch.tensor(values).double(), expected[row].topk(4).values, rtol=0, atol=1e-5)
        assert expected[row, list(ids)].tolist() == expected[row].topk(4).values.tolist()


def test_equals_are_in_the_order_of_their_ids() -> None:
    """All of three equals, behind a more likely one; and what is asked beyond the vocabulary is not there."""
    logits = torch.tensor([[1.0, 0.0, 1.0, 2.0, 1.0]])
    assert [token_id for token_id, _ in log_probabilities(logits, [0], num_top=4)[0].top] == [3, 0, 2, 4]
    assert len(log_probabilities(logits, [0], num_top=9)[0].top) == 5
    assert log_probabilities(logits, [0], num_top=0)[0].top == []


def test_a_row_is_the_same_in_any_batch() -> None:
    """To the last bit, equals included."""
    logits = (2 * torch.randn(9, 500, generator=torch.Generator().manual_seed(1))).bfloat16()
    together = log_probabilities(logits, list(range(9)), num_top=20)
    assert together == [log_probabilities(logits[row : row + 1], [row], num_top=20)[0] for row in range(9)]
