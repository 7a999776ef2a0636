"""The four files of docs/tour compute what the product computes, and docs/tour.md shows what they print."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from databuilder.dataset_builder import build_dataset
from tests.test_docs import blocks
from tests.training.test_trainer import train as train_product
from tests.training.tiny_run import END, VOCAB_SIZE, step_lines, tiny_config, write_tiny_files
from transformerlm import Tokenizer, TransformerLM, generate, train_bpe
from transformerlm.training.data import get_batch
from transformerlm.training.loss import cross_entropy
from transformerlm.training.optim import AdamW, clip_grad_norm, parameter_groups
from transformerlm.training.schedule import learning_rate

ROOT = Path(__file__).parents[1]
TOUR, PAGE = ROOT / "docs/tour", ROOT / "docs/tour.md"
FILES = ("bpe", "transformer", "train", "generate")
SIZES = {"vocab_size": VOCAB_SIZE, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64}
CONTEXT_LENGTH = 16
HELD_BY_ROUNDING = 1e-5


@pytest.fixture(scope="module", autouse=True)
def tour():
    """Let the four files import each other by their names, as they do when they are run, and leave no trace."""
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOUR)
        for name in FILES:
            patch.delitem(sys.modules, name, raising=False)
        yield
        for name in FILES:
            sys.modules.pop(name, None)
    torch.set_num_threads(num_threads)


def module(name: str):
    """Return one of the four as a module."""
    found = importlib.import_module(name)
    assert Path(found.__file__).parent == TOUR
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Thirty kilobytes of real text, with other letters than English ones."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    page = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    path.write_text(f"{page} Zoë naïve 🍎🍎 \n\n  1,234 don't aaaaaaa", encoding="utf-8")
    return path


def product_model(seed: int = 0):
    """Return the product's model with the initial weights of a seed."""
    torch.manual_seed(seed)
    return TransformerLM(**SIZES, context_length=CONTEXT_LENGTH)


@pytest.mark.parametrize("name", FILES)
def test_a_file_fits_on_a_page(name):
    """Each has at most 100 lines, and imports nothing of the product."""
    source = (TOUR / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.M))
    assert imported <= {*FILES, "collections", "itertools", "math", "numpy", "regex", "torch", "typing"}


# --- bpe.py ------------------------------------------------------------------------------------------------------


def test_bpe_learns_the_merges_of_the_product(text):
    """On real text, in the same order; the vocabulary is the same, too."""
    vocab, merges = train_bpe(text, 256 + 150, [])
    content = text.read_text(encoding="utf-8")
    assert module("bpe").learn(content, 150) == merges
    assert module("bpe").vocabulary(merges) == [vocab[token_id] for token_id in range(len(vocab))]


def test_bpe_stops_where_no_pair_is_left(tmp_path):
    """A text of one word has few merges; the product finds the same ones."""
    path = tmp_path / "text.txt"
    path.write_text("banana banana", encoding="utf-8")
    merges = train_bpe(path, 400, [])[1]
    assert module("bpe").learn("banana banana", 1000) == merges
    assert module("bpe").learn("", 10) == []


def test_bpe_encodes_and_decodes_as_the_product(text):
    """The same ids for text that it learned from and for text that it did not, and the text again."""
    vocab, merges = train_bpe(text, 256 + 150, [])
    tokenizer, content = Tokenizer(vocab, merges), text.read_text(encoding="utf-8")
    for some in (content, module("bpe").TEXT, "", " ", "Ünïcödé 🍎  \n\t x"):
        ids = module("bpe").encode(some, merges)
        assert ids == tokenizer.encode(some)
        assert module("bpe").decode(ids, merges) == some
    assert module("bpe").decode([255, 65], merges) == tokenizer.decode([255, 65]) == "\ufffdA"


# --- transformer.py ----------------------------------------------------------------------------------------------


def test_the_transformer_begins_with_the_weights_of_the_product():
    """The same names and, with the same seed, the same numbers."""
    expected = product_model(seed=3).state_dict()
    torch.manual_seed(3)
    weights = module("transformer").Transformer(**SIZES).state_dict()
    assert sorted(weights) == sorted(expected)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


def test_the_transformer_has_the_logits_of_the_product():
    """With the product's weights, at every position of a batch."""
    product, model = product_model().eval(), module("transformer").Transformer(**SIZES)
    model.load_state_dict(product.state_dict())
    ids = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids), product(ids), rtol=HELD_BY_ROUNDING, atol=1e-5)


