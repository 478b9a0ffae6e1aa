"""Our artifacts of a shape, compiled as a user would compile them, each in a process with a bound on its time.

The one idea: an artifact is kept beside the other engines' files under the name of its build and used again; `rebuild`
makes it anew, as a change of the compiler or of the kernels asks for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.contests import CACHE_TOKENS, MAX_LEN, MAX_SEQS, PROMPT, Build
from benchmarks.peers.protocol import ROOT, EngineFailed
from benchmarks.peers.shapes import Shape

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
DECODE, CHUNKS = (1, 8, MAX_SEQS), (PROMPT, 128, 512, 2048)
QUICK_DECODE, QUICK_CHUNKS = (1, 8), (PROMPT, 128)
CONTEXT_LEN = 33024
"""Of the artifact that is decoded at long contexts."""


def plan(build: Build, shape: Shape, *, is_quick: bool) -> list[str]:
    """Flags of `fastgpt compile`: steps for what is measured alone, and as much cache as the other engines get."""
    decode, chunks = (QUICK_DECODE, QUICK_CHUNKS) if is_quick else (DECODE, CHUNKS)
    max_len = 640 if is_quick else MAX_LEN
    return _flags(build, shape, decode, chunks, max_len, CACHE_TOKENS)


def context_plan(build: Build, shape: Shape) -> list[str]:
    """Flags for one request of a long context."""
    return _flags(build, shape, (1,), (PROMPT,), CONTEXT_LEN, CONTEXT_LEN)


def compile_artifact(model: Path, target: Path, flags: Sequence[str], *, rebuild: bool, timeout_s: float) -> None:
    """Compiles an artifact that is missing.

    Raises:
      EngineFailed: It cannot be compiled, or not in this time.
    """
    if target.is_dir() and not rebuild:
        return
    command = [sys.executable, str(ROOT / "tools/compile.py"), "--model", str(model), "--output", str(target)]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, "--overwrite", "--verify=none", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise EngineFailed(f"{target.name}: not compiled within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        raise EngineFailed(f"{target.name}: not compiled: {lines[-1]}")
    print(f"{target} made in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _flags(
    build: Build, shape: Shape, decode: Sequence[int], chunks: Sequence[int], max_len: int, cache_tokens: int
) -> list[str]:
    pool = cache_tokens * shape.kv_bytes_a_token(ITEM_BYTES[build.dtype])
    flags = [
        f"--dtype={build.dtype}",
        f"--max_model_len={max_len}",
        f"--max_num_seqs={decode[-1]}",
        f"--decode_buckets={','.join(map(str, decode))}",
        f"--buckets={','.join(map(str, chunks))}",
        f"--max_num_batched_tokens={chunks[0]}",
        f"--memory_pool_size={pool}B",
    ]
    return flags if build.quantization is None else [*flags, f"--quantization={build.quantization}"]
