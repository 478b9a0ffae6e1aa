"""A server at twice its capacity for ten minutes: what it refuses, how long the rest waits, and whether memory grows.

    python -m benchmarks.soak                           # the embedded demo, ten minutes
    python -m benchmarks.soak --model ARTIFACT --minutes 3 --json soak.json

Capacity is measured first, with as many clients as keep every place taken. Then requests arrive at `--load` times that
rate, whatever the server does. Every request must be answered in full or refused with 429 and Retry-After; the 99th
percentile of those let in must stay within twice what a full queue takes at the measured capacity, so that the machine
should have nothing else to do; RssAnon + VmSwap must grow by less than 1 % from the second minute to the end; and
nothing may be compiled, or held when all is over. Exit 1 where it is not so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.http_client import Answer, Connections
from fastgpt_jax.cli.common import run, to_options

ROOT = Path(__file__).resolve().parents[1]
SETTLED_S = 120.0
"""What is allocated once has been by then; shorter runs take a fifth of their time."""
WINDOW_S = 10.0
MAX_GROWTH = 0.01


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    minutes: float
    load: float
    queue: int
    tokens: int
    capacity_s: float
    seed: int
    json: str | None


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request as its client saw it."""

    seconds: float
    answer: Answer
    num_tokens: int
    ended_s: float

    @property
    def is_whole(self) -> bool:
        return self.answer.status == 200 and self.answer.json()["usage"]["completion_tokens"] == self.num_tokens

    @property
    def is_refused(self) -> bool:
        return self.answer.status == 429 and int(self.answer.headers.get("retry-after", 0)) >= 1


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    demo = str(ROOT / "fastgpt_jax/assets/demo")
    flags.DEFINE_string("model", demo, "What fastgpt serve takes.", flag_values=values)
    flags.DEFINE_float("minutes", 10.0, "How long.", flag_values=values)
    flags.DEFINE_float("load", 2.0, "Times the capacity.", flag_values=values)
    flags.DEFINE_integer("queue", 32, "Sequences that may wait.", flag_values=values)
    flags.DEFINE_integer("tokens", 32, "Mean tokens of an answer.", flag_values=values)
    flags.DEFINE_float("capacity_s", 15.0, "How long capacity is measured.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of arrivals, prompts and lengths.", flag_values=values)
    flags.DEFINE_string("json", None, "Where the figures go.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    description = (__doc__ or "").partition("\n\n")[0]
    return run("soak", make_flags(), lambda values: execute(to_options(values, Options)), argv, description=description)


def execute(options: Options) -> int:
    """Starts a server, loads it, judges."""
    command = [sys.executable, str(ROOT / "tools/serve.py"), f"--model={options.model}", "--port=0"]
    command += [f"--max_queue_len={options.queue}", "--log_level=warning"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        announced = server.stdout.readline() if server.stdout else ""
        if not announced:
            return server.wait()
        port = int(announced.rsplit(":", 1)[1])
        figures = asyncio.run(soak(options, server.pid, port))
        server.send_signal(signal.SIGTERM)
        figures["exit_code"] = server.wait(60)
    finally:
        server.kill()
    failures = judge(figures)
    text = json.dumps({**figures, "failures": failures}, indent=2)
    print(text)
    if options.json is not None:
        Path(options.json).write_text(text + "\n")
    return 1 if failures else 0


async def soak(options: Options, pid: int, port: int) -> dict[str, Any]:
    """Measures capacity, then loads the server beyond it; returns figures."""
    connections = Connections("127.0.0.1", port)
    while (await connections.get("/health/ready")).status != 200:
        await asyncio.sleep(0.2)
    places = int(_metric((await connections.get("/metrics")).body, "vllm:cache_config_info", label="max_num_seqs"))
    rng = random.Random(options.seed)
    rate = await _capacity(connections, options, rng, 2 * places)
    memory: list[tuple[float, int]] = []
    begun_s = time.monotonic()
    watching = asyncio.create_task(_watch(pid, memory))
    sent = await _open_loop(connections, options, rng, options.load * rate)
    await asyncio.sleep(1.0)
    watching.cancel()
    metrics = (await connections.get("/metrics")).body
    connections.close()
    whole = sorted(one.seconds for one in sent if one.is_whole)
    slowest = _slowest([one.ended_s - begun_s for one in sent if one.is_whole], 60 * options.minutes)
    return {
        "cores": os.cpu_count(),
        "capacity_per_s": round(rate, 2),
        "offered_per_s": round(options.load * rate, 2),
        "seconds": round(60 * options.minutes, 1),
        "num_sent": len(sent),
        "num_whole": len(whole),
        "num_refused": sum(one.is_refused for one in sent),
        "num_lost": sum(not (one.is_whole or one.is_refused) for one in sent),
        "statuses": dict(Counter(one.answer.status for one in sent)),
        "served_per_s": round(len(whole) / (60 * options.minutes), 2),
        "p50_s": round(whole[len(whole) // 2], 3) if whole else None,
        "p99_s": round(whole[int(0.99 * len(whole))], 3) if whole else None,
        "full_queue_s": round((options.queue + places) / rate, 3),
        "slowest_per_s": round(slowest, 2),
        **_memory_figures(memory, 60 * options.minutes),
        "kv_cache_usage": _metric(metrics, "vllm:kv_cache_usage_perc"),
        "compile_total": _metric(metrics, "fastgpt_compile_total"),
    }


def judge(figures: dict[str, Any]) -> list[str]:
    """Returns what is not as it should be."""
    found = []
    if figures["num_lost"] or figures["exit_code"]:
        found.append(f"{figures['num_lost']} requests were lost, exit code {figures['exit_code']}")
    if not figures["num_refused"]:
        found.append("nothing was refused, so that this was no overload")
    if figures["p99_s"] is None or figures["p99_s"] > 2 * figures["full_queue_s"]:
        found.append(f"p99 is {figures['p99_s']} s and a full queue takes {figures['full_queue_s']} s")
    if figures["memory_growth"] >= MAX_GROWTH:
        found.append(f"memory grew by {figures['memory_growth']:.2%}")
    if figures["kv_cache_usage"] or figures["compile_total"]:
        found.append(f"KV use {figures['kv_cache_usage']}, {figures['compile_total']} compilations")
    return found


async def _capacity(connections: Connections, options: Options, rng: random.Random, num_clients: int) -> float:
    """Requests a second with every place taken, the first fifth of the time left out."""
    ended: list[float] = []
    stop_s = time.monotonic() + options.capacity_s

    async def client() -> None:
        while time.monotonic() < stop_s:
            await _ask(connections, options, rng)
            ended.append(time.monotonic())

    start_s = time.monotonic() + options.capacity_s / 5
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return sum(start_s <= at_s <= stop_s for at_s in ended) / (stop_s - start_s)


async def _open_loop(connections: Connections, options: Options, rng: random.Random, rate: float) -> list[Sent]:
    """Sends at times that are independent of each other and of the server."""
    tasks = []
    next_s, stop_s = time.monotonic(), time.monotonic() + 60 * options.minutes
    while next_s < stop_s:
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        tasks.append(asyncio.create_task(_ask(connections, options, rng)))
        next_s += rng.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def _ask(connections: Connections, options: Options, rng: random.Random) -> Sent:
    num_tokens = rng.randint(1, 2 * options.tokens - 1)
    prompt = [rng.randint(3, 99) for _ in range(rng.randint(4, 60))]
    started_s = time.monotonic()
    fields = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0.8}
    answer = await connections.post("/v1/completions", fields)
    ended_s = time.monotonic()
    return Sent(ended_s - started_s, answer, num_tokens, ended_s)


def _slowest(ended_s: Sequence[float], seconds: float) -> float:
    """Answers a second in the window that had fewest, the first and the last left out."""
    windows = Counter(int(at_s // WINDOW_S) for at_s in ended_s)
    return min((windows[index] for index in range(1, int(seconds // WINDOW_S) - 1)), default=0) / WINDOW_S


async def _watch(pid: int, memory: list[tuple[float, int]]) -> None:
    started_s = time.monotonic()
    while True:
        memory.append((time.monotonic() - started_s, _memory_bytes(pid)))
        await asyncio.sleep(1.0)


def _memory_bytes(pid: int) -> int:
    """RssAnon + VmSwap: pages of files come and go, and what was swapped out still counts."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def _memory_figures(memory: Sequence[tuple[float, int]], seconds: float) -> dict[str, Any]:
    settled_s = min(SETTLED_S, seconds / 5)
    window_s = min(WINDOW_S, seconds / 10)
    early = statistics.median(nbytes for at_s, nbytes in memory if settled_s <= at_s <= settled_s + window_s)
    late = statistics.median(nbytes for at_s, nbytes in memory if at_s >= seconds - window_s)
    return {
        "memory_from_s": settled_s,
        "memory_early_mib": round(early / 2**20, 2),
        "memory_late_mib": round(late / 2**20, 2),
        "memory_growth": round(late / early - 1, 5),
    }


def _metric(body: bytes, name: str, label: str | None = None) -> float:
    """A sample's value, or that of one of its labels."""
    line = next(line for line in body.decode().splitlines() if line.startswith((f"{name} ", f"{name}{{")))
    if label is not None:
        return float(line.split(f'{label}="')[1].split('"')[0])
    return float(line.rsplit(" ", 1)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
