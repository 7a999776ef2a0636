"""The documentation's tables of keys are the schemas' own."""

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
    """Each key stands in the tables, and has a description."""
    text = reference()
    for schema in COMMANDS.values():
        for key in iter_keys(schema):
            assert f"| `{key.name}` |" in text
            assert key.description


def test_every_command_is_there() -> None:
    """A command whose shipped TOML exists has its tables."""
    shipped = {path.stem.replace("_", "-") for path in (REPOSITORY / "config/resources").glob("*.toml")}
    documented = {name.removeprefix("transformerlm-") for name in COMMANDS}
    assert {name for name in shipped if not name.startswith("bench")} <= documented


def test_a_bar_does_not_end_a_cell() -> None:
    """Every row has four cells, those with `|` in a pattern or a default too."""
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert {row.replace(r"\|", "").count("|") for row in rows} == {5}


def test_writing_replaces_what_is_below_the_marker(tmp_path: Path) -> None:
    """What a person wrote above stays; old tables go; a document without the marker is left alone."""
    document = tmp_path / "configuration.md"
    document.write_text(f"# Mine\n{MARKER}old tables\n", encoding="utf-8")
    write_below_marker(document)
    assert document.read_text(encoding="utf-8") == f"# Mine\n{MARKER}{reference()}"
    document.write_text("# Mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the line"):
        write_below_marker(document)
    assert document.read_text(encoding="utf-8") == "# Mine\n"
