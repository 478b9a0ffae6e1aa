"""What surrounds every request: its id, the size of its headers, and an answer whatever happens.

Knows no route. The one idea: plain ASGI, a few comparisons a request, so that answers from the cache stay fast; an
exception that nobody expected becomes one line for the client and a traceback for the log.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgpt_jax.serving.errors import ApiError, as_api_error

REQUEST_ID = b"x-request-id"
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:/=+-]+")
_log = logging.getLogger(__name__)


class Surround:
    """Gives a request its id, which the answer repeats, and turns every exception into an answer."""

    def __init__(self, app: ASGIApp, *, max_header_bytes: int, max_request_id_chars: int):
        self._app = app
        self._max_header_bytes, self._max_id_len = max_header_bytes, max_request_id_chars

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message["headers"] = [*message.get("headers", []), (REQUEST_ID, request_id)]
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
                message = f"the headers may have {self._max_header_bytes} bytes at most"
                raise ApiError("headers_too_large", message, headers={"Connection": "close"})
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # The last place where one can be answered.
            if not isinstance(error, ApiError):
                _log.exception("request %s failed", request_id.decode())
            if is_started:
                raise
            await as_api_error(error).response()(scope, receive, send_with_id)

    def _request_id(self, scope: MutableMapping[str, Any]) -> bytes:
        """The client's own id where it is short and plain, else a new one."""
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
        if len(given) <= self._max_id_len and _SAFE_ID.fullmatch(given):
            return given
        return b"req-" + uuid.uuid4().hex.encode()
