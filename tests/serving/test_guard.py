"""Key, host, origin and size are checked before every route that there is."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.routing import Route

from config.serve import ServeConfig
from tests.serving.web import Web, run, settings
from transformerlm.serving.app import routes
from transformerlm.serving.web import is_open

KEY = "a-secret key"
ROUTES = [
    (method, route.path.replace("{name}", "tiny").replace("{name:path}", "tiny"))
    for route in routes(ServeConfig.model_validate({"checkpoint": "x"}))
    if isinstance(route, Route)
    for method in sorted(route.methods or ())
    if not is_open(route.path)  # the page's own files need no key: test_web.py
]
each_route = pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nowhere"), ("PUT", "/health")])


def answers(
    tmp_path: Any,
    method: str,
    path: str,
    headers: dict[str, str],
    *,
    before: Callable[[Web], None] = lambda web: None,
    **more: Any,
) -> Any:
    """Return a server's answer to one request."""
    found: list[Any] = []

    async def ask(web: Web) -> None:
        before(web)
        found.append(await web.client.request(method, path, headers=headers))

    run(tmp_path, ask, **more)
    return found[0]


@each_route
def test_every_route_wants_the_key(tmp_path, method, path):
    """Without the key, with a wrong one or with none in its place: 401, and how to give it."""
    basic = base64.b64encode(b"me:wrong").decode()
    wrong = ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer \u00fc"}, {"Authorization": f"Basic {basic}"})
    wrong += ({"Authorization": f"Basic {KEY}"}, {"Authorization": "Basic \u00fc"})
    wrong += ({"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY})

    async def ask(web: Web) -> None:
        for headers in wrong:
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = await web.client.request(method, path, headers=encoded)
            assert answer.status_code == 401, (headers, answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert web.engine.seen == []

    run(tmp_path, ask, key=KEY)


@each_route
def test_every_route_checks_host_and_origin(tmp_path, method, path):
    """Another name for the server, or a page of another server, is refused; no answer allows that page to read it."""

    async def ask(web: Web) -> None:
        evil = ({"Host": "evil.example"}, {"Host": "localhost.evil.example:8000"}, {"Host": ""})
        evil += ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:9"})
        for headers in evil:
            answer = await web.client.request(method, path, headers=headers)
            assert answer.status_code == 403, (headers, answer.text)
            assert "access-control-allow-origin" not in answer.headers

    run(tmp_path, ask)


@each_route
def test_every_answer_has_the_security_headers(tmp_path, method, path):
    """A browser takes no scripts, frames or other types from any answer."""

    def end(web: Web) -> None:
        web.engine.state = "draining"  # or an answer that is a stream of events would have no end

    headers = answers(tmp_path, method, path, {}, before=end).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    "value", [f"Bearer {KEY}", f"bearer  {KEY}", "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()]
)
def test_the_key_opens(tmp_path, value):
    """The key is taken as a token, or as the password that a browser asks its user for."""
    assert answers(tmp_path, "GET", "/health", {"Authorization": value}, key=KEY).status_code == 200


def test_a_browser_is_told_to_ask_for_the_key(tmp_path):
    """Whoever opens the page is asked for a password."""
    answer = answers(tmp_path, "GET", "/health", {"Accept": "text/html,*/*"}, key=KEY)
    assert answer.headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_its_own_names_are_hosts(tmp_path, host):
    """The names of this machine are allowed, with any port."""
    assert answers(tmp_path, "GET", "/health", {"Host": host}).status_code == 200


def test_the_configured_host_is_allowed(tmp_path):
    """The address that the server listens on is one of its names."""
    sections = {"host": "192.0.2.7", "access": {"key_env": "KEY"}}
    headers = {"Host": "192.0.2.7:8000", "Authorization": "Bearer k"}
    assert answers(tmp_path, "GET", "/health", headers, key="k", sections=sections).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "[::1]"])
def test_this_machine_alone_needs_no_key(tmp_path, host):
    """An address of IPv6 may be written as in a URL, or without its brackets."""
    name = f"[{host.strip('[]')}]:8000" if ":" in host else host
    sections = {"host": host, "access": {"allowed_hosts": ["my.example"]}}
    assert answers(tmp_path, "GET", "/health", {"Host": name}, sections=sections).status_code == 200


@pytest.mark.parametrize("host", ["my.example:8443", "127.0.0.1:8000", "[::1]:8000", "cafe:80", "[cafe]", "http://a"])
def test_a_name_of_the_server_has_no_port(host):
    """A name with one would never be that of a request, whose port may be any."""
    for sections in ({"host": host, "access": {"key_env": "KEY"}}, {"access": {"allowed_hosts": ["a", host]}}):
        with pytest.raises(ValidationError, match="String should match pattern"):
            settings(**sections)


def test_a_page_of_its_own_may_ask(tmp_path):
    """The server's own page is allowed, behind a proxy that speaks https too."""
    for origin in ("http://localhost:8000", "https://localhost:8000"):
        headers = {"Host": "localhost:8000", "Origin": origin}
        assert answers(tmp_path, "GET", "/health", headers).status_code == 200


@pytest.mark.parametrize("named", ["https://example.org", "https://Example.org:443"])
def test_a_page_that_is_named_may_ask(tmp_path, named):
    """A configured origin may read answers, and its browser may ask beforehand without the key."""
    sections = {"access": {"allowed_origins": [named]}}
    headers = {"Origin": "https://example.org", "Authorization": f"Bearer {KEY}"}
    answer = answers(tmp_path, "GET", "/health", headers, sections=sections, key=KEY)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    preflight = answers(tmp_path, "OPTIONS", "/v1/completions", headers, sections=sections, key=KEY)
    assert preflight.status_code == 204
    assert "POST" in preflight.headers["access-control-allow-methods"]
    plain = answers(tmp_path, "OPTIONS", "/v1/completions", {"Origin": "https://example.org"}, key=KEY)
    assert plain.status_code == 403


def test_a_body_has_a_limit(tmp_path):
    """A body that says that it is too large, and one that does not say it, are refused; the engine sees nothing."""

    async def pieces() -> Any:
        for _ in range(11):
            yield b" " * 100_000

    async def ask(web: Web) -> None:
        for content in (b" " * 9_000_000, pieces()):
            answer = await web.client.post("/v1/completions", content=content)
            assert answer.status_code == 413
            assert "limits.body_mb" in answer.json()["error"]["message"]
        assert web.engine.seen == []
        assert [event["reason"] for event in web.events] == ["body_too_large"] * 2

    run(tmp_path, ask, over_network=True, sections={"limits": {"body_mb": 1}})


def test_a_mistake_of_ours_is_an_answer_without_a_traceback(tmp_path, monkeypatch, caplog):
    """An exception that nobody expected is a 500 in the form of all errors, and one line in the log."""

    async def ask(web: Web) -> None:
        monkeypatch.setattr(web.engine, "checkpoints", lambda: 1 / 0)
        answer = await web.client.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")

    run(tmp_path, ask)
    assert "ZeroDivisionError" in caplog.text
