"""What to type when a library of an extra is missing."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """Return the commands that install an extra of the package: pip's, and uv's, whose environments have no pip.

    `--inexact` lets uv keep the extras that are already installed.
    """
    return f'pip install "transformerlm[{extra}]", or in a clone with uv: uv sync --inexact --extra {extra}'
