"""A page that is one file: a template with its parts, data as JSON, and a policy that runs its own scripts alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Put each part where `{name}` is in a template, in their order; what a part holds is never looked at again."""
    pieces = []
    rest = template
    for name, part in parts.items():
        before, mark, rest = rest.partition("{" + name + "}")
        assert mark, f"template: no {name} where it was expected"
        pieces += [before, part]
    return "".join([*pieces, rest])


def policy(*, scripts: Sequence[str], style: str, more: str = "") -> str:
    """Return a content policy: these scripts and this style run, by their sha256, and nothing is fetched or sent.

    `more` are further directives.
    """
    # img-src: the icon of the tab, an empty one, for which browsers would ask otherwise.
    allowed = " ".join(_sum(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_sum(style)}; img-src data:; base-uri 'none'; "
        f"form-action 'none'{more and '; '}{more}"
    )


def _sum(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def json_block(content: Any) -> str:
    """Return JSON that is safe within <script>: ASCII, and without a character that HTML gives a meaning."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
