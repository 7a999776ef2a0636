"""What went wrong with a request, in the form that OpenAI's clients read: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from transformerlm.serving.engine import EngineGone, QueueFull, RequestRefused, UnknownCheckpoint

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
RETRY_SECONDS = 1
"""After how long a client should ask again where the engine is loading or was started again."""


class JsonAnswer(JSONResponse):
    """JSON in ASCII: a client may send half a character, and gets it back as it was written."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of the body."""
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class ApiError(Exception):
    """A request that is refused or that failed: the status, and what the client is told."""

    was_taken = False
    """Whether its texts had begun, so that their end is told already, and nothing was refused."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error, by which its clients tell errors apart."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, object]:
        """Return the JSON object that is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JsonAnswer:
        """Return the answer to the request."""
        return JsonAnswer(self.body(), status_code=self.status, headers=self.headers)


def of_engine(error: QueueFull | EngineGone | UnknownCheckpoint | RequestRefused) -> ApiError:
    """Return what a client is told when the engine takes no request, or died while it made a text."""
    if isinstance(error, QueueFull):
        retry = {"Retry-After": str(error.retry_after)}
        return ApiError(429, f"the server is busy: {error}", code="queue_full", headers=retry)
    if isinstance(error, UnknownCheckpoint):
        return ApiError(404, str(error) or "the run keeps no such checkpoint", param="model", code="model_not_found")
    if isinstance(error, RequestRefused):
        return ApiError(400, f"the engine refuses the request: {error}", code="refused")
    message = str(error) or "the engine makes no tokens now"
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": str(RETRY_SECONDS)})


def timed_out(seconds: float) -> ApiError:
    """Return what a client is told whose text was not complete in time."""
    return ApiError(504, f"the text was not complete within {seconds:g} s (timeouts.request)", code="timeout")
