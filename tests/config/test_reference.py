"""The documentation's tables of keys are the schemas' own."""

from __future__ import annotations

from pathlib import Path

from config.io import iter_keys
from config.reference import COMMANDS, reference

REPOSITORY = Path(__file__).parents[2]


def test_the_document_holds_the_generated_tables() -> None:
    """docs/configuration.md ends with what `python -m config.reference` prints."""
    document = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    assert document.endswith("<!-- made by: python -m config.reference -->\n\n" + reference())


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
