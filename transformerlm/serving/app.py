"""The web application: its routes, and what surrounds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from config.serve import ServeConfig
from transformerlm.checkpoints.naming import run_of
from transformerlm.serving import openapi, runs_api, tokens_api, web
from transformerlm.serving.chat_completions import chat_completions
from transformerlm.serving.completions import completions
from transformerlm.serving.engine import Engine
from transformerlm.serving.errors import RETRY_SECONDS, ApiError, JsonAnswer
from transformerlm.serving.guard import Access, Guard
from transformerlm.serving.metrics import CONTENT_TYPE
from transformerlm.serving.served import Served, Tell, model_card


def build_app(config: ServeConfig, engine: Engine, *, key: str | None, tell: Tell) -> Starlette:
    """Return the application; `key` is what every request must bring, and `tell` is given each event.

    `app.state.served` is what the routes share. The engine is started and ended by whoever runs the application.
    """
    served = Served(config=config, engine=engine, tell=tell)
    access = Access.of(
        key=key,
        hosts=[*config.access.allowed_hosts, config.host],
        origins=config.access.allowed_origins,
        max_body_bytes=config.limits.body_mb * 1_000_000,
        is_open=web.is_open if config.web.enabled else lambda path: False,
    )
    app = Starlette(
        routes=routes(config),
        middleware=[Middleware(Guard, access=access, rejected=served.rejected)],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect names a host, and behind a proxy that is the wrong one
    app.state.served = served
    engine.on_event = lambda event: tell(event["event"], {name: event[name] for name in event if name != "event"})
    return app


def routes(config: ServeConfig) -> list[BaseRoute]:
    """Return all routes."""
    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        *openapi.routes(),
        *tokens_api.routes(),
        *(_page_routes(config) if config.web.enabled else []),
    ]


def _page_routes(config: ServeConfig) -> list[BaseRoute]:
    """Return the routes of the page and of the runs that it shows."""
    return [*runs_api.routes(runs_dir_of(config)), *web.routes()]


async def models(request: Request) -> Response:
    """Answer the names that a request may give as its model."""
    served: Served = request.app.state.served
    return JsonAnswer({"object": "list", "data": [model_card(served, name) for name in served.names()]})


async def model(request: Request) -> Response:
    """Answer what is known of one name."""
    served: Served = request.app.state.served
    name = request.path_params["name"]
    served.checkpoint_of(name)
    return JsonAnswer(model_card(served, name))


async def health(request: Request) -> Response:
    """Answer 200 while the engine makes tokens, or could, and else 503; in both cases how it does."""
    served: Served = request.app.state.served
    status = served.status
    facts = status.facts
    is_ok = status.state == "ok" and served.tokenizer is not None
    body = {
        "status": "loading" if status.state == "ok" and not is_ok else status.state,
        "model": None if facts is None else served.name,
        "step": None if facts is None else facts.step,
        "system_fingerprint": None if facts is None else facts.fingerprint,
        "running": status.running,
        "waiting": status.waiting,
        "slots": status.slots,
        "last_token_age_s": status.last_token_age_s,
        "restarts": status.restarts,
        "reloads": status.reloads,
    }
    headers = {} if is_ok else {"Retry-After": str(RETRY_SECONDS)}
    return JsonAnswer(body, status_code=200 if is_ok else 503, headers=headers)


async def metrics(request: Request) -> Response:
    """Answer the numbers for Prometheus."""
    served: Served = request.app.state.served
    return Response(served.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer a path or a method without a route in the form of all other errors."""
    assert isinstance(error, HTTPException), error
    path = request.url.path[:80]
    words = {404: f"there is no {path} here", 405: f"{path} takes another method than {request.method[:20]}"}
    message = words.get(error.status_code, str(error.detail))
    headers: Mapping[str, str] = error.headers or {}
    return ApiError(error.status_code, message, code="unknown_url", headers=headers).response()


def runs_dir_of(config: ServeConfig) -> Path:
    """Return the directory whose runs the page shows: the configured one, or the one that the served run is in."""
    if config.web.runs_dir is not None:
        return config.web.runs_dir
    return run_of(config.checkpoint).parent
