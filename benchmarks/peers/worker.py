"""The process of one engine: `python -m benchmarks.peers.worker ENGINE SETTINGS`, started by `protocol.Worker`.

Knows no other engine. The one idea: what an engine or its libraries print goes to standard error, and standard output
holds answers alone, one line of JSON each; whatever goes wrong is an answer too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers.shapes import FIRST_ID

ENGINES = {
    "fastgpt": "benchmarks.peers.engine_fastgpt",
    "llama.cpp": "benchmarks.peers.engine_llama_cpp",
    "openvino": "benchmarks.peers.engine_openvino",
    "ctranslate2": "benchmarks.peers.engine_ctranslate2",
    "torch": "benchmarks.peers.engine_torch",
    "ceiling": "benchmarks.peers.engine_ceiling",
}
TEMPERATURE, TOP_K = 0.8, 40
"""How every engine draws its tokens."""


class Engine(Protocol):
    """What an engine's module provides as `Engine`: made with its settings as keywords, model loaded."""

    vocab_size: int

    def about(self) -> dict[str, Any]:
        """Versions, build flags and settings, as the engine itself reports them."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of a step in which every prompt gets one more token, sampled, all prompts being read."""
        ...

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        ...

    def logits(self, prompt: list[int]) -> Any:
        """Of the token after a prompt, up to a constant: an array of all ids."""
        ...


def main(name: str, settings: dict[str, Any]) -> None:
    """Loads the engine, then answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = settings.pop("started")
    settings.pop("env", None)
    settings.pop("is_loud", None)
    clock: dict[str, float] = {}

    def load() -> dict[str, Any]:
        nonlocal engine
        engine = importlib.import_module(ENGINES[name]).Engine(**settings)
        clock["load"] = time.monotonic() - started
        return {**engine.about(), "load_s": clock["load"]}

    engine: Any = None
    _answer(answers, load)
    if engine is None:
        return
    for line in sys.stdin:
        asked = json.loads(line)
        command = COMMANDS.get(asked.pop("do"))
        if command is None:
            _answer(answers, lambda: {"error": f"known are {', '.join(COMMANDS)}"})
            continue
        _answer(answers, lambda command=command, asked=asked: command(engine, started=started, **asked))


def decode(engine: Engine, *, batch: int, prompt: int, steps: int, seed: int, started: float) -> dict[str, Any]:
    prompts = [make_prompt(engine.vocab_size, prompt, seed * 1000 + index) for index in range(batch)]
    return {"seconds": engine.decode(prompts, steps)}


def prefill(engine: Engine, *, tokens: int, seed: int, started: float) -> dict[str, Any]:
    return {"seconds": engine.prefill(make_prompt(engine.vocab_size, tokens, seed))}


def first_token(engine: Engine, *, tokens: int, seed: int, started: float) -> dict[str, Any]:
    """Seconds from the start of the process to the first token of its first prompt."""
    engine.prefill(make_prompt(engine.vocab_size, tokens, seed))
    return {"seconds": time.monotonic() - started}


def bare_decode(engine: Any, *, batch: int, prompt: int, steps: int, seed: int, started: float) -> dict[str, Any]:
    """Seconds of a step without scheduler and sampler, where an engine can be taken apart."""
    return {"seconds": engine.bare_decode(batch, prompt, steps)}


def logits(engine: Engine, *, ids: list[int], path: str, started: float) -> dict[str, Any]:
    """Writes the logits after a prompt into a file of numpy's."""
    import numpy as np  # noqa: PLC0415 - the process of ours counts what it imports at start

    np.save(path, np.asarray(engine.logits(ids), np.float32))
    return {}


def ceiling(engine: Any, *, started: float) -> dict[str, Any]:
    """Operations a second of matrix products by the type of their numbers."""
    return engine.ceiling()


def check(engine: Any, *, started: float, **arguments: Any) -> dict[str, Any]:
    """What an engine can tell of its own exactness."""
    return engine.check(**arguments)


def memory(engine: Engine, *, started: float) -> dict[str, Any]:
    """Memory of this process in bytes: the most that was resident, and what is now, private and of mapped files."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssFile"):
            fields[name] = int(value.split()[0]) * 1024
    return fields


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "decode": decode,
    "prefill": prefill,
    "first_token": first_token,
    "bare_decode": bare_decode,
    "logits": logits,
    "check": check,
    "ceiling": ceiling,
    "memory": memory,
}


def make_prompt(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    """Ids that no engine has seen before, so that no cache of prompts helps; the first three ids are special."""
    state, ids = seed * 2654435761 % 2**31 + 1, []
    for _ in range(num_tokens):
        state = state * 48271 % (2**31 - 1)
        ids.append(FIRST_ID + state % (vocab_size - FIRST_ID))
    return ids


def _answer(answers: Any, work: Callable[[], dict[str, Any]]) -> None:
    try:
        found = work()
    except Exception as error:  # whatever an engine raises is for the parent to judge
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
