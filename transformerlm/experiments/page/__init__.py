"""What the page of `transformerlm-serve` and a run's report share: how runs are shown in a browser.

`runs_view.js` draws what a source gives it (a server, or data in the page itself), `runs.html` holds its elements, and
`report.js` and `report.html` are the report's own. Modules import each other as `/static/NAME`, as the server sends
them; `transformerlm/utils/bundle.py` makes one script of them. `vendor/` has uPlot, which draws curves; docs/page.md
says how to update it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

HOME = Path(__file__).parent
UPLOT_JS = "vendor/uPlot-1.6.32.iife.min.js"
UPLOT_CSS = "vendor/uPlot-1.6.32.min.css"


@cache
def files() -> dict[str, Path]:
    """Return the scripts and style sheets by their names below /static/."""
    found = [path for end in ("css", "js") for folder in (HOME, HOME / "vendor") for path in folder.glob(f"*.{end}")]
    return {path.relative_to(HOME).as_posix(): path for path in sorted(found)}


def read(name: str) -> str:
    """Return the text of one of the folder's own files."""
    return (HOME / name).read_text(encoding="utf-8")