def test_a_token_does_not_see_those_after_it():
    """The logits after the first ids stay as they are when later ids change."""
    model, ids = module("transformer").Transformer(**SIZES), torch.arange(8).unsqueeze(0)
    changed = torch.cat((ids[:, :5], ids[:, 5:] + 1), dim=1)
    torch.testing.assert_close(model(ids)[:, :5], model(changed)[:, :5])


# --- train.py ----------------------------------------------------------------------------------------------------


def test_the_batches_are_those_of_the_product():
    """The same windows for a seed and a step."""
    ids = list(range(100))
    for step in (1, 2, 77):
        expected = get_batch(np.array(ids, np.uint16), batch_size=5, context_length=7, seed=4, step=step)
        found = module("train").get_batch(ids, step, batch_size=5, context_length=7, seed=4)
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]


def test_the_loss_and_the_schedule_are_those_of_the_product():
    """Cross-entropy on large logits, and the rate at every step."""
    logits, targets = 100 * torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    torch.testing.assert_close(module("train").cross_entropy(logits, targets), cross_entropy(logits, targets))
    for step in range(1, 21):
        found = module("train").learning_rate(step, peak=0.3, lowest=0.01, warmup_steps=5, max_steps=20)
        settings = {"learning_rate": 0.3, "min_learning_rate": 0.01, "warmup_steps": 5, "max_steps": 20}
        assert found == pytest.approx(learning_rate(step, name="cosine", **settings))


def test_the_optimizer_takes_the_steps_of_the_product():
    """AdamW after clipping, elementwise, for a model whose gradients change from step to step."""
    torch.manual_seed(0)
    ours, theirs = module("transformer").Transformer(**SIZES), module("transformer").Transformer(**SIZES)
    theirs.load_state_dict(ours.state_dict())
    params = list(ours.parameters())
    optimizer = module("train").AdamW(params)
    expected = AdamW(parameter_groups(theirs, weight_decay=0.1), lr=0.01, betas=(0.9, 0.95))
    for step in range(5):
        for one, other in zip(params, theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one) * 10.0 ** (step - 3)  # too small to be clipped at first
            other.grad = one.grad.clone()
        module("train").clip_gradients(params)
        clip_grad_norm(theirs.parameters(), 1.0)
        optimizer.step(0.01)
        expected.step()
    for one, other in zip(params, theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=HELD_BY_ROUNDING, atol=1e-6)


def test_the_loop_has_the_losses_of_a_run_of_the_product(tmp_path):
    """transformerlm-train on a token file, and the loop on the ids in it: step by step the same."""
    files = write_tiny_files(tmp_path)
    changes = {"optimizer.learning_rate": 3e-3, "schedule.min_learning_rate": 1e-4, "checkpoint.interval": 0}
    train_product(tiny_config(files, tmp_path, changes))
    torch.manual_seed(1)
    losses = module("train").train(
        module("transformer").Transformer(**SIZES),
        np.load(files.train).tolist(),
        batch={"batch_size": 8, "context_length": CONTEXT_LENGTH, "seed": 1},
        schedule={"peak": 3e-3, "lowest": 1e-4, "warmup_steps": 3, "max_steps": 12},
    )
    expected = [line["metrics.loss"] for line in step_lines(tmp_path / "run")]
    assert list(losses) == pytest.approx(expected, rel=HELD_BY_ROUNDING)


# --- generate.py -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"top_p": 0.9},
        {"top_p": 0.0},
        {"min_p": 0.05},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
def test_the_ids_are_those_of_the_product(settings):
    """Greedy ones, and drawn ones for a seed, past the end of the context and from a prompt that is too long."""
    product, model = product_model(seed=5).eval(), module("transformer").Transformer(**SIZES)
    model.load_state_dict(product.state_dict())
    for prompt in ([1, 2, 3], list(range(40))):
        expected = generate(product, prompt, max_new_tokens=40, generator=torch.Generator().manual_seed(9), **settings)
        ids = module("generate").generate(model, prompt, context_length=CONTEXT_LENGTH, seed=9, **settings)
        assert list(islice(ids, 40)) == expected


# --- as programs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_as_a_program(name, capsys):
    """Without any argument, file or network it prints some lines, which end with a result."""
    expected = {
        "bpe": r"'The', ' fox', ' sat', ' in', ' the', ' b', 'ox', '\.'\]$",
        "transformer": r"^token_embeddings\.weight +\(276, 32\)$",
        "train": r"^step 100  loss 0\.\d+$",
        "generate": r"^\{'temperature': 0\.0\} ' sat in the sun\. The sun went down,'$",
    }
    runpy.run_path(str(TOUR / f"{name}.py"), run_name="__main__")
    assert re.search(expected[name], capsys.readouterr().out, flags=re.M)


