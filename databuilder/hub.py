"""Files on the Hugging Face Hub: their addresses, what the hub says about them, and requests that stay in bounds.

Only `https` is spoken, or `http` with this machine; a redirect never leads from `https` to `http`, and to no other
scheme. The token goes to the endpoint alone, not to the hosts that it redirects to. The environment is read as the
hub's own client does: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import email.utils
import ipaddress
import os
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Literal, NamedTuple, Self
from urllib.error import URLError
from urllib.parse import SplitResult, quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, getproxies

ENDPOINT = "https://huggingface.co"
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 429)
_CHECKSUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub, at a revision (a branch, a tag or a commit)."""

    repo: str
    path: str
    repo_type: Literal["dataset", "model"] = "dataset"
    revision: str = "main"

    def url(self, endpoint: str) -> str:
        """Return where the file is, in the hub's form."""
        repo = f"datasets/{self.repo}" if self.repo_type == "dataset" else self.repo
        return f"{endpoint}/{repo}/resolve/{quote(self.revision, safe='')}/{quote(self.path)}"


class RemoteFacts(NamedTuple):
    """What the hub says about a file: `version` changes with its content, and is empty if the hub gives none."""

    size: int
    checksum: str | None  # a sha256, or for a small file git's sha1
    version: str


class TransientError(OSError):
    """A failure that may not happen next time, and after how many seconds the server wants to be asked again."""

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Hub:
    """Requests to one endpoint.

    Raises:
        ValueError: an endpoint that is not `https`, or a token that no header can hold.
    """

    def __init__(self, endpoint: str = ENDPOINT, *, token: str | None = None, timeout: float = 30.0) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token, self._timeout = token, timeout
        parts = _checked_url(self.endpoint, "HF_ENDPOINT")
        self._origin = _origin(parts)
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ValueError("HF_TOKEN: expected printable characters without blanks, found others")
        # This opener opens no local files, follows no redirects, and accepts every status as an answer.
        self._opener = OpenerDirector()
        proxies = {scheme: proxy for scheme, proxy in getproxies().items() if scheme == "https"}
        for handler in (ProxyHandler(proxies), HTTPHandler(), HTTPSHandler()):
            self._opener.add_handler(handler)

    @classmethod
    def from_environment(cls, *, timeout: float = 30.0) -> Self:
        """Return the hub that `HF_ENDPOINT` and `HF_TOKEN` name."""
        token = os.environ.get("HF_TOKEN", "").strip() or None
        return cls(os.environ.get("HF_ENDPOINT", "").strip() or ENDPOINT, token=token, timeout=timeout)

    def facts(self, file: HubFile) -> RemoteFacts:
        """Ask for a file's size and checksum.

        Raises:
            FileNotFoundError: there is no such file.
            PermissionError: it may not be read with this token, or without one.
            ValueError: an answer or a redirect that cannot be trusted.
            TransientError: an error that may pass.
        """
        url = file.url(self.endpoint)
        with self._follow("HEAD", url, {}, leave=False) as response:
            self._check_status(response, url, allowed=_REDIRECTS)
            headers = response.headers
            if response.status in _REDIRECTS and "X-Linked-Size" not in headers:
                with self._follow("HEAD", url, {}, leave=True) as last:
                    self._check_status(last, url)
                    return _facts(last.headers, url)
            return _facts(headers, url)

    def open(self, file: HubFile, *, start: int = 0, etag: str = "") -> HTTPResponse:
        """Ask for a file's bytes from `start`; status 206 says that they begin there, 200 that they begin at 0.

        Args:
            file: the file.
            start: how many bytes are here already.
            etag: the version of those bytes; if the file has another one, the server sends the whole.

        Raises:
            FileNotFoundError, PermissionError, ValueError, TransientError: as for `facts`.
        """
        url = file.url(self.endpoint)
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._follow("GET", url, headers | ({"If-Range": etag} if start and etag else {}), leave=True)
        try:
            self._check_status(response, url, allowed=(416,))
        except BaseException:
            response.close()
            raise
        return response

    def _follow(self, method: str, url: str, headers: Mapping[str, str], *, leave: bool) -> HTTPResponse:
        """Return the first answer that is not a redirect; without `leave`, also a redirect to another host."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request(method, url, headers)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response
            where = f"{_shown(url)}: redirect"
            try:
                target = urljoin(url, location)
            except ValueError:
                raise ValueError(f"{where}: expected an address, found {_shown(location)!r}") from None
            parts = _checked_url(target, where, plain_http=url.startswith("http:"))
            if not leave and _origin(parts) != self._origin:
                return response
            response.close()
            url = target
        raise ValueError(f"{_shown(url)}: expected at most {MAX_REDIRECTS} redirects, found more")

    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> HTTPResponse:
        request = Request(url, method=method, headers={"User-Agent": "transformerlm", "Accept-Encoding": "identity"})
        for name, value in headers.items():
            request.add_header(name, value)
        if self._token is not None and _origin(urlsplit(url)) == self._origin:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            response = self._opener.open(request, timeout=self._timeout)
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ValueError(f"{_shown(url)}: expected a certificate that can be trusted: {reason}") from None
            raise TransientError(f"{_shown(url)}: {reason or type(reason).__name__}") from None
        assert isinstance(response, HTTPResponse)
        return response

    def _check_status(self, response: HTTPResponse, url: str, *, allowed: tuple[int, ...] = ()) -> None:
        status = response.status
        if status in (200, 206, *allowed):
            return
        found = f"{url}: expected the file, found {status} {_phrase(status)}"
        if status in (401, 403):
            hint = "HF_TOKEN may not read it" if self._token else "set HF_TOKEN to a token that may read it"
            raise PermissionError(f"{found} ({hint}, or the repository does not exist)")
        if status in (404, 410):
            raise FileNotFoundError(f"{found} (check repo, repo_type, revision and the file's name)")
        if status >= 500 or status in _TRANSIENT:
            raise TransientError(found, retry_after=_retry_after(response.headers.get("Retry-After")))
        raise ValueError(found)


def is_offline() -> bool:
    """Return whether `HF_HUB_OFFLINE` forbids every request."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def strong_etag(value: object) -> str:
    """Return an ETag if it identifies the exact bytes; otherwise an empty string."""
    return value if isinstance(value, str) and _STRONG_ETAG.fullmatch(value) else ""


