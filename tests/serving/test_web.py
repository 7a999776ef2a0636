"""The page's files: what is sent, to whom, and that the vendored ones are what their authors published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.serving.web import Web, run
from transformerlm.serving import web
from transformerlm.serving.guard import CONTENT_POLICY

HOME = Path(web.__file__).parent
KEY = "a-secret"


def test_the_files_need_no_key_and_their_host_is_checked(tmp_path):
    """With a key set the page and its files are sent without it, to hosts that are allowed alone; all else is not."""

    async def ask(served: Web) -> None:
        for path in ("/", *(f"/static/{name}" for name in web.files())):
            answer = await served.client.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["content-security-policy"] == CONTENT_POLICY
            assert (await served.client.get(path, headers={"Host": "evil.example"})).status_code == 403, path
            assert (await served.client.post(path)).status_code == 401, path
        for path in (
            "/static/",
            "/static/nothing.js",
            "/static/__init__.py",
            "/static/index.html",
        ):
            assert (await served.client.get(path)).status_code == 401, path

    run(tmp_path, ask, key=KEY)


def test_without_a_key_only_the_pages_files_are_sent(tmp_path):
    """A name that is none of the page's files is a 404, whatever path it spells."""

    async def ask(served: Web) -> None:
        assert (await served.client.get("/static/page.js")).headers["content-type"].startswith("text/javascript")
        for name in ("__init__.py", "vendor/SHA256SUMS", "..%2fapp.py", "vendor/..%2f__init__.py", "nothing"):
            assert (await served.client.get(f"/static/{name}")).status_code == 404, name

    run(tmp_path, ask)


def test_the_page_can_be_turned_off(tmp_path):
    """With web.enabled = false there is neither page nor files nor runs, and with a key not even a 404."""
    off = {"web": {"enabled": False}}

    async def ask(served: Web) -> None:
        for path in ("/", "/static/page.js", "/api/runs"):
            assert (await served.client.get(path)).status_code == 404

    async def ask_with_key(served: Web) -> None:
        assert (await served.client.get("/")).status_code == 401

    run(tmp_path / "open", ask, sections=off)
    run(tmp_path / "closed", ask_with_key, sections=off, key=KEY)


@pytest.mark.parametrize("path", sorted([*HOME.glob("*.js"), HOME / "index.html"]), ids=lambda path: path.name)
def test_nothing_makes_markup_of_text_or_code_of_strings(path):
    """No file of ours sets markup, evaluates strings, has inline code or names another host."""
    text = path.read_text(encoding="utf-8")
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://|\bstyle=|<script>|\son\w+="
    assert re.findall(forbidden, text) == []
    assert len(text.splitlines()) <= 500
