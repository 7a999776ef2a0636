"""The page of a model, which `transformerlm-export --format=html` fills: engine, surface and style.

`engine.js` runs in a worker and knows no page; `page.js` is the page. Modules import each other as `/static/NAME`, as
those of the other pages do; `transformerlm/utils/bundle.py` makes one script of them.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def read(name: str) -> str:
    """Return the text of one of the folder's own files."""
    return (_HERE / name).read_text(encoding="utf-8")
