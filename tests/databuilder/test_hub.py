"""Requests to the hub: where they may lead, who sees the token, and how an answer is understood."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from databuilder import hub as hub_module
from databuilder.hub import Hub, HubFile, RemoteFacts, TransientError
from tests.databuilder.hub_server import HubServer, as_the_hub, serving

DATA = b"some text\n" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = HubFile("me/texts", "a.txt")
PATH = "/datasets/me/texts/resolve/main/a.txt"
TOKEN = "hf_secret"


@pytest.fixture
def server() -> Iterator[HubServer]:
    """Return a hub that has one file."""
    with as_the_hub({FILE.path: DATA}) as running:
        yield running


@pytest.fixture
def cdn() -> Iterator[HubServer]:
    """Return another host that has the file, like those to which the hub redirects."""
    with serving({FILE.path: DATA}) as running:
        yield running


def _to(location: str, **headers: str) -> Callable[[Any], bool]:
    """Return a fault: a redirect; `x_linked_size` becomes `X-Linked-Size`."""
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return lambda handler: handler.reply(302, headers={"Location": location, **named})


def test_addresses_have_the_hubs_form() -> None:
    """Data sets and models differ, revisions and file names are quoted."""
    assert HubFile("a/b", "d e/f#.txt").url("https://hub") == "https://hub/datasets/a/b/resolve/main/d%20e/f%23.txt"
    model = HubFile("gpt2", "vocab.json", repo_type="model", revision="refs/pr/1")
    assert model.url("https://hub") == "https://hub/gpt2/resolve/refs%2Fpr%2F1/vocab.json"


def test_facts_come_from_the_first_host(server: HubServer, cdn: HubServer) -> None:
    """What the hub says with its redirect is enough; the other host is not asked."""
    redirect = _to(cdn.endpoint + PATH, x_linked_size=str(len(DATA)), x_linked_etag=f'"{SHA256}"')
    server.head_faults = [redirect]
    assert Hub.from_environment().facts(FILE) == RemoteFacts(len(DATA), SHA256, SHA256)
    assert cdn.requests == []


def test_facts_without_a_size_are_asked_of_the_other_host(server: HubServer, cdn: HubServer) -> None:
    """A mirror that redirects without facts is followed; the ETag there is a version, not a checksum."""
    cdn.names_checksum = False
    server.head_faults = [_to(cdn.endpoint + PATH)] * 2
    etag = f'"{hashlib.md5(DATA).hexdigest()}-1"'
    assert Hub.from_environment().facts(FILE) == RemoteFacts(len(DATA), None, etag)


def test_an_etag_is_a_checksum_only_where_the_hub_says_so(server: HubServer) -> None:
    """A word of 64 letters from a server that is not a hub may be anything; a weak ETag is not a version."""
    size = {"Content-Length": str(len(DATA))}
    cases = [
        ({"ETag": f'"{SHA256}"', "X-Repo-Commit": "c"}, (SHA256, SHA256)),
        ({"ETag": f'W/"{SHA256}"', "X-Repo-Commit": "c"}, (SHA256, SHA256)),
        ({"ETag": f'"{SHA256}"'}, (None, f'"{SHA256}"')),
        ({"ETag": f'W/"{SHA256}"'}, (None, "")),
        ({"ETag": "odd", "X-Repo-Commit": "c"}, (None, "")),
    ]
    for headers, expected in cases:
        server.head_faults = [lambda handler, headers=headers: handler.reply(200, headers=headers | size)]
        facts = Hub.from_environment().facts(FILE)
        assert (facts.checksum, facts.version) == expected, headers


@pytest.mark.parametrize("size", ["-1", "1e9", "9" * 30, "many"])
def test_a_size_that_is_none_is_refused(server: HubServer, size: str) -> None:
    """Without a size the disk cannot be checked, and a cut looks like the end."""
    server.head_faults = [lambda handler: handler.reply(200, headers={"X-Linked-Size": size})]
    with pytest.raises(ValueError, match="expected the file's size"):
        Hub.from_environment().facts(FILE)


def test_the_token_goes_to_the_endpoint_only(
    server: HubServer, cdn: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request to the hub carries it, also after a redirect within the hub; no other host sees it."""
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    hub = Hub.from_environment()
    server.head_faults = [_to(PATH)]
    hub.facts(FILE)
    server.faults = [_to(cdn.endpoint + PATH)]
    with hub.open(FILE) as response:
        assert response.read() == DATA
    assert [headers.get("Authorization") for _, _, headers in server.requests] == [f"Bearer {TOKEN}"] * 3
    assert [headers.get("Authorization") for _, _, headers in cdn.requests] == [None]


