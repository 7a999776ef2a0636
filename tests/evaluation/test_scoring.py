"""Scoring is compared with a loop over tokens, with the trainer's validation, and with results by hand."""

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
from transformerlm.evaluation.scoring import Scoring, Windowing, cut_windows, score_continuations, score_documents
from transformerlm.training.data import sequential_batches
from transformerlm.training.loop import evaluate
from transformerlm.training.reading import Reading
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


def nats_in_halves(model, stream) -> list[float]:
    """Return what `naive_nats` does, where all windows after the first begin half a context further each."""
    nats, half = [], CONTEXT // 2
    for place in range(1, len(stream)):
        start = max(0, math.ceil((place - CONTEXT) / half)) * half
        nats.append(naive_nats(model, stream[start : place + 1])[-1])
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
    """With stride 1 each document costs the same as by itself, token by token, after the separator."""
    model, documents = tiny_model(), random_documents(*LENGTHS)
    scores = score_documents(model, documents, mode="documents", windowing=Windowing(stride=1))
    naive = [sum(naive_nats(model, np.insert(text, 0, 0))) for text in texts_of(documents)]
    assert scores.nats == pytest.approx(naive, rel=1e-12)
    assert scores.tokens.tolist() == list(LENGTHS)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stride_of_the_context_gives_the_validation_loss_of_training(batch_size, document_mask):
    """On a stream of whole windows, loss and bits per byte are those of the trainer's validation on the same ids."""
    model = tiny_model(document_mask=document_mask)
    documents = random_documents(20, 13, 4)  # with 4 separators: 41 ids, 5 windows
    windowing = Windowing(stride=CONTEXT, batch_size=batch_size)
    scores = score_documents(model, documents, mode="sliding", windowing=windowing)
    stream = np.insert(documents.ids, np.r_[0, documents.ends], 0)
    assert len(stream) == 5 * CONTEXT + 1
    batches = sequential_batches(stream, batch_size=batch_size, context_length=CONTEXT)
    token_bytes = torch.tensor([0] + [3] * (VOCAB_SIZE - 1))
    settings = {"token_bytes": token_bytes, "autocast": partial(autocast, "cpu", "fp32")}
    validated = evaluate(model, batches, reading=Reading(0 if document_mask else None), **settings)
    assert scores.nats.sum() / scores.tokens.sum() == pytest.approx(validated.loss, rel=1e-12)
    assert scores.nats.sum() / scores.num_bytes.sum() / math.log(2) == pytest.approx(validated.bits_per_byte, rel=1e-12)


@MODES
@pytest.mark.parametrize("stride", [1, 3, CONTEXT])
def test_the_batch_size_changes_nothing(mode, stride):
    """Windows computed one by one, three at a time or all at once give the same cost."""
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
    """Every id except the first of a stream is scored once, after at least context - stride ids, or all there are."""
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
    """With logits of zero each token costs log(vocab_size), even a first token without a separator before it."""
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


def test_a_model_that_never_read_on_into_the_next_document_does_not_here():
    """With `document_mask` a document of a stream costs what it does by itself, and its end comes on top."""
    model, documents = tiny_model(document_mask=True), random_documents(3, 2, 1)  # the last id is in a second window
    stream = score_documents(model, documents, mode="sliding")
    with_ends = [np.r_[0, text, 0] for text in texts_of(documents)]
    assert stream.nats == pytest.approx([sum(naive_nats(model, text)) for text in with_ends], rel=1e-12)
    assert stream.nats.tolist() != score_documents(tiny_model(), documents, mode="sliding").nats.tolist()


def test_a_document_costs_the_same_in_any_company():
    """In mode documents the cost depends neither on the order nor on the other documents."""
    model, documents = tiny_model(), random_documents(*LENGTHS)
    together = score_documents(model, documents, mode="documents").nats
    for index, text in enumerate(texts_of(documents)):
        alone = Documents(text, np.array([len(text)]), np.array([1]), 0)
        assert score_documents(model, alone, mode="documents").nats == pytest.approx([together[index]], rel=1e-12)


