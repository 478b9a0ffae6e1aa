"""Answers that are the same every time are given again, byte for byte, without asking the engine.

Knows no body but two of its fields. The one idea: a request at temperature 0, or with a seed, has one answer, so the
answer is kept under a digest of the model, of whose key it was, and of the whole request. What is found is sent as it
was (its `id` and `created` too; a stream comes at once), with the header `x-fastgpt-cache: hit`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgpt_jax.serving.body import body_too_large
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.settings import ServerSettings

PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"})
HEADER = b"x-fastgpt-cache"
OVERHEAD_BYTES = 512
"""What an entry takes beside its body, about."""
MAX_SHARE = 1 / 8
"""Of the cache, for one answer."""
_ERROR_EVENT = b'data: {"error"'


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was sent, and until when it may be sent again, on the monotonic clock."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    expires_s: float

    @property
    def nbytes(self) -> int:
        return len(self.body) + OVERHEAD_BYTES


class ResultCache:
    """Answers by key; those used longest ago leave first. Invariant: `nbytes` is their sum, and within the limit."""

    def __init__(self, *, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic):
        self._ttl_s, self._max_bytes, self._clock = ttl_s, max_bytes, clock
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self.nbytes = self.num_hits = self.num_misses = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def max_answer_bytes(self) -> int:
        """The longest body that is kept."""
        return int(self._max_bytes * MAX_SHARE) - OVERHEAD_BYTES

    def get(self, key: bytes) -> Answer | None:
        """Returns what is kept, unless it is too old; counts."""
        answer = self._answers.get(key)
        if answer is not None and answer.expires_s <= self._clock():
            self._remove(key)
            answer = None
        if answer is None:
            self.num_misses += 1
            return None
        self._answers.move_to_end(key)
        self.num_hits += 1
        return answer

    def put(self, key: bytes, headers: tuple[tuple[bytes, bytes], ...], body: bytes) -> None:
        """Keeps an answer, in place of those that were used longest ago; not one that would take most of the room."""
        answer = Answer(headers, body, self._clock() + self._ttl_s)
        if len(body) > self.max_answer_bytes:
            return
        if key in self._answers:
            self._remove(key)
        self._answers[key] = answer
        self.nbytes += answer.nbytes
        while self.nbytes > self._max_bytes:
            self._remove(next(iter(self._answers)))

    def _remove(self, key: bytes) -> None:
        self.nbytes -= self._answers.pop(key).nbytes

    def collect(self) -> Iterator[Metric]:
        """Yields its metrics."""
        yield CounterMetricFamily("fastgpt_result_cache_hits", "Answers given again.", self.num_hits)
        yield CounterMetricFamily("fastgpt_result_cache_misses", "Answers that were not kept.", self.num_misses)
        yield GaugeMetricFamily("fastgpt_result_cache_entries", "Answers kept.", len(self))
        yield GaugeMetricFamily("fastgpt_result_cache_bytes", "Bytes that they take.", self.nbytes)


class CacheResults:
    """Stands before the routes and behind the check of keys."""

    def __init__(self, app: ASGIApp, cache: ResultCache, settings: ServerSettings, model_digest: str, watched: Any):
        """Args: watched: An `AsyncLLM`; while it takes nothing new, nothing old is given either."""
        self._app, self._cache, self._settings, self._watched = app, cache, settings, watched
        self._model = hashlib.sha256(model_digest.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not (scope["type"] == "http" and scope["path"] in PATHS and self._may_be_kept(scope)):
            await self._app(scope, receive, send)
            return
        messages = await self._read(receive)
        body = b"".join(message.get("body", b"") for message in messages)
        key = self._key(scope, body)
        if key is None:
            await self._app(scope, _replay(messages, receive), send)
        elif (answer := self._cache.get(key)) is not None:
            await send({"type": "http.response.start", "status": 200, "headers": [*answer.headers, (HEADER, b"hit")]})
            await send({"type": "http.response.body", "body": answer.body})
        else:
            recorder = _Recorder(send, self._cache.max_answer_bytes)
            await self._app(scope, _replay(messages, receive), recorder)
            if recorder.is_whole and _ERROR_EVENT not in recorder.body:
                self._cache.put(key, recorder.headers, bytes(recorder.body))

    def _may_be_kept(self, scope: Scope) -> bool:
        """Whether this is a short JSON body, by its headers, at a time when requests are answered."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        return (
            scope["method"] == "POST"
            and length.isdigit()
            and int(length[:20]) <= self._settings.max_body_bytes
            and b"transfer-encoding" not in headers
            and headers.get(b"content-type", b"").startswith(b"application/json")
            and self._watched.is_ready
        )

    async def _read(self, receive: Receive) -> list[Message]:
        messages: list[Message] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while not messages or messages[-1].get("more_body", False):
                    messages.append(await receive())
                    num_bytes += len(messages[-1].get("body", b""))
                    if num_bytes > self._settings.max_body_bytes:
                        raise body_too_large(self._settings.max_body_bytes)
        except TimeoutError:
            seconds = self._settings.body_timeout_s
            raise ApiError("body_timeout", f"the body did not arrive within {seconds:g} s") from None
        return messages

    def _key(self, scope: Scope, body: bytes) -> bytes | None:
        """The key of a request that has one answer, else None. Names of fields may come in any order."""
        try:
            fields = from_json(body, allow_inf_nan=False)
        except ValueError:
            return None
        if not isinstance(fields, dict) or not is_deterministic(scope["path"], fields):
            return None
        whole = json.dumps([scope["path"], scope.get("state", {}).get("tenant"), fields], sort_keys=True)
        digest = self._model.copy()
        digest.update(whole.encode())
        return digest.digest()


def is_deterministic(path: str, fields: Mapping[str, Any]) -> bool:
    """Whether a request says itself that it has one answer."""
    temperature, seed = fields.get("temperature"), fields.get("seed")
    is_greedy = type(temperature) in (int, float) and temperature == 0
    return path.endswith("/embeddings") or is_greedy or (type(seed) is int and seed != -1)


class _Recorder:
    """Sends an answer on and keeps a copy of a success that is short enough.

    Attributes:
      is_whole: All of it was sent and is in `body`.
    """

    def __init__(self, send: Send, max_bytes: int):
        self._send, self._max_bytes = send, max_bytes
        self._is_kept = False
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.body = bytearray()
        self.is_whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_kept, self.headers = message["status"] == 200, tuple(message["headers"])
            message = {**message, "headers": [*self.headers, (HEADER, b"miss")]}
        elif message["type"] == "http.response.body" and self._is_kept:
            self.body += message.get("body", b"")
            if len(self.body) > self._max_bytes:
                self._is_kept, self.body = False, bytearray()
        await self._send(message)
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        self.is_whole = is_last and self._is_kept


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Returns a `receive` that gives what was read already, first."""
    waiting = iter(messages)

    async def receive_again() -> Message:
        for message in waiting:
            return message
        return await receive()

    return receive_again
