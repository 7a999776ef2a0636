"""Attention within documents: what a model computes of packed documents is what it computes of each by itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from transformerlm.models.attention import ATTENTION_IMPLEMENTATIONS
from transformerlm.models.functional import document_mask, document_positions
from transformerlm.models.transformer import TransformerLM
from transformerlm.utils.plain_forms import plain_forms

SEPARATOR = 9
ROW = [3, 1, SEPARATOR, 4, 1, 5, SEPARATOR, SEPARATOR, 2, 6]  # the end of a document, one of 3 ids, an empty one, one
SIZES: dict[str, Any] = {"vocab_size": 10, "context_length": 12, "d_model": 16, "num_layers": 2, "num_heads": 2}


def _alone(model: TransformerLM, row: list[int]) -> Tensor:
    """Return the logits of each document of a row, run by itself, `(seq, vocab_size)`."""
    starts = [0, *(place for place, one in enumerate(row) if one == SEPARATOR and place), len(row)]
    documents = [row[start:end] for start, end in pairwise(starts)]
    return torch.cat([model(torch.tensor([document]))[0] for document in documents])


def test_places_restart_at_each_separator() -> None:
    """A separator is the first id of the document after it; what comes before the first one is counted from 0."""
    assert document_positions(torch.tensor([ROW]), SEPARATOR).tolist() == [[0, 1, 0, 1, 2, 3, 0, 0, 1, 2]]


def test_a_query_sees_its_own_document_up_to_itself() -> None:
    """The mask is True where the key is in the query's document, and not after it."""
    mask = document_mask(torch.tensor([[0, 1, 0, 1]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "changes", [{}, {"position": "none"}, {"num_kv_heads": 1, "qk_norm": True}, {"activation_checkpointing": True}]
)
def test_packed_documents_are_documents_one_by_one(implementation: str, changes: dict[str, Any]) -> None:
    """Logits and gradients of two rows of documents are those of each document in a forward pass of its own."""
    torch.manual_seed(0)
    model = TransformerLM(**SIZES, attention=implementation, **changes)
    rows = [ROW, [SEPARATOR, *ROW[:-1]]]
    ids = torch.tensor(rows)
    expected = torch.stack([_alone(model, row) for row in rows])
    found = model(ids, document_positions=document_positions(ids, SEPARATOR))
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    grad = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, weights, grad), torch.autograd.grad(expected, weights, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # sums in another order
    assert not torch.allclose(found, model(ids))


def test_plain_forms_and_bfloat16_agree() -> None:
    """Nothing handed over, or autocast to bfloat16, gives the same logits, within the precision."""
    torch.manual_seed(0)
    model, ids = TransformerLM(**SIZES), torch.tensor([ROW])
    positions = document_positions(ids, SEPARATOR)
    expected = model(ids, document_positions=positions)
    with plain_forms():
        torch.testing.assert_close(model(ids, document_positions=positions), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(ids, document_positions=positions).float(), expected, rtol=0.05, atol=0.05)


def test_attention_that_drops_keeps_to_documents() -> None:
    """With dropout of attention's probabilities a document's logits do not depend on the document before it."""
    torch.manual_seed(0)
    model = TransformerLM(**SIZES, dropout={"attention": 0.5})
    keys = torch.randint(-(2**31), 2**31, (7, 1, 2), dtype=torch.int32)
    ids = torch.tensor([ROW, [2, 2, *ROW[2:]]])
    one, other = (
        model(row[None], document_positions=document_positions(row[None], SEPARATOR), dropout_keys=keys) for row in ids
    )
    torch.testing.assert_close(one[:, 2:], other[:, 2:])
    assert not torch.allclose(one[:, :2], other[:, :2])


def test_training_must_say_where_documents_are() -> None:
    """A model with document_mask does not train without positions, evaluates without, and takes no cache with them."""
    model, ids = TransformerLM(**SIZES, document_mask=True), torch.tensor([ROW])
    with pytest.raises(ValueError, match="expected document_positions, as the model has document_mask"):
        model(ids)
    model.eval()(ids)
    with pytest.raises(ValueError, match="expected document_positions or a cache, got both"):
        model(ids, document_positions=torch.zeros_like(ids), cache=model.make_cache(1))


@pytest.mark.slow
def test_it_compiles() -> None:
    """A compiled model gives the same logits, without a break in its graph."""
    torch.manual_seed(0)
    model, ids = TransformerLM(**SIZES), torch.tensor([ROW])
    positions = document_positions(ids, SEPARATOR)
    expected = model(ids, document_positions=positions)
    torch._dynamo.reset()  # other tests have compiled models of other shapes, and there is a limit
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids, document_positions=positions), expected)
