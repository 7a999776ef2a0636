"""The chat format that a checkpoint keeps: how the conversations that it was trained on became ids.

make-data writes it into a token file's sidecar, and a run copies it from there into `state.json`. Whoever answers in
this format begins as training did, after the token that starts a document, and ends where an answer's `end` comes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from config.paths import is_utf8
from transformerlm.checkpoints.document_ids import DocumentIds
from transformerlm.checkpoints.validation import CheckpointError, read_state
from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer
from transformerlm.tokenizer.tokenizer import Tokenizer

KEY = "chat"
"""Its place in `state.json`."""


def chat_format_of(directory: Path) -> ChatFormat | None:
    """Return the format that the checkpoint records; None: it was not trained on conversations.

    Raises:
        CheckpointError: `state.json` is missing or damaged, or what it holds is not a format.
    """
    found = read_state(directory).get(KEY)
    if found is None:
        return None
    try:
        chat = ChatFormat.of(found)
        strings = [chat.system, chat.user, chat.assistant, chat.end, chat.after, *chat.special_tokens]
        if not all(isinstance(one, str) and is_utf8(one) for one in strings) or not chat.end:
            raise TypeError
    except (TypeError, AttributeError, ValueError):
        shown = str(found)[:80]
        raise CheckpointError(f"{directory}: expected a chat format in {KEY} of state.json, found {shown}") from None
    return chat


def renderer_of(directory: Path, tokenizer: Tokenizer, ids: DocumentIds) -> ChatRenderer | None:
    """Return what renders conversations as the checkpoint's training did; raises as `chat_format_of`."""
    chat = chat_format_of(directory)
    return None if chat is None else ChatRenderer(tokenizer, chat, start_id=ids.start_id)


def ids_with_chat(ids: DocumentIds, renderer: ChatRenderer) -> DocumentIds:
    """Return the ids of a model that chats: the token that ends an answer ends a text, too, after the first end."""
    first, rest = ids.eos_token_ids[:1], ids.eos_token_ids[1:]
    return replace(ids, eos_token_ids=tuple(dict.fromkeys([*first, *renderer.end_ids, *rest])))


def no_chat_format(path: Path) -> ValueError:
    """Return the error that says that a checkpoint has no chat format, and how to get one."""
    return ValueError(
        f"{path}: expected a model with a chat format, found one that was not trained on conversations; train it on "
        "some, as docs/documents.md says under Conversations, or give the strings around messages in [chat] of the "
        "TOML file"
    )
