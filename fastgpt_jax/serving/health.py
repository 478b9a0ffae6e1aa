"""Whether the server lives, whether it takes requests, and how much it has to do.

Knows no request. The one idea: the answers are attributes that the event loop reads, so that they come at once
whatever the engine's thread computes.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from fastgpt_jax.serving.errors import ApiError

RETRY_AFTER = {"Retry-After": "1"}


@runtime_checkable
class Watched(Protocol):
    """What is asked of an `AsyncLLM`, and of what stands for one while it loads."""

    @property
    def is_alive(self) -> bool: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def is_draining(self) -> bool: ...


class Status(BaseModel):
    """One word."""

    status: str


class Load(BaseModel):
    """How much there is to do.

    Attributes:
      server_load: Requests that were let in and have not ended.
      num_running, num_waiting: Sequences that run, and that wait.
      queue_s: Seconds that a request let in now is expected to wait; 0 before anything was measured.
    """

    server_load: int
    num_running: int
    num_waiting: int
    queue_s: float


def make_router(watched: Watched) -> APIRouter:
    """Returns the routes `/health`, `/health/live` and `/health/ready`."""
    router = APIRouter()

    @router.get("/health/live", summary="Whether the process is worth keeping", response_model=Status)
    async def live() -> Any:
        return _refusal(watched) if not watched.is_alive else Status(status="live")

    @router.get("/health/ready", summary="Whether requests are taken", response_model=Status)
    async def ready() -> Any:
        return _refusal(watched) if not watched.is_ready else Status(status="ready")

    @router.get("/health", summary="Whether requests are taken", response_model=Status)
    async def health() -> Any:
        return _refusal(watched) if not watched.is_ready else Status(status="ready")

    return router


def make_load_router(llm: Any) -> APIRouter:
    """Returns the route `/load`."""
    router = APIRouter()

    @router.get("/load", summary="How much there is to do")
    async def load() -> Load:
        stats = llm.stats()
        return Load(
            server_load=llm.num_unfinished,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            queue_s=round(llm.queue_s, 3),
        )

    return router


def _refusal(watched: Watched) -> Response:
    """503, and why."""
    if not watched.is_alive:
        return ApiError("engine_stopped", "the engine has stopped; start the server again").response()
    if watched.is_draining:
        return ApiError("draining", "the server is shutting down", headers=RETRY_AFTER).response()
    return ApiError("not_ready", "the model is being loaded", headers=RETRY_AFTER).response()
