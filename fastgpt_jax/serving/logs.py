"""Log lines: JSON for machines or text for people, one for each request.

Knows no route. The one idea: a line says what was asked (method, path, id), how it ended and how long it took; never
a prompt, an answer, a key or a query string.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

QUIET_PREFIXES = ("/health", "/metrics", "/load")
"""Asked for all the time; logged at the level debug."""
_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
"""Fields of every log record; all others were given by `extra`."""
_log = logging.getLogger("fastgpt_jax.serving.access")


def configure_logging(log_format: str, level: str, stream: Any = None) -> None:
    """Sends all log lines of the process to standard error, in one format."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("fastgpt_jax", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
    # What uvicorn says of its own comings and goings is said better elsewhere.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, getattr(logging, level.upper())))


class JsonFormatter(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, and what else there is as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_utc(record.created), record.levelname.lower().ljust(7), record.getMessage()]
        words += [f"{name}={value}" for name, value in _extra(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class AccessLog:
    """Logs every request when its answer has been sent, or could not be."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        level = logging.DEBUG if scope["path"].startswith(QUIET_PREFIXES) else logging.INFO
        if not _log.isEnabledFor(level):
            await self._app(scope, receive, send)
            return
        seen = _Seen()

        async def watch(message: Message) -> None:
            seen.look(message)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            _log.log(level, "request", extra=seen.fields(scope))


class _Seen:
    """What went by of one answer."""

    def __init__(self):
        self._started_s = time.monotonic()
        self._status: int | None = None
        self._num_bytes = 0
        self._first_byte_s: float | None = None
        self._is_whole = False

    def look(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            if self._first_byte_s is None:
                self._first_byte_s = time.monotonic()
            self._num_bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)

    def fields(self, scope: Scope) -> Mapping[str, Any]:
        state = scope.get("state", {})
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": self._status,
            "ms": _ms(time.monotonic() - self._started_s),
            "first_byte_ms": None if self._first_byte_s is None else _ms(self._first_byte_s - self._started_s),
            "bytes": self._num_bytes,
            "whole": self._is_whole,
            "request_id": state.get("request_id"),
            "tenant": state.get("tenant"),
            "user": state.get("user"),
            "client": (scope.get("client") or (None,))[0],
        }
        return {name: value for name, value in fields.items() if value is not None}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _PLAIN}