def test_a_redirect_back_from_another_host_gets_the_token_again_only_at_the_hub(
    server: HubServer, cdn: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request is judged by its own address."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.faults = [_to(cdn.endpoint + PATH)]
    cdn.faults = [_to(server.endpoint + PATH)]
    with Hub.from_environment().open(FILE) as response:
        assert response.read() == DATA
    assert [headers.get("Authorization") for headers in cdn.seen("GET")] == [None]


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "http://example.com/a",
        "data:text/plain,hello",
        "//example.com/a",
        "http://127.0.0.1:99999/",
        "http://u:secret@127.0.0.1/",
        "http://[::1/",
    ],
)
def test_a_redirect_elsewhere_is_refused(server: HubServer, location: str) -> None:
    """No redirect leads to a file, to another scheme, out of `https`, or to an address with a password."""
    for faults, call in ((server.head_faults, Hub.facts), (server.faults, Hub.open)):
        faults.append(_to(location))
        with pytest.raises(ValueError, match=r"redirect: expected") as caught:
            call(Hub.from_environment(), FILE)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_https_is_not_left_for_this_machine() -> None:
    """A redirect from `https` to `http` on this machine would let a server reach what only we can."""
    with pytest.raises(ValueError, match="https:// "):
        hub_module._checked_url("http://127.0.0.1/a", "redirect", plain_http=False)


def test_redirects_are_bounded(server: HubServer) -> None:
    """A cycle of redirects ends."""
    server.faults = [_to(PATH)] * 20
    with pytest.raises(ValueError, match="expected at most 5 redirects, found more"):
        Hub.from_environment().open(FILE)
    assert len(server.requests) == 6


def test_a_signature_in_a_redirect_is_not_shown(server: HubServer) -> None:
    """A signature that opens the file to anybody stays out of messages and logs."""
    with serving({}) as gone:
        target = f"{gone.endpoint}/a.txt?Signature=secret"
    server.faults = [_to(target)]
    with pytest.raises(TransientError) as caught:
        Hub.from_environment().open(FILE)
    assert "/a.txt:" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://example.com",
        "file:///tmp",
        "example.com",
        "https://",
        "https://u:p@example.com",
        "https://a b",
        "http://[",
        "",
    ],
)
def test_an_endpoint_that_is_not_https_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain http is for this machine only; an empty variable means the usual endpoint."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    if not endpoint:
        assert Hub.from_environment().endpoint == "https://huggingface.co"
        return
    with pytest.raises(ValueError, match="HF_ENDPOINT: expected"):
        Hub.from_environment()


@pytest.mark.parametrize(
    "endpoint", ["https://mirror.example/hf/", "http://localhost:1", "http://[::1]:1", "http://127.9.9.9"]
)
def test_an_endpoint_may_be_a_mirror_or_this_machine(endpoint: str) -> None:
    """Https anywhere, also below a path; http on loopback addresses."""
    assert Hub(endpoint).endpoint == endpoint.rstrip("/")


@pytest.mark.parametrize("token", ["a\r\nHost: b", "a b", "ü"])
def test_a_token_that_no_header_holds_is_refused_unseen(token: str) -> None:
    """A token with line ends could add headers; it is refused without being shown."""
    with pytest.raises(ValueError, match=r"^HF_TOKEN: expected printable") as caught:
        Hub(token=token)
    assert token not in str(caught.value)


def test_the_message_for_a_closed_repository_depends_on_the_token(server: HubServer) -> None:
    """With a token it says that this one is not enough."""
    server.head_faults = [lambda handler: handler.reply(403)]
    with pytest.raises(PermissionError, match="HF_TOKEN may not read it"):
        Hub(server.endpoint, token=TOKEN).facts(FILE)


def test_a_certificate_that_is_not_trusted_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong certificate will still be wrong next time."""
    hub = Hub()

    def refuse(*_: object, **__: object) -> None:
        raise hub_module.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(hub._opener, "open", refuse)
    with pytest.raises(ValueError, match="expected a certificate that can be trusted"):
        hub.facts(FILE)


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200])
def test_an_answer_that_is_no_http_may_pass(server: HubServer, answer: bytes) -> None:
    """Nonsense, nothing, or headers without end are one line, and worth another try."""

    def fault(handler: Any) -> bool:
        handler.wfile.write(answer)
        handler.close_connection = True
        return True

    server.head_faults = [fault]
    with pytest.raises(TransientError):
        Hub.from_environment().facts(FILE)


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_offline_is_a_yes(value: str | None, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable has the same values as in the hub's own client."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub_module.is_offline() == offline
