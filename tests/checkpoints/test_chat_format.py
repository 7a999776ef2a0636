"""The chat format that a checkpoint keeps: read as it was written, refused where it is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.checkpoints.helpers import make_snapshot
from tests.training.chat_run import PLAIN
from transformerlm.checkpoints.chat_format import chat_format_of, ids_with_chat, renderer_of
from transformerlm.checkpoints.document_ids import DocumentIds
from transformerlm.checkpoints.save import save_checkpoint
from transformerlm.checkpoints.validation import CheckpointError
from transformerlm.tokenizer import Tokenizer
from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], SPECIALS)


def save(files, folder, state):
    """Save a tiny checkpoint with more in its state, and return its directory."""
    snapshot = make_snapshot(files)
    return save_checkpoint(folder, 1, replace(snapshot, state={**snapshot.state, **state}))


@pytest.mark.parametrize("chat", [ChatFormat(), PLAIN])
def test_a_format_reads_back(chat, files, tmp_path):
    """What a run wrote is what whoever answers reads; a checkpoint of text has none."""
    directory = save(files, tmp_path / "with", {"chat": chat.to_json()})
    assert chat_format_of(directory) == chat
    assert chat_format_of(save(files, tmp_path / "without", {})) is None


@pytest.mark.parametrize(
    "found", [5, "ChatML", [], {"user": 5}, {"end": ""}, {"usr": "x"}, {"special_tokens": [1]}, {"user": "\ud800"}]
)
def test_what_is_no_format_is_refused(found, files, tmp_path):
    """A stranger's state that holds something else is an error that names it."""
    directory = save(files, tmp_path, {"chat": found})
    with pytest.raises(CheckpointError, match=r"expected a chat format in chat of state\.json, found"):
        chat_format_of(directory)


def test_the_end_of_an_answer_ends_a_text(files, tmp_path):
    """It comes after the first end, where formats with room for two look; a string adds no id."""
    separator, end = (TOKENIZER.special_token_ids[one] for one in (SPECIALS[0], "<|im_end|>"))
    ids = DocumentIds(separator, (separator, 7))
    assert ids_with_chat(ids, ChatRenderer(TOKENIZER, ChatFormat())).eos_token_ids == (separator, end, 7)
    assert ids_with_chat(ids, ChatRenderer(TOKENIZER, PLAIN)) == ids
    directory = save(files, tmp_path, {"chat": PLAIN.to_json()})
    renderer = renderer_of(directory, TOKENIZER, ids)
    assert renderer is not None
    assert renderer.prompt([]).tolist() == [separator, *TOKENIZER.encode_ordinary(PLAIN.assistant)]
