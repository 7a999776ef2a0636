"""The page: files that the server sends as they are.

They hold nothing secret, so they need no key; what the page then asks for does. Their host is checked as everywhere.
The page uses no framework and nothing from another server. `vendor/` holds uPlot, which draws curves; docs/page.md says
how to update it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_HERE = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


@cache
def files() -> dict[str, Path]:
    """Return the files below /static/ by their names; a name is looked up here and never joined to a path."""
    found = [*_HERE.glob("*.css"), *_HERE.glob("*.js"), *(_HERE / "vendor").glob("*.css"), *_HERE.glob("vendor/*.js")]
    return {path.relative_to(_HERE).as_posix(): path for path in sorted(found)}


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
    return _file(_HERE / "index.html")


async def static(request: Request) -> Response:
    """Answer one of the page's files."""
    path = files().get(request.path_params["name"])
    if path is None:
        raise HTTPException(404)
    return _file(path)


def _file(path: Path) -> Response:
    # Not no-store, as answers about a model have: the browser keeps a file and asks whether it is still the same.
    headers = {"Cache-Control": "no-cache"}
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=headers)
