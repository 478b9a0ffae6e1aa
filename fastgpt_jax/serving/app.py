"""The application: every route, and what surrounds them.

Knows no engine. The one idea: a request meets, from the outside in, its id and the size of its headers, the rules for
other sites' pages, its key, and only then a route; what a route raises becomes OpenAI's error object in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving import chat, completions, embeddings, health, metrics, models, playground, tokenize
from fastgpt_jax.serving.answers import json_answer
from fastgpt_jax.serving.auth import Keys, RequireKey, needs_no_key
from fastgpt_jax.serving.errors import ApiError, as_api_error, route_error
from fastgpt_jax.serving.middleware import REQUEST_ID, Surround
from fastgpt_jax.serving.openapi import make_document
from fastgpt_jax.serving.running import ClientGone
from fastgpt_jax.serving.settings import ServerSettings
from fastgpt_jax.serving.state import Server
from fastgpt_jax.serving.unavailable import Unavailable
from fastgpt_jax.tokenizer.chat_template import ChatTemplate

CLIENT_GONE = 499
"""Nobody reads it; the log shows it."""
_LIKE_OPENAI = (completions, chat, embeddings, models, tokenize)


def make_app(
    llm: Any,
    settings: ServerSettings,
    *,
    chat_template: str | None = None,
    counted: metrics.ServerMetrics | None = None,
    routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """Makes the application that serves a model.

    Args:
      llm: An `AsyncLLM`, or what stands before one and answers as it does.
      chat_template: Jinja source; None takes the compiled model's own, if it has one.
      counted: What `/metrics` tells; made here where it is None.
      routers: More routes; they need a key like all others.

    Raises:
      UserError: The chat template is not valid.
    """
    app = FastAPI(
        title="FastGPT-JAX",
        version=version("fastgpt-jax"),
        description="Serves a language model in the forms of OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        middleware=_middleware(settings, keys := Keys(settings.api_keys)),
    )
    app.state.server = Server(
        llm, settings, keys, _template(llm, chat_template), fingerprint=_fingerprint(getattr(llm, "compiled", None))
    )
    for module in _LIKE_OPENAI:
        app.include_router(module.router)
    app.include_router(health.make_router(llm))
    app.include_router(health.make_load_router(llm))
    app.include_router(metrics.make_router(metrics.ServerMetrics(llm) if counted is None else counted))
    app.include_router(playground.make_router())
    for router in routers:
        app.include_router(router)
    _add_document(app, settings)
    _add_handlers(app)
    return app


def _middleware(settings: ServerSettings, keys: Keys) -> list[Middleware]:
    surround = Middleware(
        Surround, max_header_bytes=settings.max_header_bytes, max_request_id_chars=settings.max_request_id_chars
    )
    allow = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_allow_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", REQUEST_ID.decode()],
        expose_headers=[REQUEST_ID.decode(), "Retry-After"],
    )
    key = Middleware(RequireKey, keys=keys, open_metrics=settings.open_metrics)
    return [surround, *([allow] if settings.cors_allow_origins else []), key]


def _template(llm: Any, source: str | None) -> ChatTemplate | None:
    """The given template, else the compiled model's own."""
    if source is None:
        source = getattr(getattr(llm, "compiled", None), "chat_template", None)
    if source is None:
        return None
    names = {name: getattr(llm.tokenizer, name, None) for name in ("bos_token", "eos_token")}
    return ChatTemplate(source, **names)


def _fingerprint(compiled: Any) -> str | None:
    """Names the weights and the versions that serve them; None for what is no artifact."""
    manifest = getattr(compiled, "manifest", None)
    return None if manifest is None else f"fp_{manifest.model.digest[:10]}_{manifest.environment.jax}"


def _add_document(app: FastAPI, settings: ServerSettings) -> None:
    @app.get("/openapi.json", summary="This document", response_model=None)
    async def openapi(request: Request) -> Response:
        if app.openapi_schema is None:
            app.openapi_schema = make_document(
                app,
                needs_key=bool(settings.api_keys),
                is_open=lambda path: needs_no_key(path, settings.open_metrics),
            )
        return json_answer(app.openapi_schema)


def _add_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def answer_route(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        return route_error(error, request).response()

    async def answer_nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind in (ApiError, UserError, Unavailable):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_route)
    app.add_exception_handler(ClientGone, answer_nobody)
