"""Tests of scoring: against a loop over tokens, against the trainer's validation, and by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.helpers import CONTEXT, VOCAB_SIZE, random_documents, tiny_model
from transformerlm.evaluation.documents import Documents
from transformerlm.evaluation.scoring import Windowing, cut_windows, score_documents
from transformerlm.training.data import sequential_batches
from transformerlm.training.loop import evaluate
from transformerlm.utils.dtypes import autocast

MODES = pytest.mark.parametrize("mode", ["documents", "sliding"])
LENGTHS = (3, 1, 30, 8, 7, 9, 17)


def naive_nats(model, stream, *, context_length=CONTEXT) -> list[float]:
    """Return the nats of each id of a stream after the first, each from a forward pass of its own."""
    nats = []
    for place in range(1, len(stream)):
        before = torch.tensor([stream[max(0, place - context_length) : place].tolist()])
        with torch.no_grad():
            nats.append(-torch.log_softmax(model(before)[0, -1], dim=-1)[stream[place]].item())
    return nats


def texts_of(documents: Documents) -> list[np.ndarray]:
    """Return each document's ids."""
    return np.split(documents.ids, documents.ends[:-1])


def test_stride_one_is_the_loop_over_tokens_in_sliding_mode():
    """With stride 1 each token of the stream costs what a forward pass over the context before it says."""
    model, documents = tiny_model(), random_documents(*LENGTHS)
    scores = score_documents(model, documents, mode="sliding", windowing=Windowing(stride=1, batch_size=5))
    stream = np.concatenate([[0], *[np.append(text, 0) for text in texts_of(documents)]])
    naive = np.split(naive_nats(model, stream), np.cumsum(np.array(LENGTHS) + 1)[:-1])
    assert scores.nats == pytest.approx([part.sum() for part in naive], rel=1e-12)
    assert scores.tokens.tolist() == [length + 1 for length in LENGTHS]


def test_stride_one_is_the_loop_over_tokens_in_document_mode():
    """With stride 1 each document costs the same as alone, token by token, behind the separator."""
    model, documents = tiny_model(), random_documents(*LENGTHS)
    scores = score_documents(model, documents, mode="documents", windowing=Windowing(stride=1))
    naive = [sum(naive_nats(model, np.insert(text, 0, 0))) for text in texts_of(documents)]
    assert scores.nats == pytest.approx(naive, rel=1e-12)
    assert scores.tokens.tolist() == list(LENGTHS)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stride_of_the_context_gives_the_validation_loss_of_training(batch_size):
    """On a stream of whole windows, loss and bits per byte are those of the trainer's validation on the same ids."""
    model, documents = tiny_model(), random_documents(20, 13, 4)  # with 4 separators: 41 ids, 5 windows
    windowing = Windowing(stride=CONTEXT, batch_size=batch_size)
    scores = score_documents(model, documents, mode="sliding", windowing=windowing)
    stream = np.insert(documents.ids, np.r_[0, documents.ends], 0)
    assert len(stream) == 5 * CONTEXT + 1
    batches = sequential_batches(stream, batch_size=batch_size, context_length=CONTEXT)
    token_bytes = torch.tensor([0] + [3] * (VOCAB_SIZE - 1))
    validated = evaluate(model, batches, token_bytes=token_bytes, autocast=partial(autocast, "cpu", "fp32"))
    assert scores.nats.sum() / scores.tokens.sum() == pytest.approx(validated.loss, rel=1e-12)
    assert scores.nats.sum() / scores.num_bytes.sum() / math.log(2) == pytest.approx(validated.bits_per_byte, rel=1e-12)


