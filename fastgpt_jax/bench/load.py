"""Sends a workload: at its times whatever the server does (open loop), or so many at once (closed loop)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from fastgpt_jax.bench.record import Record
from fastgpt_jax.bench.workload import Asked

Ask = Callable[[Asked], Awaitable[Record]]


async def open_loop(requests: Sequence[Asked], ask: Ask) -> list[Record]:
    """Sends each request at its time; a server that falls behind is asked all the same."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def send(asked: Asked) -> Record:
        await asyncio.sleep(max(0.0, start + asked.at_s - loop.time()))
        return await ask(asked)

    return list(await asyncio.gather(*map(send, requests)))


async def closed_loop(requests: Sequence[Asked], ask: Ask, concurrency: int) -> list[Record]:
    """Keeps so many requests under way until all are answered."""
    left = iter(requests)
    records: list[Record] = []

    async def work() -> None:
        for asked in left:
            records.append(await ask(asked))

    await asyncio.gather(*[work() for _ in range(concurrency)])
    return records
