"""Routes for who runs the server, on a port of their own that only this machine reaches: drain, and profiles.

Knows no request and no model. The one idea: what ends or slows a server is nowhere near what its clients ask for; the
port is closed unless it is asked for, and its routes need a key where all others do.

    POST /drain             as SIGTERM does: nothing new is taken, what runs is finished, then the process ends
    POST /profile/start     records what host and device do, until
    POST /profile/stop      writes it, for TensorBoard and Perfetto; where there is a folder for it
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from fastgpt_jax.serving.auth import Keys, RequireKey
from fastgpt_jax.serving.errors import ApiError, as_api_error, route_error
from fastgpt_jax.serving.middleware import Surround
from fastgpt_jax.serving.settings import ServerSettings

HOST = "127.0.0.1"


class Draining(BaseModel):
    """What is under way is finished, and then the process ends."""

    status: str = "draining"


class Profile(BaseModel):
    """Whether a profile is being taken, and where it is written."""

    status: str
    folder: str


def make_control_app(settings: ServerSettings, end: Callable[[], None]) -> FastAPI:
    """Args: end: Ends the server as SIGTERM does."""
    surround = Middleware(
        Surround, max_header_bytes=settings.max_header_bytes, max_request_id_chars=settings.max_request_id_chars
    )
    key = Middleware(RequireKey, keys=Keys(settings.api_keys), open_metrics=False)
    app = FastAPI(openapi_url=None, redirect_slashes=False, middleware=[surround, key])
    app.include_router(_drain_router(end))
    if settings.profile_folder is not None:
        app.include_router(_profile_router(settings.profile_folder))

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def answer_route(request: Request, error: Exception) -> Response:
        return (
            route_error(error, request).response() if isinstance(error, HTTPException) else await answer(request, error)
        )

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(HTTPException, answer_route)
    return app


def _drain_router(end: Callable[[], None]) -> APIRouter:
    router, is_asked = APIRouter(), []

    @router.post("/drain", status_code=202)
    async def drain() -> Draining:
        if not is_asked:  # a second signal would abort what runs
            is_asked.append(True)
            end()
        return Draining()

    return router


def _profile_router(folder: Path) -> APIRouter:
    router, lock, running = APIRouter(), asyncio.Lock(), []

    @router.post("/profile/start")
    async def start() -> Profile:
        async with lock:
            if running:
                raise ApiError("conflict", "a profile is being taken; POST /profile/stop ends it")
            await _on_a_thread(jax.profiler.start_trace, str(folder))
            running.append(True)
        return Profile(status="running", folder=str(folder))

    @router.post("/profile/stop")
    async def stop() -> Profile:
        async with lock:
            if not running:
                raise ApiError("conflict", "no profile is being taken; POST /profile/start begins one")
            running.clear()
            await _on_a_thread(jax.profiler.stop_trace)
        return Profile(status="written", folder=str(folder))

    return router


async def _on_a_thread(work: Callable[..., Any], *args: Any) -> None:
    """Raises ApiError where a profile cannot be taken or written."""
    try:
        await asyncio.to_thread(work, *args)
    except (OSError, RuntimeError) as error:
        raise ApiError("conflict", f"the profile cannot be taken: {str(error).splitlines()[0]}") from error
