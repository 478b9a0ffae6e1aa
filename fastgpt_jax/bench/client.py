"""A client of any OpenAI-compatible server: streams completions of token ids, and stamps each piece as it arrives.

Knows no workload. Requests go out over one pool of connections without a limit, so that nothing queues in the client.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from fastgpt_jax.bench.record import Record
from fastgpt_jax.bench.workload import FIRST_ID, Asked
from fastgpt_jax.errors import UserError

_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class Client:
    """Asks one server for one model."""

    def __init__(self, base_url: str, model: str, *, api_key: str | None, timeout_s: float, ignore_eos: bool):
        """Args: ignore_eos: Ask for answers of full length, by a field that vLLM and this project know."""
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._url = base_url.rstrip("/") + "/v1/completions"
        self._model, self._ignore_eos = model, ignore_eos
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=_LIMITS)

    async def close(self) -> None:
        await self._http.aclose()

    async def check(self) -> None:
        """Raises UserError where the server does not answer a small request."""
        body = self._body(Asked(0.0, (FIRST_ID, FIRST_ID), 1)) | {"stream": False}
        body.pop("stream_options")
        try:
            found = await self._http.post(self._url, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"{self._url} cannot be reached: {error or type(error).__name__}") from None
        if found.status_code != 200:
            raise UserError(f"{self._url} answers {found.status_code}: {found.text[:300]}")

    async def ask(self, asked: Asked) -> Record:
        """Streams one answer; a failure is a record too."""
        sent_s = time.perf_counter()
        pieces: list[float] = []
        num_tokens, status, was_cancelled = 0, 0, False
        try:
            async with self._http.stream("POST", self._url, json=self._body(asked)) as response:
                status = response.status_code
                async for line in response.aiter_lines():
                    event = _event(line)
                    if event is None:
                        continue
                    if "error" in event:
                        status = 500
                        break
                    if (event.get("usage") or {}).get("completion_tokens"):
                        num_tokens = event["usage"]["completion_tokens"]
                    if any(_has_news(choice) for choice in event.get("choices", ())):
                        pieces.append(time.perf_counter())
                    if asked.cancel_after is not None and len(pieces) >= asked.cancel_after:
                        was_cancelled = True
                        break
        except httpx.HTTPError:
            status = 0
        counted = num_tokens or len(pieces)
        return Record(sent_s, tuple(pieces), time.perf_counter(), len(asked.prompt_ids), counted, status, was_cancelled)

    def _body(self, asked: Asked) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(asked.prompt_ids),
            "max_tokens": asked.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | {"ignore_eos": True} if self._ignore_eos else body


def _event(line: str) -> dict[str, Any] | None:
    """The JSON object of a line of server-sent events; None of other lines."""
    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
        return None
    try:
        found = json.loads(line[5:])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _has_news(choice: dict[str, Any]) -> bool:
    return bool(choice.get("text")) or bool(choice.get("token_ids"))