@MODES
@pytest.mark.parametrize("stride", [1, 3, CONTEXT])
def test_the_batch_size_changes_nothing(mode, stride):
    """Windows computed one by one, by threes or all at once give the same cost."""
    model, documents = tiny_model(), random_documents(*LENGTHS)
    one, three, many = (
        score_documents(model, documents, mode=mode, windowing=Windowing(stride=stride, batch_size=size))
        for size in (1, 3, 100)
    )
    assert one.nats == pytest.approx(three.nats, rel=1e-12)
    assert one.nats == pytest.approx(many.nats, rel=1e-12)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    context_length=st.integers(1, 12),
    stride=st.integers(1, 12),
)
@settings(max_examples=100, deadline=None)
def test_each_token_is_scored_once_with_enough_before_it(lengths, context_length, stride):
    """Every id but the first of a stream is scored once, after at least context - stride of those that there are."""
    stride = min(stride, context_length)
    windows = cut_windows(np.array(lengths), context_length=context_length, stride=stride)
    offset = np.repeat(np.cumsum(lengths) - lengths, lengths)
    scored = np.zeros(sum(lengths), dtype=int)
    for start, end, scored_from in zip(*windows, strict=True):
        assert end - start <= context_length
        for place in range(scored_from + 1, end + 1):
            scored[place] += 1
            assert place - start >= min(place - offset[place], context_length - stride + 1)
            assert start >= offset[place]
    firsts = np.cumsum(lengths) - lengths
    assert scored[firsts].tolist() == [0] * len(lengths)
    assert np.delete(scored, firsts).tolist() == [1] * (sum(lengths) - len(lengths))


@MODES
@pytest.mark.parametrize("separator_id", [0, None])
def test_a_model_without_a_preference_costs_the_logarithm_of_its_vocabulary(mode, separator_id):
    """With logits of zero each token costs log(vocab_size), the first one without a separator before it as well."""
    model, documents = tiny_model(), random_documents(4, 20, separator_id=separator_id)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = score_documents(model, documents, mode=mode)
    separators = 1 if mode == "sliding" and separator_id is not None else 0
    assert scores.tokens.tolist() == [4 + separators, 20 + separators]
    assert scores.nats == pytest.approx(scores.tokens * math.log(VOCAB_SIZE), rel=1e-12)


def test_without_a_separator_nothing_stands_before_a_document():
    """Each document costs log(vocab_size) for its first token and the rest given that."""
    model, documents = tiny_model(), random_documents(5, 2, separator_id=None)
    scores = score_documents(model, documents, mode="documents", windowing=Windowing(stride=1))
    naive = [math.log(VOCAB_SIZE) + sum(naive_nats(model, text)) for text in texts_of(documents)]
    assert scores.nats == pytest.approx(naive, rel=1e-12)


def test_a_document_costs_the_same_in_any_company():
    """In mode documents the cost depends neither on the order nor on the other documents."""
    model, documents = tiny_model(), random_documents(*LENGTHS)
    together = score_documents(model, documents, mode="documents").nats
    for index, text in enumerate(texts_of(documents)):
        alone = Documents(text, np.array([len(text)]), np.array([1]), 0)
        assert score_documents(model, alone, mode="documents").nats == pytest.approx([together[index]], rel=1e-12)


def test_bf16_is_near_fp32():
    """Under bf16 autocast the loss differs by rounding only."""
    model, documents = tiny_model().float(), random_documents(*LENGTHS)
    exact, rounded = (
        score_documents(model, documents, mode="sliding", windowing=Windowing(autocast=partial(autocast, "cpu", name)))
        for name in ("fp32", "bf16")
    )
    assert rounded.nats.sum() == pytest.approx(exact.nats.sum(), rel=0.01)  # bf16 has 8 bits
    assert rounded.nats.tolist() != exact.nats.tolist()


@pytest.mark.parametrize(
    ("windowing", "message"),
    [
        (Windowing(context_length=CONTEXT + 1), "context_length: expected at most the model's 8, found 9"),
        (Windowing(context_length=4, stride=5), "stride: expected at most the context of 4 tokens, found 5"),
    ],
)
def test_windows_that_do_not_fit_the_model_are_refused(windowing, message):
    """A context beyond the model's, and a stride that would leave tokens out, are errors."""
    with pytest.raises(ValueError, match=message):
        score_documents(tiny_model(), random_documents(5), mode="documents", windowing=windowing)


def test_ids_beyond_the_models_vocabulary_are_refused():
    """A tokenizer with more ids than the model is an error that names both numbers."""
    with pytest.raises(ValueError, match=r"below the model's vocab_size 5, found \d+"):
        score_documents(tiny_model(vocab_size=5), random_documents(50), mode="documents")


def test_a_loss_that_is_not_finite_is_refused():
    """A model that gives NaN is an error, not a number."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="expected a finite loss, found nan"):
        score_documents(model, random_documents(5), mode="documents")
