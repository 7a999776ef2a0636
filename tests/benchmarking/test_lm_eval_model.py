"""Tests of our model in the lm-evaluation-harness, which they need: each answer is compared with an independent one."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.training.tiny_run import tiny_config, write_tiny_files

pytest.importorskip("lm_eval", reason="needs the extra eval")

pytestmark = pytest.mark.slow  # importing the harness takes long
CONTEXT = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the harness's model of a short run."""
    from benchmarking.lm_eval_model import HarnessModel
    from cli.train import train

    folder = tmp_path_factory.mktemp("run")
    train(tiny_config(write_tiny_files(folder), folder, {"training.max_steps": 60, "optimizer.learning_rate": 1e-2}))
    return HarnessModel(str(folder / "run"), device="cpu", batch_size=3)


def requests(*arguments):
    """Return requests like those of the harness."""
    return [SimpleNamespace(args=one) for one in arguments]


def naive(model, ids: list[int], first: int) -> tuple[float, bool]:
    """Return the log-likelihood of ids[first:] token by token, with the fullest context, and whether it is greedy."""
    total, greedy = 0.0, True
    for place in range(first, len(ids)):
        with torch.no_grad():
            logits = model._model(torch.tensor([ids[max(0, place - CONTEXT) : place]]))[0, -1]
        total += torch.log_softmax(logits, dim=-1)[ids[place]].item()
        greedy &= int(logits.argmax()) == ids[place]
    return total, greedy


def test_a_continuation_is_scored_given_its_context(model):
    """Likelihoods and greediness are those of a loop, for short contexts, empty ones, and those that end in blanks."""
    pairs = [("Ada sees", " the sea."), ("", "Bob"), ("Zoë finds ", "two"), ("Ada", " xyz")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), answer in zip(pairs, found, strict=True):
        whole = model.tok_encode(context + continuation) if context else [model.eot_token_id, *model.tok_encode("Bob")]
        first = len(model.tok_encode(context.rstrip())) if context else 1
        expected = naive(model, whole, first)
        assert answer == (pytest.approx(expected[0], rel=1e-4), expected[1])


def naive_from(model, ids: list[int], starts: list[int]) -> float:
    """Return the log-likelihood of all ids but the first; the model reads each from the place in `starts` on."""
    places = zip(starts, range(1, len(ids)), strict=True)
    return sum(naive(model, ids[start : place + 1], place - start)[0] for start, place in places)


def test_of_a_long_context_the_end_is_read(model):
    """A context beyond the model's gives what its last tokens give."""
    context, target = model.tok_encode("Ada sees the sea. " * 10), model.tok_encode(" Bob likes")
    (answer,) = model._loglikelihood_tokens([(("", ""), context, target)])
    room = CONTEXT + 1 - len(target)
    with torch.no_grad():
        logits = model._model(torch.tensor([(context[-room:] + target)[:-1]]))[0]
    expected = torch.log_softmax(logits, dim=-1)[-len(target) :].gather(1, torch.tensor(target)[:, None]).sum()
    assert answer[0] == pytest.approx(expected.item(), rel=1e-4)


