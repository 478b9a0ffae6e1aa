"""What is asked and when: requests of drawn or recorded lengths, with shared prefixes and clients that leave early.

Knows no server. The one idea: a workload is a list made before the clock starts, wholly decided by its seed, so that
two servers, or two settings of one, are asked the same.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt_jax.errors import UserError

FIRST_ID = 3
"""Ids below are left out of prompts: most vocabularies begin with markers of beginning, end and unknown."""
_SEVENTH_DIGIT = re.compile(r"(\.\d{6})\d+")
TRACE_BLOCK_TOKENS = 512
"""Prompt tokens that one of a trace's `hash_ids` stands for."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
      at_s: When it is sent, in seconds from the start; only an open loop heeds it.
      cancel_after: The client leaves after so many tokens; None stays to the end.
    """

    at_s: float
    prompt_ids: tuple[int, ...]
    max_tokens: int
    cancel_after: int | None = None


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Whole numbers drawn evenly from `low` to `high`."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high + 1))


@dataclasses.dataclass(frozen=True)
class Workload:
    """How requests are made.

    Attributes:
      num_requests: How many.
      prompt_len, output_len: In tokens; the prefix is part of the prompt.
      vocab_size: Prompts are random ids below this.
      prefix_len: Tokens that prompts begin with in common, in `num_prefixes` groups.
      cancel_share: Share of clients that leave, half-way through their answer on average.
    """

    num_requests: int
    prompt_len: Lengths
    output_len: Lengths
    vocab_size: int
    prefix_len: int = 0
    num_prefixes: int = 1
    cancel_share: float = 0.0

    def make(self, seed: int, rate: float | None) -> list[Asked]:
        """The requests.

        Args:
          rate: Mean arrivals a second, one independent of the other (Poisson); None sends all at once.
        """
        rng = np.random.default_rng(seed)
        gaps = np.zeros(self.num_requests) if rate is None else rng.exponential(1 / rate, self.num_requests)
        prefixes = [_ids(rng, self.prefix_len, self.vocab_size) for _ in range(self.num_prefixes)]
        asked = []
        for at_s in np.cumsum(gaps) - gaps[0]:
            prefix = prefixes[int(rng.integers(self.num_prefixes))]
            length = max(self.prompt_len.draw(rng), self.prefix_len + 1)
            prompt = prefix + _ids(rng, length - len(prefix), self.vocab_size)
            asked.append(self._request(rng, float(at_s), prompt, self.output_len.draw(rng)))
        return asked

    def _request(self, rng: np.random.Generator, at_s: float, prompt: tuple[int, ...], max_tokens: int) -> Asked:
        leaves = bool(rng.random() < self.cancel_share)
        return Asked(at_s, prompt, max_tokens, int(rng.integers(1, max_tokens + 1)) if leaves else None)


def replay(
    path: Path, *, num_requests: int, max_len: int, vocab_size: int, speed: float = 1.0, seed: int = 0
) -> list[Asked]:
    """The first requests of a recorded trace that fit a context.

    Reads Azure's form (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's (JSON lines: timestamp in
    milliseconds, input_length, output_length, hash_ids of blocks that are the same tokens wherever they occur).

    Args:
      max_len: Requests with more tokens of prompt and answer together are left out.
      speed: Times as fast as recorded.
    """
    rows = _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)
    asked: list[Asked] = []
    start_s = None
    try:
        for at_s, prompt_len, output_len, blocks in rows:
            if not 0 < prompt_len + output_len <= max_len or output_len < 1 or prompt_len < 1:
                continue
            start_s = at_s if start_s is None else start_s
            prompt = _block_ids(blocks, prompt_len, vocab_size, seed, len(asked))
            asked.append(Asked((at_s - start_s) / speed, prompt, output_len))
            if len(asked) == num_requests:
                return asked
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"--trace {path} is neither of Azure's form nor of Mooncake's: {error!r}") from None
    except OSError as error:
        raise UserError(f"cannot read --trace {path}: {error.strerror or error}") from None
    if not asked:
        raise UserError(f"no request of --trace {path} fits into --max_len={max_len} tokens")
    return asked


def _read_csv(path: Path) -> Iterator[tuple[float, int, int, Sequence[int]]]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            # Seven digits of a second, or six and an offset; the seventh is more than Python reads.
            at = datetime.datetime.fromisoformat(_SEVENTH_DIGIT.sub(r"\1", row["TIMESTAMP"]))
            at_s = (at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).timestamp()
            yield at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()


def _read_jsonl(path: Path) -> Iterator[tuple[float, int, int, Sequence[int]]]:
    with path.open() as file:
        for line in file:
            row: dict[str, Any] = json.loads(line)
            yield row["timestamp"] / 1000, row["input_length"], row["output_length"], row.get("hash_ids", ())


def _block_ids(blocks: Sequence[int], length: int, vocab_size: int, seed: int, index: int) -> tuple[int, ...]:
    """A prompt whose blocks are the same tokens wherever their hash occurs; without hashes all of it is its own."""
    ids: tuple[int, ...] = ()
    for block in blocks:
        ids += _ids(np.random.default_rng((seed, 1, block)), TRACE_BLOCK_TOKENS, vocab_size)
    return (ids + _ids(np.random.default_rng((seed, 2, index)), max(0, length - len(ids)), vocab_size))[:length]


def _ids(rng: np.random.Generator, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.integers(min(FIRST_ID, vocab_size - 1), vocab_size, length).tolist())
