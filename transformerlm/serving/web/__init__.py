"""The page: files that the server sends as they are.

They hold nothing secret, so they need no key; what the page then asks for does. Their host is checked as everywhere.
The page uses no framework and nothing from another server. What shows runs is in `transformerlm/experiments/page/`,
which a run's report holds, too.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from transformerlm.experiments import page as shared

_HERE = Path(__file__).parent
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_REPORT_ONLY = {"report.js"}
# Not no-store, as answers about a model have: the browser keeps a file and asks whether it is still the same.
_HEADERS = {"Cache-Control": "no-cache"}


@cache
def files() -> dict[str, Path]:
    """Return the files below /static/ by their names; a name is looked up here and never joined to a path."""
    theirs = {name: path for name, path in shared.files().items() if name not in _REPORT_ONLY}
    return theirs | {path.name: path for path in sorted([*_HERE.glob("*.css"), *_HERE.glob("*.js")])}


@cache
def page_html() -> str:
    """Return the page, with the elements of the tab Runs in their place."""
    return (_HERE / "index.html").read_text(encoding="utf-8").replace("<!-- runs.html -->\n", shared.read("runs.html"))


def routes() -> list[Route]:
    """Return the routes of the page and its files."""
    return [
        Route("/", page, methods=["GET"]),
        Route("/static/{name:path}", static, methods=["GET"]),
    ]


def is_open(path: str) -> bool:
    """Return whether a path is one of the page's own files, which need no key."""
    return path == "/" or (path.removeprefix("/static/") in files() and path.startswith("/static/"))


async def page(request: Request) -> Response:
    """Answer the page."""
    return Response(page_html(), media_type="text/html", headers=_HEADERS)


async def static(request: Request) -> Response:
    """Answer one of the page's files."""
    path = files().get(request.path_params["name"])
    if path is None:
        raise HTTPException(404)
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)
