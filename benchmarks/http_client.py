"""An HTTP client of a few lines, so that a load test measures the server: one connection, one request at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
    """Status 0 means that the connection broke."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connections:
    """Connections to one server, as many as there are requests at the same time."""

    def __init__(self, host: str, port: int):
        self._host, self._port = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, fields: Mapping[str, Any]) -> Answer:
        """Sends a JSON body."""
        return await self.send("POST", path, json.dumps(fields).encode())

    async def get(self, path: str) -> Answer:
        return await self.send("GET", path, b"")

    async def send(self, method: str, path: str, body: bytes) -> Answer:
        """Sends a request over an idle connection, or a new one; one that the server had closed is replaced once."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        while self._idle:
            answer = await self._exchange(*self._idle.pop(), request)
            if answer is not None:
                return answer
        try:
            opened = await asyncio.open_connection(self._host, self._port)
        except OSError:
            return Answer(0, {}, b"")
        return await self._exchange(*opened, request) or Answer(0, {}, b"")

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> Answer | None:
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status_line, *lines = head.split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        except (OSError, asyncio.IncompleteReadError, ValueError):
            writer.close()
            return None
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return Answer(int(status_line.split()[1]), headers, body)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
