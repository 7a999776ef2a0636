"""The tables of every key in docs/configuration.md, made from the schemas.

    python -m config.reference docs/configuration.md

rewrites them below the line that says so; without a file it prints them. A test compares them with the document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel

from config.commands import COMMANDS
from config.keys import Key, iter_keys
from config.schemas import LoggingConfig, WandbConfig

# The same in every command that has them, so described once.
SHARED: dict[str, type[BaseModel]] = {"logging": LoggingConfig, "wandb": WandbConfig}
MARKER = "<!-- everything below is written by: python -m config.reference docs/configuration.md -->\n\n"


def reference() -> str:
    """Return the keys of all commands as Markdown: one heading a command, one table a section, each table only once."""
    parts: list[str] = []
    seen: dict[str, str] = {}
    for command, schema in COMMANDS.items():
        parts.append(f"### {command}\n\n{_summary(schema)}")
        shared = {name for name in SHARED if _has(schema, name)}
        for section, table in _tables(key for key in iter_keys(schema) if key.name.split(".")[0] not in shared):
            first = seen.setdefault(table, command)
            title = f"**[{section}]**" if section else ""
            parts += [f"{title}: as in {first}."] if first != command else [title, table]
    parts.append("### Shared sections")
    for name, schema in SHARED.items():
        owners = ", ".join(command for command, owner in COMMANDS.items() if _has(owner, name))
        for section, table in _tables(iter_keys(schema), prefix=f"{name}."):
            parts += [f"**[{section}]**, the same in {owners}:", table]
    return "\n\n".join(filter(None, parts)) + "\n"


def _has(schema: type[BaseModel], name: str) -> bool:
    """Return whether a command's section of this name is the shared one."""
    return name in schema.model_fields and schema.model_fields[name].annotation is SHARED[name]


def _summary(schema: type[BaseModel]) -> str:
    return (schema.__doc__ or "").split("\n\n")[0]


def _tables(keys: Iterable[Key], *, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the table of each section, keys without a section first."""
    sections: dict[str, list[str]] = {"": []}
    for key in keys:
        name = prefix + key.name
        cells = (f"`{name}`", _cell(key.takes), _default(key), _cell(key.description))
        section = name.rpartition(".")[0]
        sections.setdefault(f"[{section}]" if key.in_list else section, []).append("| " + " | ".join(cells) + " |")
    for section, rows in sections.items():
        if rows:
            yield section, "\n".join(["| key | takes | default | meaning |", "|---|---|---|---|", *rows])


def _default(key: Key) -> str:
    if key.default is None:
        return "required"
    return "none" if key.default == "none" else f"`{_cell(key.default)}`"


def _cell(text: str) -> str:
    """Keep a text from ending its cell."""
    return text.replace("|", r"\|")


def write_below_marker(path: Path) -> None:
    """Replace everything below the marker in a document by the tables.

    Raises:
        ValueError: the document has no marker.
    """
    kept, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"{path}: expected the line {MARKER.strip()!r}, found none")
    path.write_text(kept + marker + reference(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_below_marker(Path(sys.argv[1]))
    else:
        sys.stdout.write(reference())