def test_bf16_is_near_fp32():
    """Under bf16 autocast the loss differs only by rounding."""
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
    """A context beyond the model's, and a stride that would skip tokens, are errors."""
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


def test_greedy_means_every_token_of_the_continuation():
    """A continuation is greedy if each of its ids is the most likely after those before it, without exception."""
    model, ids = tiny_model(), [3, 5]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    likeliest = ids[2:]
    others = [[*likeliest[:place], (likeliest[place] + 1) % VOCAB_SIZE] for place in range(4)]
    changed = [[*other, *likeliest[len(other) :]] for other in others]
    found = score_continuations(model, [([3, 5], each) for each in (likeliest, *others, *changed)], Windowing())
    assert [greedy for _, greedy in found] == [True] + [False] * 8


def test_a_continuation_costs_what_a_loop_says():
    """In a batch of several the likelihood is that of a forward pass for each id, the context itself not counted."""
    model, requests = tiny_model(), [([1, 2], [3]), ([4], [5, 6, 7]), ([8, 9, 10, 11], [12, 13])]
    found = score_continuations(model, requests, Windowing(batch_size=2))
    for (context, continuation), (likelihood, _) in zip(requests, found, strict=True):
        nats = naive_nats(model, np.array([*context, *continuation]))
        assert likelihood == pytest.approx(-sum(nats[len(context) - 1 :]), rel=1e-12)


def test_of_a_context_that_is_too_long_the_end_is_read():
    """As many ids as fit come before the continuation's last one, and earlier ids do not count."""
    model, continuation = tiny_model(), [4, 9]
    long = np.random.default_rng(0).integers(1, VOCAB_SIZE, size=3 * CONTEXT).tolist()
    whole = [*long[-(CONTEXT + 1 - len(continuation)) :], *continuation]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([whole[:-1]]))[0], dim=-1)
    expected = sum(logs[place, token_id].item() for place, token_id in ((-2, 4), (-1, 9)))
    ((likelihood, _),) = score_continuations(model, [(long, continuation)], Windowing())
    assert likelihood == pytest.approx(expected, rel=1e-12)


def test_a_continuation_longer_than_the_context_is_scored_whole():
    """Each of its ids costs something, and no request gives no answer."""
    model = tiny_model()
    continuation = np.random.default_rng(1).integers(1, VOCAB_SIZE, size=2 * CONTEXT + 3).tolist()
    ((likelihood, _),) = score_continuations(model, [([1], continuation)], Windowing())
    assert likelihood == pytest.approx(-sum(nats_in_halves(model, np.array([1, *continuation]))), rel=1e-6)
    assert score_continuations(model, [], Windowing()) == []


def test_a_document_may_start_with_another_id_than_the_one_that_ends_it():
    """By itself it follows `start_id`; in a stream of all, it follows the end of the one before."""
    model, plain = tiny_model(), random_documents(4, 6)
    documents = Documents(plain.ids, plain.ends, plain.num_bytes, separator_id=0, start_id=22)
    alone = score_documents(model, documents, mode="documents", windowing=Windowing(stride=1))
    naive = [sum(naive_nats(model, np.insert(text.astype(int), 0, 22))) for text in texts_of(documents)]
    assert alone.nats == pytest.approx(naive, rel=1e-12)
    streams = [score_documents(model, each, mode="sliding").nats.tolist() for each in (documents, plain)]
    assert streams[0] == streams[1]