def test_a_continuation_longer_than_the_context_is_scored_whole(model):
    """No token of it is omitted."""
    target = model.tok_encode("Ada sees the sea. " * 6)
    assert len(target) > 2 * CONTEXT
    (answer,) = model._loglikelihood_tokens([(("", ""), [model.eot_token_id], target)])
    # The first window reads a whole context; each one after it begins half a context further.
    half = CONTEXT // 2
    starts = [max(0, -((CONTEXT - place) // half)) * half for place in range(1, len(target) + 1)]
    assert starts[CONTEXT - 1 : CONTEXT + 2] == [0, half, half]
    assert answer[0] == pytest.approx(naive_from(model, [model.eot_token_id, *target], starts), rel=1e-6)


def test_rolling_is_the_loop_where_the_text_fits_the_context(model):
    """A short text costs what the loop says, a long one the sum over all of the harness's windows."""
    short, long = "Ada sees the sea.", "Bob likes a tree.\n" * 8
    assert len(model.tok_encode(short)) <= CONTEXT < len(model.tok_encode(long))
    found = model.loglikelihood_rolling(requests((short,), (long,), ("",)))
    assert found[0] == pytest.approx(naive(model, [model.eot_token_id, *model.tok_encode(short)], 1)[0], rel=1e-4)
    ids = model.tok_encode(long)
    # The harness's windows follow each other; the last one begins earlier, so that it is full.
    starts = [min((place - 1) // CONTEXT * CONTEXT, len(ids) - CONTEXT) for place in range(1, len(ids) + 1)]
    assert found[1] == pytest.approx(naive_from(model, [model.eot_token_id, *ids], starts), rel=1e-6)
    assert found[2] == 0


def test_the_token_before_each_text_is_read(model, monkeypatch):
    """As in Llama 3, a context begins with it, once; so do a text's windows, and an empty context is it alone."""
    start, plain = model.prefix_token_id, model.tok_encode("Ada sees")
    monkeypatch.setattr(model._predictor, "document_ids", replace(model._predictor.document_ids, starts_texts=True))
    assert model.tok_encode("Ada sees") == model.tok_encode("<|endoftext|>Ada sees") == [start, *plain]
    assert model.tok_encode("Ada sees", add_special_tokens=False) == plain
    whole = model.tok_encode("Ada sees the sea.")
    found = model.loglikelihood(requests(("Ada sees", " the sea."), ("", "Ada sees")), disable_tqdm=True)
    expected = [naive(model, whole, 1 + len(plain)), naive(model, [start, *plain], 1)]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-4)
    assert model.loglikelihood_rolling(requests(("Ada sees the sea.",))) == [
        pytest.approx(naive(model, whole, 1)[0], rel=1e-4)
    ]


def test_generation_ends_at_a_stop_text(model):
    """The text is the model's greedy one, up to the first of the stop texts, or to the number of tokens."""
    (whole,) = model.generate_until(requests(("Ada sees", {"max_gen_toks": 20, "until": []})))
    assert whole == model._predictor.generate("Ada sees", max_new_tokens=20, temperature=0.0)[len("Ada sees") :]
    off = {"max_gen_toks": 20, "do_sample": False, "top_k": 0}  # as Hugging Face's generate spells "no top-k"
    assert model.generate_until(requests(("Ada sees", off))) == [whole]
    stop = whole[3:5]
    found = model.generate_until(
        requests(*[("Ada sees", {"max_gen_toks": 20, "until": until}) for until in (stop, ["never", stop])])
    )
    assert found == [whole[: whole.index(stop)]] * 2


def test_sampling_is_done_where_it_is_asked_for(model):
    """With do_sample and a temperature texts differ; without do_sample a temperature changes nothing."""
    hot = {"max_gen_toks": 20, "temperature": 5.0}
    greedy, first, second = model.generate_until(
        requests(("Ada", {**hot, "do_sample": False}), *[("Ada", {**hot, "do_sample": True})] * 2)
    )
    assert greedy == model._predictor.generate("Ada", max_new_tokens=20, temperature=0.0)[3:]
    assert first != second


def test_the_harness_knows_it_by_name(model):
    """The registry returns our class, also from a string of arguments."""
    from lm_eval.api.registry import get_model

    assert get_model("transformerlm") is type(model)


@pytest.fixture(scope="module")
def peer(model):
    """Return the harness's own model of transformers with the same weights and tokenizer."""
    pytest.importorskip("accelerate", reason="needs lm-eval[hf]")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarking.peers.llama import build_llama, copy_weights

    hparams = model._model.hparams()
    llama = build_llama(hparams)
    copy_weights(llama, model._model.state_dict(), hparams)
    with tempfile.TemporaryDirectory() as folder:
        model._tokenizer.save(folder)
        tokenizer = Tokenizer(models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    return HFLM(pretrained=llama.eval(), tokenizer=fast, max_length=CONTEXT, batch_size=2)


def test_answers_are_those_of_the_harness_for_transformers(model, peer):
    """With the same weights every likelihood is that of the harness's own model, also for long texts and contexts."""
    pairs = [("Ada sees", " the sea."), ("", "Bob likes"), ("Zoë finds ", "two 🍎."), ("Ada sees the sea. " * 9, "Bob")]
    texts = [("Ada sees the sea.",), ("Bob likes a tree.\n" * 8,), ("漢字 " * 30,)]
    theirs = peer.loglikelihood(requests(*pairs), disable_tqdm=True)
    their_rolling = peer.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    ours = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], rel=1e-4)
    assert model.loglikelihood_rolling(requests(*texts)) == pytest.approx(their_rolling, rel=1e-4)