# --- tour.md -----------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"\d+\.\d+")


class Roughly(doctest.OutputChecker):
    """Finds what the page says where all but the fractions is equal, and these are nearly: a CPU rounds as it likes."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        """Return whether `got` is what the page says."""
        expected, found = ([float(number) for number in NUMBER.findall(some)] for some in (want, got))
        same = " ".join(NUMBER.sub("#", want).split()) == " ".join(NUMBER.sub("#", got).split())
        return same and found == pytest.approx(expected, rel=0.02, abs=0.01)


def test_the_page_shows_what_its_lines_print():
    """Each line after `>>>` gives what is below it, in the order of the page."""
    shown = [block.text for block in blocks(PAGE) if block.language == "pycon"]
    session = "".join(shown).replace("$ cd docs/tour && python\n", "")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    failures: list[str] = []
    test = doctest.DocTestParser().get_doctest(session, {}, "tour.md", None, 0)
    results = doctest.DocTestRunner(Roughly(), verbose=False).run(test, out=failures.append)
    torch.set_num_threads(num_threads)
    assert results.attempted > 25
    assert not results.failed, "".join(failures)
    assert all(block.count("\n>>> ") < 10 for block in shown)


def test_the_numbers_in_the_sentences_are_true():
    """What the page says between its blocks and in its drawings is what the files compute."""
    bpe, page = module("bpe"), PAGE.read_text(encoding="utf-8")
    merges = bpe.learn(bpe.TEXT, bpe.NUM_MERGES)
    num_weights = sum(
        weight.numel() for weight in module("transformer").Transformer(**module("train").SIZES).parameters()
    )
    batch = module("train").BATCH
    shape = f"{batch['batch_size']} x {batch['context_length']}"
    assert f'["{" ".join(map(str, bpe.encode(bpe.SENTENCE, merges)))}"]' in page
    assert f"{shape} ids" in page
    assert f"{shape} x {len(bpe.vocabulary(merges))}" in page
    assert page.count(f"{num_weights:,} weights") == 2
    assert f"{len(bpe.TEXT)} characters" in page
    assert f"by {module('train').learning_rate(1, **module('train').SCHEDULE)}, the learning rate of step 1" in page


def test_the_page_quotes_the_files():
    """The lines of Python on the page are in the file that the line above them names, at most ten at a stop."""
    quoted = [block for block in blocks(PAGE) if block.language == "python"]
    assert len(quoted) >= 2
    for block in quoted:
        place = re.fullmatch(r"tests/test_tour\.py finds these lines in (docs/tour/\w+\.py)", block.why)[1]
        source = [line.strip() for line in (ROOT / place).read_text(encoding="utf-8").splitlines()]
        assert len(block.text.splitlines()) <= 10
        for part in block.text.strip().split("\n\n"):
            lines = [line.strip() for line in part.splitlines()]
            assert any(source[start : start + len(lines)] == lines for start in range(len(source))), part


def test_the_drawing_of_the_token_file_is_true(tmp_path):
    """The product writes the tour's text as a file of these sizes, with these ids and these facts beside it."""
    path, drawing = tmp_path / "text.txt", (ROOT / "docs/images/token-file.svg").read_text(encoding="utf-8")
    path.write_text(f"{module('bpe').TEXT}{END}", encoding="utf-8")
    tokenizer = Tokenizer(*train_bpe(path, 256 + module("bpe").NUM_MERGES + 1, [END]), [END])
    tokenizer.save(tmp_path / "tokenizer")
    build_dataset(path, tokenizer=tokenizer, train_path=tmp_path / "train.npy")
    ids = np.load(tmp_path / "train.npy").tolist()
    drawn = [int(number) for number in re.findall(r">(\d+)</text>", drawing)]
    assert drawn == ids[: len(drawn) - 3] + ids[-3:]
    assert f"train.npy, {(tmp_path / 'train.npy').stat().st_size} bytes" in drawing
    assert f"shape ({len(ids)},)" in drawing
    facts = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    for key in ("tokens", "dtype", "vocab_size", "bytes", "documents", "separator_id"):
        assert f"{key} {facts[key]}" in drawing
    for key in re.findall(r"\b(\w+_sha256)\b", drawing):
        assert key in facts