@MODES
@pytest.mark.parametrize("separator_id", [0, None])
def test_a_text_that_is_read_in_part_costs_what_has_been_read(mode, separator_id):
    """After each batch a document counts up to where it was read, token by token; at the end all of it does."""
    model, documents = tiny_model(), random_documents(*LENGTHS, separator_id=separator_id)
    windowing = Windowing(stride=1, batch_size=5)
    scoring, read = Scoring(model, documents, mode=mode, windowing=windowing), []
    stream = np.concatenate([[0], *[np.append(text, 0) for text in texts_of(documents)]])
    while not scoring.is_done:
        scoring.advance()
        scores, reached = scoring.scores(), scoring.reached()
        assert len(scores.nats) == np.count_nonzero(reached)
        assert scores.num_bytes.tolist() == reached[reached > 0].tolist()
        assert scoring.num_tokens[0] == scores.tokens.sum() == pytest.approx(scores.num_bytes.sum() / 3, abs=7)
        read.append(scores.nats.sum())
        if mode == "sliding" and separator_id == 0:
            naive = naive_nats(model, stream[: 1 + scoring.num_tokens[0]])
            assert scores.nats.sum() == pytest.approx(sum(naive), rel=1e-12)
    assert sorted(read) == read
    assert scoring.scores().nats == pytest.approx(score_documents(model, documents, mode=mode).nats, rel=0.2)
    assert scoring.reached().tolist() == documents.num_bytes.tolist()
    assert scoring.num_tokens[0] == scoring.num_tokens[1]


def test_a_part_of_a_document_costs_what_it_does_alone():
    """Of a text with one document the start has been read, and a cut of it costs the same as a shorter text."""
    model, documents = tiny_model(), random_documents(100)
    scoring = Scoring(model, documents, mode="documents", windowing=Windowing(batch_size=2))
    for _ in range(4):
        scoring.advance()
    (read,) = scoring.reached() // 3
    assert 0 < read < 100
    for length in (read, read - 5):
        alone = random_documents(100).take(np.array([0]))
        alone = Documents(alone.ids[:length], np.array([length]), np.array([3 * length]), 0)
        scores = scoring.scores(np.array([3 * length]))
        assert scores.nats == pytest.approx(score_documents(model, alone, mode="documents").nats, rel=1e-9)
        assert (scores.tokens.tolist(), scores.num_bytes.tolist()) == ([length], [3 * length])


def test_documents_are_read_in_an_order_of_chance():
    """One seed is one order, whatever the model; windows are sorted by length, but only within some batches."""
    documents = random_documents(*[9] * 400)

    def begun(seed, model_seed=0):
        scoring = Scoring(tiny_model(seed=model_seed), documents, mode="documents", seed=seed)
        for _ in range(3):
            scoring.advance()
        return np.flatnonzero(scoring.reached()).tolist()

    assert begun(0) == begun(0, model_seed=1) != begun(1)
    assert np.mean(begun(0)) > 60  # the first come no sooner than the last


def test_a_part_is_no_sample_of_the_longest():
    """Within a block the longest documents come first, so those of a block that is not whole do not count."""
    lengths = np.random.default_rng(1).integers(1, 8, size=60).tolist()  # a window each
    scoring = Scoring(tiny_model(), random_documents(*lengths), mode="documents", windowing=Windowing(batch_size=1))
    counts = []
    while not scoring.is_done:
        scoring.advance()
        counts.append(int(np.count_nonzero(scoring.reached())))
    assert counts == [*range(1, 17), *[16] * 15, *[32] * 16, *[48] * 12, 60]


def test_a_token_that_is_cut_costs_in_proportion():
    """Two models with other tokens are compared at the same byte, which may be within a token of one."""
    scoring = Scoring(tiny_model(), random_documents(20), mode="documents")
    while not scoring.is_done:
        scoring.advance()
    costs = [float(scoring.scores(np.array([size])).nats[0]) for size in (15, 16, 17, 18)]
    assert costs == pytest.approx(np.linspace(costs[0], costs[3], 4), rel=1e-12)
    assert costs[0] < costs[3]


def test_where_the_bytes_of_ids_are_not_known_whole_documents_count():
    """Documents that a program builds itself may lack them."""
    plain = random_documents(*LENGTHS)
    documents = Documents(plain.ids, plain.ends, plain.num_bytes, 0)
    scoring = Scoring(tiny_model(), documents, mode="sliding", windowing=Windowing(batch_size=1))
    reached = []
    while not scoring.is_done:
        scoring.advance()
        reached.append(scoring.scores().num_bytes.tolist())
    assert {tuple(each) for each in reached} == {tuple(3 * n for n in LENGTHS[:k]) for k in range(2, 8)}
