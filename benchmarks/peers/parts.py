"""What is measured beside speed in turns: start and memory, exactness, long contexts, and a neighbour on one core.

Knows no table. The one idea: each part is a generator of rows, so that one of them can be run again by itself.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.contests import PROMPT, Contestant
from benchmarks.peers.protocol import EngineFailed, Worker
from benchmarks.peers.turns import SETTLE_S, Asked
from benchmarks.peers.worker import make_prompt

Open = Callable[[Contestant], Worker]
"""Starts a contestant's process with the setting that serves decoding."""

CONTEXTS = (128, 1024, 8192, 32768)
CONTEXT_STEPS = 8
CHECK_TOKENS, CHECK_TEXTS = 64, 2
NEIGHBOUR = "import time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"


def startup(
    contestants: Sequence[Contestant], open_worker: Open, rounds: int, prefill: int
) -> Iterator[dict[str, Any]]:
    """From starting a process to its first token, and the most memory after a prefill and some steps; files are cached.

    Args:
      prefill: Tokens of the prompt that the memory is taken after.
    """
    for index in range(rounds):
        for contestant in contestants:
            time.sleep(SETTLE_S)
            row = {"row": "startup", "contestant": contestant.label, "round": index}
            try:
                with open_worker(contestant) as worker:
                    load_s = worker.wait_until_ready()["load_s"]
                    first_s = worker.ask("first_token", tokens=PROMPT, seed=1)["seconds"]
                    worker.ask("prefill", tokens=prefill, seed=2)
                    worker.ask("decode", batch=1, prompt=PROMPT, steps=4, seed=3)
                    yield {**row, "load_s": load_s, "first_token_s": first_s, **worker.ask("memory")}
            except EngineFailed as error:
                yield failed(contestant.label, "startup", error)


def exactness(contestant: Contestant, open_worker: Open, source: Path) -> Iterator[dict[str, Any]]:
    """Our artifact against the float32 forward of the same folder, in its process."""
    build = dataclasses.asdict(contestant.build) if contestant.build else {}
    try:
        with open_worker(contestant) as worker:
            worker.wait_until_ready()
            found = worker.ask("check", source=str(source), tokens=CHECK_TOKENS, texts=CHECK_TEXTS, build=build)
            yield {"row": "exactness", "contestant": contestant.label, **found}
    except EngineFailed as error:
        yield failed(contestant.label, "exactness", error)


def same_model(
    contestants: Sequence[Contestant], open_worker: Open, reference: Contestant, vocab_size: int
) -> Iterator[dict[str, Any]]:
    """Whether the other engines compute this model: distance of each one's next-token distribution from torch's."""
    ids = make_prompt(vocab_size, CHECK_TOKENS, 9)
    try:
        expected = _logits(reference, open_worker, ids)
    except EngineFailed as error:
        yield failed(reference.label, "same model", error)
        return
    for contestant in contestants:
        try:
            kld = divergence(expected, _logits(contestant, open_worker, ids))
            yield {"row": "same_model", "contestant": contestant.label, "kld": kld}
        except EngineFailed as error:
            yield failed(contestant.label, "same model", error)


def ceiling(worker: Asked, rounds: int) -> Iterator[dict[str, Any]]:
    """The arithmetic that prefill is held against, a row a round."""
    worker.wait_until_ready()
    for index in range(rounds):
        yield {"row": "ceiling", "round": index, **worker.ask("ceiling")}


def context(worker: Asked, label: str, bandwidth: Callable[[], float], rounds: int) -> Iterator[dict[str, Any]]:
    """Time of our bare step with so many tokens before it."""
    worker.wait_until_ready()
    for index in range(-1, rounds):  # the first round warms up
        for tokens in CONTEXTS:
            at = {"batch": 1, "prompt": tokens - CONTEXT_STEPS, "steps": CONTEXT_STEPS, "seed": 1}
            seconds = worker.ask("bare_decode", **at)["seconds"]
            if index >= 0:
                row = {"row": "context", "contestant": label, "round": index, "tokens": tokens}
                yield {**row, "seconds": seconds, "bandwidth": bandwidth()}


def neighbour(workers: Mapping[str, Asked], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Decoding of one prompt, idle and with a process that takes one core whenever it can, in turns."""
    for index in range(rounds):
        for is_loaded in (False, True):
            for label, worker in workers.items():
                time.sleep(SETTLE_S)
                with _Neighbour(is_loaded):
                    seconds = worker.ask("decode", batch=1, prompt=PROMPT, steps=steps, seed=200 + index)["seconds"]
                row = {"row": "neighbour", "contestant": label, "round": index, "is_loaded": is_loaded}
                yield {**row, "seconds": seconds}


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected || found) of two rows of logits, in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64).ravel()
        x = x - x.max()
        return x - np.log(np.exp(x).sum())

    p, q = log_softmax(expected), log_softmax(found)
    return float(np.sum(np.exp(p) * (p - q)))


def failed(label: str, measure: str, error: Exception) -> dict[str, Any]:
    """The row of what could not be measured."""
    return {"row": "failed", "contestant": label, "measure": measure, "why": str(error)}


def added_over_limit(rows: Sequence[Mapping[str, Any]], kv_bytes_a_token: int) -> dict[int, float]:
    """For each context, (t(n) - t(128)) over the time that the run's bandwidth takes for the keys and values added."""
    seconds = {n: statistics.median(r["seconds"] for r in rows if r["tokens"] == n) for n in CONTEXTS}
    bandwidth = statistics.median(row["bandwidth"] for row in rows)
    first = CONTEXTS[0]
    return {n: (seconds[n] - seconds[first]) * bandwidth / ((n - first) * kv_bytes_a_token) for n in CONTEXTS[1:]}


def _logits(contestant: Contestant, open_worker: Open, ids: list[int]) -> np.ndarray:
    with open_worker(contestant) as worker, tempfile.TemporaryDirectory() as folder:
        worker.wait_until_ready()
        path = Path(folder, "logits.npy")
        worker.ask("logits", ids=ids, path=str(path))
        return np.load(path)


class _Neighbour:
    """A busy process bound to the first core that this one may use."""

    def __init__(self, is_there: bool):
        self._is_there = is_there
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> subprocess.Popen[bytes] | None:
        if self._is_there:
            self._process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
            os.sched_setaffinity(self._process.pid, {min(os.sched_getaffinity(0))})
            time.sleep(SETTLE_S)
        return self._process

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
