"""The card of an exported model says what is known about it, and omits what is not."""

from __future__ import annotations

import json

import pytest

from tests.interop.models import make_checkpoint
from transformerlm.checkpoints.load import load_config_of
from transformerlm.checkpoints.validation import read_state
from transformerlm.interop.model_card import CardNotes, model_card


@pytest.fixture
def checkpoint(files, tmp_path):
    """Return the checkpoint of a run whose token files exist."""
    return make_checkpoint(tmp_path, files)


def test_nobody_guesses_a_license_or_a_language(checkpoint):
    """The front matter names both if they are given, and otherwise neither."""
    bare = model_card(checkpoint, name="kids").split("---")[1]
    full = model_card(checkpoint, name="kids", notes=CardNotes(license="mit", languages=["en", "no"])).split("---")[1]
    assert "license" not in bare
    assert "language" not in bare
    assert 'license: "mit"\nlanguage:\n- "en"\n- "no"\ntags:\n' in full  # YAML reads a bare no as false


def test_the_code_names_the_model_itself(checkpoint):
    """The example opens the directory by its name, and not a path that nobody has."""
    card = model_card(checkpoint, name="kids")
    assert 'path = "kids"' in card
    assert "path/to" not in card


def test_a_sample_stays_in_its_fence(checkpoint):
    """A text with backticks gets a longer fence, and without notes there is neither a sample nor a picture."""
    notes = CardNotes(sample="\nlook:\n````\n| a\n", sample_settings="Written with seed = 0:", picture="loss.svg")
    card = model_card(checkpoint, name="kids", notes=notes)
    assert "Written with seed = 0:\n\n`````text\nlook:\n````\n| a\n`````\n" in card
    assert "![The loss over the steps](loss.svg)" in card
    bare = model_card(checkpoint, name="kids")
    assert "## A sample" not in bare
    assert "## Loss" not in bare


def test_the_text_is_named_only_where_it_is_the_one_that_was_trained_on(checkpoint, files, monkeypatch):
    """The sidecar names the text and its bytes per token; that of another token file is ignored."""
    sidecar = json.loads(load_config_of(checkpoint).data.train.with_suffix(".json").read_text())
    state = read_state(checkpoint)
    for sha256, dataset in ((sidecar["sha256"], files.text.name), ("0" * 64, "train.npy")):
        data = {"data": {"train_sha256": sha256}}
        monkeypatch.setattr("transformerlm.interop.model_card.read_state", lambda _, data=data: {**state, **data})
        card = model_card(checkpoint, name="kids")
        assert f"| dataset | {dataset} |" in card
        assert ("| bytes per token | " in card) == (dataset == files.text.name)
        assert str(files.text.parent) not in card


def test_the_tokenizer_is_described(checkpoint):
    """Its size, pattern and special tokens are facts of the card."""
    card = model_card(checkpoint, name="kids")
    assert "tokens, pattern gpt2 |" in card
    assert r"| special tokens | `<\|endoftext\|>` |" in card
