"""A chat format as the Jinja template by which other tools make a prompt of a conversation.

The template writes a conversation as one text, which its reader then tokenizes; ours tokenizes each string and each
message by itself. The ids are the same, but where white space begins a message, and where a message spells a special
token, which stays plain text here and becomes the token there. A format whose strings themselves would join with what
follows, such as "User: " with a space at its end, has no template that gives its ids.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from transformerlm.tokenizer.chat import ChatFormat, ChatRenderer, Message

FILE = "chat_template.jinja"
PROBES: tuple[tuple[Message, ...], ...] = (
    (("user", "Hi"),),
    (("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")),
    (("user", "a\n\nb  c"), ("assistant", "'s 12 % é 日本 🙂"), ("user", "¿Y tú?"), ("assistant", "{{ x }} <b>")),
    (("system", "Answer\r\n\tin English."), ("user", "(why)"), ("assistant", "I'm\tfine.")),
)
"""Conversations that show whether a template gives our ids."""


def chat_template(chat: ChatFormat, *, start: str | None = None) -> str:
    """Return the template of a format; `start` is the special token before a conversation."""
    roles = {"system": chat.system, "user": chat.user, "assistant": chat.assistant}
    lines = [] if start is None else [f"{{{{- {_quoted(start)} }}}}"]
    lines.append("{%- for message in messages %}")
    for number, (role, before) in enumerate(roles.items()):
        lines.append(f"{{%- {'elif' if number else 'if'} message['role'] == '{role}' %}}")
        lines.append(f"{{{{- {_quoted(before)} }}}}")
    lines += [
        "{%- else %}",
        "{{- raise_exception('expected the role system, user or assistant') }}",
        "{%- endif %}",
        f"{{{{- message['content'] + {_quoted(chat.end + chat.after)} }}}}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}",
        f"{{{{- {_quoted(chat.assistant)} }}}}",
        "{%- endif %}",
    ]
    return "\n".join(lines)


def template_to_export(renderer: ChatRenderer) -> str | None:
    """Return the template of a renderer's format, or None, with a warning, if it would give other ids than ours."""
    tokenizer, chat = renderer.tokenizer, renderer.chat
    names = {index: text for text, index in tokenizer.special_token_ids.items()}
    start = None if renderer.start_id is None else names.get(renderer.start_id)
    for messages in PROBES:
        if tokenizer.encode(_prompt_as_text(chat, messages, start or "")) != renderer.prompt(messages).tolist():
            warnings.warn(
                "the chat format has no template: tokenized as one text, its strings join with what is beside them, "
                "which gives other ids than in training; end them with one line break, as ChatML does",
                stacklevel=3,
            )
            return None
    return chat_template(chat, start=start)


def _prompt_as_text(chat: ChatFormat, messages: Sequence[Message], start: str) -> str:
    """Return what the template makes of messages, with the beginning of an answer."""
    before = {"system": chat.system, "user": chat.user, "assistant": chat.assistant}
    return start + "".join(before[role] + said + chat.end + chat.after for role, said in messages) + chat.assistant


def _quoted(text: str) -> str:
    """Return a text as a string of Jinja, in printable characters."""
    return "'" + "".join(_NAMED.get(one, one if one.isprintable() else _escaped(one)) for one in text) + "'"


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


_NAMED = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
