"""Server-sent events: an answer that is written while it is made.

Knows no body of an answer. The one idea: the first event is awaited before the status is sent, so that what is refused
is refused with its status; what goes wrong after that is an event of its own, as OpenAI's clients expect it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgpt_jax.serving.errors import as_api_error
from fastgpt_jax.serving.running import ClientGone, unless_gone

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_log = logging.getLogger(__name__)


class EventStream(Response):
    """Sends events as they come; leaves off, and closes the generator, as soon as the client has gone."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]):
        super().__init__(None, 200, HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._rest):
            with contextlib.suppress(ClientGone):
                await unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _send(send, self._first)
        try:
            async for chunk in self._rest:
                await _send(send, chunk)
        except OSError:
            raise ClientGone from None
        except Exception as error:  # The status is out, so this is how a client learns of it.
            answer = as_api_error(error)
            if answer.code == "internal_error":
                _log.exception("an answer ended early")
            await _send(send, b"data: " + json.dumps(answer.body()).encode() + b"\n\n")
        await _send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def answer_stream(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """Waits for the first event; an error before it is raised, and a client that has gone gets nothing."""
    try:
        first = await unless_gone(request.receive, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)
