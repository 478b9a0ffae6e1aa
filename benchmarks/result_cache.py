"""How many answers a second the result cache gives, over real connections.

    python -m benchmarks.result_cache --model ARTIFACT      # the embedded demo without --model

The server and the client share the machine; `server_cpu_ms` is what the server alone needs for an answer. Every request
is the same; the first is computed, all others are hits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks.http_client import Connections
from fastgpt_jax.cli.common import run, to_options

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    seconds: float
    clients: int


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    demo = str(ROOT / "fastgpt_jax/assets/demo")
    flags.DEFINE_string("model", demo, "What fastgpt serve takes.", flag_values=values)
    flags.DEFINE_float("seconds", 10.0, "How long.", flag_values=values)
    flags.DEFINE_integer("clients", 16, "Connections that ask all the time.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    description = (__doc__ or "").partition("\n\n")[0]
    return run(
        "result_cache", make_flags(), lambda values: execute(to_options(values, Options)), argv, description=description
    )


def execute(options: Options) -> None:
    """Starts a server, asks, prints."""
    command = [sys.executable, str(ROOT / "tools/serve.py"), f"--model={options.model}", "--port=0"]
    command += ["--result_cache_ttl_s=600", "--log_level=warning"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int((server.stdout.readline() if server.stdout else "").rsplit(":", 1)[1])
        print(json.dumps(asyncio.run(measure(options, port, server.pid)), indent=2))
    finally:
        server.kill()


async def measure(options: Options, port: int, pid: int) -> dict[str, object]:
    """Asks one thing again and again; returns figures."""
    connections = Connections("127.0.0.1", port)
    while (await connections.get("/health/ready")).status != 200:
        await asyncio.sleep(0.2)
    body = json.dumps({"prompt": "ROMEO:\n", "max_tokens": 64, "temperature": 0}).encode()
    await connections.send("POST", "/v1/completions", body)
    told: Counter[str] = Counter()
    seconds: list[float] = []
    cpu_s = _cpu_seconds(pid)
    stop_s = time.perf_counter() + options.seconds

    async def ask() -> None:
        while (started_s := time.perf_counter()) < stop_s:
            answer = await connections.send("POST", "/v1/completions", body)
            seconds.append(time.perf_counter() - started_s)
            told[f"{answer.status} {answer.headers.get('x-fastgpt-cache')}"] += 1

    await asyncio.gather(*(ask() for _ in range(options.clients)))
    cpu_s = _cpu_seconds(pid) - cpu_s
    connections.close()
    seconds.sort()
    return {
        "cores": os.cpu_count(),
        "requests_per_s": round(len(seconds) / options.seconds, 1),
        "server_cpu_ms": round(1000 * cpu_s / len(seconds), 3),
        "answers": dict(told),
        "p50_ms": round(1000 * seconds[len(seconds) // 2], 2),
        "p99_ms": round(1000 * seconds[int(0.99 * len(seconds))], 2),
    }


def _cpu_seconds(pid: int) -> float:
    """What all threads of a process have used: on a busy machine it says more than the clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
