"""A server's routes, called in this process: what a batch asks is what a client would ask, and is answered alike.

Knows no files. The one idea: a request passes through the very application that serves HTTP, without a socket, so that
no field is read, checked or answered in two ways.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from fastgpt_jax.batch.job import Response
from fastgpt_jax.batch.requests import BatchRequest
from fastgpt_jax.errors import UserError

BUSY, UNAVAILABLE = 429, 503
MAX_WAIT_S = 5.0
_JSON = {"Content-Type": "application/json"}


class InProcess:
    """Calls an ASGI application."""

    def __init__(self, app: Any):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None)

    async def __aenter__(self) -> InProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def __call__(self, request: BatchRequest) -> Response:
        """Answers a request; one that finds no room, as where many forms of texts compile, is asked again.

        Raises:
          UserError: The engine has stopped; the request has no answer yet.
        """
        while (found := await self._ask(request)).status_code == BUSY:
            await asyncio.sleep(min(float(found.headers.get("Retry-After", 1)), MAX_WAIT_S))
        body = found.json()
        if found.status_code == UNAVAILABLE:
            message = body.get("error", {}).get("message", "it takes no more requests")
            raise UserError(f"the engine stopped: {message}; run the same command again to go on")
        return Response(found.status_code, found.headers.get("X-Request-Id", ""), body)

    async def _ask(self, request: BatchRequest) -> httpx.Response:
        return await self._client.post(request.url, content=request.content, headers=_JSON)
