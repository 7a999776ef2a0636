"""A chat format as the template by which other tools make a prompt of a conversation: Jinja's, and Go's for Ollama.

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
    """Return the template of a format in Jinja; `start` is the special token before a conversation."""
    lines = [] if start is None else [f"{{{{- {_quoted(start)} }}}}"]
    lines.append("{%- for message in messages %}")
    for number, (role, before) in enumerate(_by_role(chat).items()):
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


def go_template(chat: ChatFormat, *, start: str | None = None) -> str:
    """Return the template of a format in Go, as Ollama reads it; it always ends with the beginning of an answer."""
    lines = [] if start is None else [f"{{{{- {_quoted(start, mark=_GO)} }}}}"]
    lines.append("{{- range .Messages }}")
    for number, (role, before) in enumerate(_by_role(chat).items()):
        lines.append(f"{{{{- {'else if' if number else 'if'} eq .Role {_quoted(role, mark=_GO)} }}}}")
        lines.append(f"{{{{- {_quoted(before, mark=_GO)} }}}}")
    lines += [
        "{{- end }}",
        "{{- .Content }}",
        f"{{{{- {_quoted(chat.end + chat.after, mark=_GO)} }}}}",
        "{{- end }}",
        f"{{{{- {_quoted(chat.assistant, mark=_GO)} }}}}",
    ]
    return "\n".join(lines)


def template_to_export(renderer: ChatRenderer) -> str | None:
    """Return the template of a renderer's format, or None, with a warning, if it would give other ids than ours."""
    if not _gives_our_ids(renderer):
        warnings.warn(
            "the chat format has no template: tokenized as one text, its strings join with what is beside them, "
            "which gives other ids than in training; end them with one line break, as ChatML does",
            stacklevel=3,
        )
        return None
    return chat_template(renderer.chat, start=_start(renderer))


def ollama_template(renderer: ChatRenderer, *, starts_texts: bool) -> str | None:
    """Return the template of a renderer's format for Ollama, or None if it would give other ids than ours.

    With `starts_texts` the tokenizer itself puts the special token before a text, so the template does not.
    """
    if not _gives_our_ids(renderer):
        return None
    return go_template(renderer.chat, start=None if starts_texts else _start(renderer))


def _gives_our_ids(renderer: ChatRenderer) -> bool:
    """Return whether a conversation that is tokenized as one text has the ids of training."""
    start = _start(renderer) or ""
    return all(
        renderer.tokenizer.encode(_prompt_as_text(renderer.chat, messages, start)) == renderer.prompt(messages).tolist()
        for messages in PROBES
    )


def _start(renderer: ChatRenderer) -> str | None:
    """Return the special token before a conversation; None: there is none."""
    names = {index: text for text, index in renderer.tokenizer.special_token_ids.items()}
    return None if renderer.start_id is None else names.get(renderer.start_id)


def _by_role(chat: ChatFormat) -> dict[str, str]:
    """Return what a format writes before a message of each role."""
    return {"system": chat.system, "user": chat.user, "assistant": chat.assistant}


def _prompt_as_text(chat: ChatFormat, messages: Sequence[Message], start: str) -> str:
    """Return what the template makes of messages, with the beginning of an answer."""
    before = _by_role(chat)
    return start + "".join(before[role] + said + chat.end + chat.after for role, said in messages) + chat.assistant


def _quoted(text: str, *, mark: str = "'") -> str:
    """Return a text as a string of Jinja, or of Go between its own marks, in printable characters."""
    named = {**_NAMED, mark: f"\\{mark}"}
    return mark + "".join(named.get(one, one if one.isprintable() else _escaped(one)) for one in text) + mark


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


_GO = '"'
_NAMED = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
