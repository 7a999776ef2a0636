"""Schema of `transformerlm-init`."""

from __future__ import annotations

from pydantic import Field

from config.schemas import FilePath, InputName, Section


class InitConfig(Section):
    """Write a project: a commented TOML file for each step, a README with the commands in order, and a .gitignore."""

    dir: FilePath = Field(description="directory of the project, created if missing; no file in it is replaced")
    text: list[InputName] = Field(
        [],
        description="text files or globs to copy into the project's data/corpus.txt, split into documents at blank "
        "lines; none: you put it there",
    )