def _facts(headers: Message, url: str) -> RemoteFacts:
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    if not re.fullmatch(r"[0-9]{1,18}", size):
        raise ValueError(f"{url}: expected the file's size in the answer, found {size[:40]!r}")
    # The hub gives the content's checksum here; the ETag of another server can be any word of 64 letters.
    etag = headers.get("ETag") if "X-Repo-Commit" in headers else None
    word = (headers.get("X-Linked-Etag") or etag or "").removeprefix("W/").strip('"')
    checksum = word if _CHECKSUM.fullmatch(word) else None
    return RemoteFacts(int(size), checksum, checksum or strong_etag(headers.get("ETag")))


def _checked_url(url: str, what: str, *, plain_http: bool = True) -> SplitResult:
    """Split an address into its parts.

    Raises:
        ValueError: it is not `https` (or, if allowed, `http` to this machine), or not a plain address.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(f"{what}: expected an address such as {ENDPOINT}, found {_shown(url)!r}") from None
    if parts.username is not None or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise ValueError(f"{what}: expected an address without a password or blanks, found one")
    secure = parts.scheme == "https" or (plain_http and parts.scheme == "http" and _is_loopback(parts.hostname or ""))
    if not secure or not parts.hostname:
        raise ValueError(f"{what}: expected https:// (http:// with this machine only), found {_shown(url)!r}")
    return parts


def _shown(url: str) -> str:
    """Return an address up to its path: in a redirect the rest can be a signature that opens the file to anybody."""
    return url.partition("?")[0]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(parts: SplitResult) -> tuple[str, str, int | None]:
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(no status of HTTP)"


def _retry_after(value: str | None) -> float:
    """Return the seconds of a `Retry-After`, which is a number or a date; 0 for anything else."""
    if value is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
