"""Schema of `transformerlm-runs list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from config.runs import RunsOutputConfig
from config.schemas import FilePath, Section, Text


def _check_filter(text: str) -> str:
    split_filter(text)
    return text


def split_filter(text: str) -> tuple[str, str, str]:
    """Return the key, the sign and the value of a filter such as `model.d_model>=512`.

    Raises:
        ValueError: there is no sign, or nothing before it.
    """
    place = next((place for place, char in enumerate(text) if char in "=<>!"), 0)
    sign = next((sign for sign in ("!=", ">=", "<=", "=", ">", "<") if text.startswith(sign, place)), "")
    if not place or not sign:
        raise ValueError(f'expected KEY=VALUE, or with != < <= > >= for the sign, found "{text}"')
    return text[:place].strip(), sign, text[place + len(sign) :].strip()


Filter = Annotated[Text, AfterValidator(_check_filter), Field(max_length=1000)]


class RunsListConfig(Section):
    """List the runs below a directory, one row a run, also while they train."""

    runs_dir: FilePath = Field(Path("runs"), description="directory of the runs, or a folder of such directories")
    filter: list[Filter] = Field(
        [],
        max_length=100,
        description='show only runs for which this holds, such as "model.d_model=512", "val_loss<3.5" or '
        '"state=running": a key of their settings or of the table; of several, all must hold',
    )
    sort: Text = Field(
        "age",
        min_length=1,
        max_length=200,
        description="the key of the table, or of the runs' settings, by which rows are sorted, the smallest first",
    )
    reverse: bool = Field(False, description="sort the other way round; runs without the key stay at the end")
    output: RunsOutputConfig = RunsOutputConfig()
