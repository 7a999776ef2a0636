"""The documentation's tables of keys are those of the schemas."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.io import iter_keys
from config.reference import COMMANDS, MARKER, reference, write_below_marker

REPOSITORY = Path(__file__).parents[2]


def test_the_document_holds_the_generated_tables() -> None:
    """docs/configuration.md is up to date; if not, run `python -m config.reference docs/configuration.md`."""
    document = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    assert document.endswith(MARKER + reference())


def test_every_key_of_every_command_is_described() -> None:
    """Each key is in the tables and has a description."""
    text = reference()
    for schema in COMMANDS.values():
        for key in iter_keys(schema):
            assert f"| `{key.name}` |" in text
            assert key.description


def test_the_same_table_stands_once() -> None:
    """A section that several commands share is described at the first of them, and the others point there."""
    assert reference().count("| `model.d_model` |") == 1
    assert "**[model]**: as in transformerlm-train." in reference()


def test_every_command_is_there() -> None:
    """There are tables for each shipped TOML, so nobody forgets a new command."""
    assert len(COMMANDS) == len(list((REPOSITORY / "config/resources").glob("*.toml")))
    assert len(set(COMMANDS.values())) == len(COMMANDS)


def test_a_bar_does_not_end_a_cell() -> None:
    """Every row has four cells, even with `|` in a pattern or a default."""
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert {row.replace(r"\|", "").count("|") for row in rows} == {5}


def test_writing_replaces_what_is_below_the_marker(tmp_path: Path) -> None:
    """What a person wrote above stays, old tables are replaced, and a document without the marker is not changed."""
    document = tmp_path / "configuration.md"
    document.write_text(f"# Mine\n{MARKER}old tables\n", encoding="utf-8")
    write_below_marker(document)
    assert document.read_text(encoding="utf-8") == f"# Mine\n{MARKER}{reference()}"
    document.write_text("# Mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the line"):
        write_below_marker(document)
    assert document.read_text(encoding="utf-8") == "# Mine\n"
