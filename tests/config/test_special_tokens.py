"""The default separator of documents is spelled in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from config.commands import COMMANDS
from config.keys import iter_keys
from config.schemas import ChatStrings
from config.special_tokens import END_OF_TEXT

ROOT = Path(__file__).parents[2]
PACKAGES = ("benchmarking", "cli", "config", "databuilder", "logger", "profiling", "transformerlm")


def test_it_is_spelled_once():
    """Product code takes the separator from `config.special_tokens`; docstrings may name it."""
    spelled = [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if END_OF_TEXT in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and node.value == END_OF_TEXT
    ]
    assert spelled == ["config/special_tokens.py"]


def test_shipped_files_spell_the_same():
    """Where a shipped TOML names a separator or special tokens, they are the defaults of its schema."""
    defaults = {key.default for schema in COMMANDS.values() for key in iter_keys(schema) if "separator" in key.name}
    assert defaults == {f'"{END_OF_TEXT}"', "none"}
    known = {END_OF_TEXT, *ChatStrings().special_tokens}
    for path in sorted((ROOT / "config/resources").rglob("*.toml")):
        for token in re.findall(r"<\|[^|]*\|>", path.read_text(encoding="utf-8")):
            assert token in known, path
