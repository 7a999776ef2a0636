"""What to type when a library of an extra is missing."""

from __future__ import annotations

import importlib.util


def how_to_install(extra: str) -> str:
    """Return the commands that install an extra of a clone: pip's, and uv's, whose environments have no pip.

    `--inexact` lets uv keep the extras that are already installed.
    """
    return f'in the clone, pip install -e ".[{extra}]", or with uv: uv sync --inexact --extra {extra}'


def require_extra(package: str) -> None:
    """Raise ValueError, with what to type, if the package of the extra of that name is not installed."""
    spec = importlib.util.find_spec(package)
    # A folder of that name, such as the `wandb/` of offline runs, can be imported, too, as a package without an origin.
    if spec is None or spec.origin is None:
        raise ValueError(f"{package} is not installed: {how_to_install(package)}")
