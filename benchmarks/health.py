"""How soon `/health/live` answers while a long prompt is run, which takes all cores of the machine.

    python -m benchmarks.health                 # a random Llama whose prefill of 2,047 tokens takes seconds

The server is a process of its own. Exit 1 where an answer took longer than 100 ms, or where the prefill was too short
to show anything.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from flax import nnx

import fastgpt_jax
from benchmarks.http_client import Connections
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.models.llama import Llama, LlamaConfig
from fastgpt_jax.serving.app import make_app
from fastgpt_jax.serving.async_llm import AsyncLLM
from fastgpt_jax.serving.lifecycle import Served, run_server
from fastgpt_jax.serving.metrics import ServerMetrics
from fastgpt_jax.serving.settings import ServerSettings

LENGTH = 2048
LIMIT_S = 0.1
POLL_S = 0.01
MIN_PREFILL_S = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    width: int
    layers: int
    rounds: int
    serves: bool


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    flags.DEFINE_integer("width", 1024, "Width of the model.", flag_values=values)
    flags.DEFINE_integer("layers", 4, "Layers of the model.", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Prompts, one after the other.", flag_values=values)
    flags.DEFINE_bool("serves", False, "Be the server.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    description = (__doc__ or "").partition("\n\n")[0]
    return run(
        "health", make_flags(), lambda values: execute(to_options(values, Options)), argv, description=description
    )


def execute(options: Options) -> int:
    """Starts a server, asks, judges; or is the server."""
    if options.serves:
        settings = ServerSettings(port=0, log_level="warning")
        return asyncio.run(run_server(settings, lambda: _load(options), lambda url: print(url, flush=True)))
    command = [sys.executable, "-m", "benchmarks.health", "--serves"]
    command += [f"--width={options.width}", f"--layers={options.layers}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        announced = server.stdout.readline() if server.stdout else ""
        if not announced:
            return server.wait()
        figures = asyncio.run(ask(options, int(announced.rsplit(":", 1)[1].strip().rstrip("/"))))
        server.terminate()
        server.wait(60)
    finally:
        server.kill()
    print(json.dumps(figures, indent=2))
    return int(figures["worst_ms"] > 1e3 * LIMIT_S or figures["prefill_s"] < MIN_PREFILL_S)


async def ask(options: Options, port: int) -> dict[str, Any]:
    """Sends long prompts, and asks for the server's health meanwhile; returns figures."""
    connections = Connections("127.0.0.1", port)
    while (await connections.get("/health/ready")).status != 200:
        await asyncio.sleep(0.2)
    prefills, answers = [], []
    for number in range(options.rounds):
        fields = {"prompt": [number + 1] * (LENGTH - 1), "max_tokens": 1}
        started_s = time.monotonic()
        running = asyncio.create_task(connections.post("/v1/completions", fields))
        while not running.done():
            asked_s = time.monotonic()
            status = (await connections.get("/health/live")).status
            answers.append((time.monotonic() - asked_s) if status == 200 else float("inf"))
            await asyncio.sleep(POLL_S)
        if (await running).status != 200:
            raise RuntimeError(f"the prompt was answered with {running.result().status}")
        prefills.append(time.monotonic() - started_s)
    connections.close()
    answers.sort()
    return {
        "cores": os.cpu_count(),
        "prefill_s": round(min(prefills), 3),
        "num_asked": len(answers),
        "median_ms": round(1e3 * answers[len(answers) // 2], 2),
        "p99_ms": round(1e3 * answers[int(0.99 * len(answers))], 2),
        "worst_ms": round(1e3 * answers[-1], 2),
    }


def _load(options: Options) -> Served:
    """A random model whose only prefill step takes a whole prompt, compiled and run once."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        head_dim=64,
        max_position_embeddings=LENGTH,
    )
    compiled = fastgpt_jax.compile(
        Llama(config, rngs=nnx.Rngs(0)),
        config=fastgpt_jax.CompileConfig(
            max_model_len=LENGTH,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            prefill_buckets=(LENGTH,),
            decode_buckets=(1,),
        ),
    )
    engine = LLMEngine(compiled)
    engine.generate([[500] * (LENGTH - 1)], {"temperature": 1.0, "max_tokens": 1})
    llm = AsyncLLM(engine, max_queue_len=16, max_queued_tokens=2**20)
    settings = ServerSettings(port=0)
    return Served(llm, make_app(llm, settings, counted=ServerMetrics(llm)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
