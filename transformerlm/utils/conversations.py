"""Conversations in JSON lines: what a row must hold, checked where its file and line are known.

A row has a list of messages, each an object with a `role` and a `content`. Other keys are ignored.
"""

from __future__ import annotations

import json
from typing import NoReturn

from transformerlm.utils.json_files import json_kind
from transformerlm.utils.strings import replace_halves

ROLES = ("system", "user", "assistant")


def conversation_as_text(messages: object, *, where: str) -> tuple[str, int]:
    """Return checked messages as JSON, a list of pairs of role and content, and how many half characters it replaced.

    Raises:
        ValueError: no list of messages, none at all, a role that does not exist, a system message that is not the first
            one, or content that is no text; `where` and the message's number begin the error.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: expected a list of messages, found {json_kind(messages)}")
    pairs, replaced = [], 0
    for number, message in enumerate(messages, 1):
        role, content = _checked(message, number, f"{where}: message {number}")
        content, halves = replace_halves(content)
        pairs.append((role, content))
        replaced += halves
    return json.dumps(pairs, ensure_ascii=False), replaced


def _checked(message: object, number: int, where: str) -> tuple[str, str]:
    def refuse(expected: str, found: str) -> NoReturn:
        raise ValueError(f"{where}: expected {expected}, found {found}")

    if not isinstance(message, dict):
        refuse("an object with role and content", json_kind(message))
    for key in ("role", "content"):
        if key not in message:
            refuse(f"the key {key!r}", f"{[str(one)[:40] for one in list(message)[:8]]}")
        if not isinstance(message[key], str):
            refuse(f"text under {key!r}", json_kind(message[key]))
    if message["role"] not in ROLES:
        refuse(f"the role {', '.join(ROLES[:-1])} or {ROLES[-1]}", repr(message["role"][:40]))
    if message["role"] == "system" and number > 1:
        refuse("a system message at the beginning alone", f"one after {number - 1:,} other messages")
    return message["role"], message["content"]


def messages_of(text: str) -> list[tuple[str, str]]:
    """Return the pairs of role and content of what `conversation_as_text` returned."""
    return [(role, content) for role, content in json.loads(text)]
