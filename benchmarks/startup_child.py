"""One process of `benchmarks/startup.py`: does one thing, and prints when it was where, in seconds since its start.

    python startup_child.py MODE STARTED OPTIONS     STARTED is time.monotonic() of the parent, OPTIONS are JSON

Nothing is imported before the clock has been read, and nothing that a user's process would not import.
"""

# ruff: noqa: E402, PLC0415 - the clock comes first, and each mode imports what its process needs
from __future__ import annotations

import time

BEGAN = time.monotonic()

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT_IDS = (1, 2, 3)
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
HASHED_BYTES = 64 * 2**20


class Laps:
    """Seconds of each phase since the process was started."""

    def __init__(self, started: float):
        self.seconds = {"interpreter": BEGAN - started}
        self._last = BEGAN

    def lap(self, name: str) -> None:
        """Ends a phase."""
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def import_jax(laps: Laps, options: dict[str, Any]) -> dict[str, Any]:
    """What any program on JAX pays."""
    import jax

    laps.lap("import_jax")
    return {"versions": {"python": sys.version.split()[0], "jax": jax.__version__, "jaxlib": jax.lib.__version__}}


def serve_artifact(laps: Laps, options: dict[str, Any]) -> dict[str, Any]:
    """To the first token of an artifact, as `fastgpt generate` gets there."""
    import_jax(laps, options)
    import fastgpt_jax.cli.generate  # noqa: F401
    from fastgpt_jax.artifact import loading
    from fastgpt_jax.engine.llm import LLM

    laps.lap("imports")
    deserialize = _Timed(loading.deserialize)
    loading.deserialize = deserialize
    served = loading.load_artifact(
        options["artifact"], verify=options["verify"], on_mismatch="refuse", check_fingerprint=options["fingerprint"]
    )
    laps.lap("load")
    _first_token(LLM(served))
    laps.lap("first_step")
    parts = {name: served.seconds[name] for name in ("verify", "weights", "fingerprint") if name in served.seconds}
    return {"parts": {**parts, "executables": deserialize.seconds}}


def compile_and_serve(laps: Laps, options: dict[str, Any]) -> dict[str, Any]:
    """To the first token from the checkpoint, with the same set of entry points compiled first."""
    import_jax(laps, options)
    import fastgpt_jax.cli.compile_for_prompts
    import fastgpt_jax.cli.generate  # noqa: F401
    from fastgpt_jax.artifact.manifest import read_manifest
    from fastgpt_jax.checkpoint import load_model
    from fastgpt_jax.compiler.compile import compile as compile_model
    from fastgpt_jax.compiler.config import CompileConfig
    from fastgpt_jax.compiler.entry_point import compile_entry_point
    from fastgpt_jax.engine.llm import LLM

    laps.lap("imports")
    loaded = load_model(options["model"])
    laps.lap("weights")
    manifest = read_manifest(Path(options["artifact"]))
    buckets = manifest.buckets
    config = CompileConfig(
        max_model_len=manifest.model.max_model_len,
        max_num_seqs=manifest.model.max_num_seqs,
        prefill_buckets=buckets.chunk_lens,
        decode_buckets=buckets.decode,
    )
    compiled = compile_model(loaded, config=config)
    if compiled.buckets != buckets:
        raise RuntimeError(f"the artifact has other entry points: {buckets}, not {compiled.buckets}")
    laps.lap("derive")
    for key in buckets.keys():
        compiled.steps[key] = compile_entry_point(compiled.trace(key)).bind(compiled.store)
    laps.lap("executables")
    _first_token(LLM(compiled))
    laps.lap("first_step")
    return {"num_entry_points": len(compiled.steps)}


def page_in(laps: Laps, options: dict[str, Any]) -> dict[str, Any]:
    """Touches every page of the mapped weights once."""
    import numpy as np

    files = sorted(Path(options["artifact"], "weights").iterdir())
    laps.lap("imports")
    total = sum(int(np.memmap(path, np.uint8, "r")[::PAGE_BYTES].sum()) for path in files)
    laps.lap("page_in")
    return {"num_bytes": sum(path.stat().st_size for path in files), "checksum": total}


def hash_memory(laps: Laps, options: dict[str, Any]) -> dict[str, Any]:
    """SHA-256 over memory, on as many threads as verifying takes."""
    pieces = [os.urandom(2**20) * (HASHED_BYTES // 2**20)] * 2 * (os.cpu_count() or 1)
    laps.lap("imports")
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces))
    laps.lap("sha256")
    return {"num_bytes": HASHED_BYTES * len(pieces)}


class _Timed:
    """A function, and the time that the main thread spent in it."""

    def __init__(self, function: Callable[..., Any]):
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.monotonic()
        try:
            return self._function(*args)
        finally:
            if threading.current_thread() is threading.main_thread():
                self.seconds += time.monotonic() - start


def _first_token(llm: Any) -> None:
    from fastgpt_jax.sampling.params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for _, output in llm.stream(prompt_token_ids=[list(PROMPT_IDS)], sampling_params=params):
        if not output.outputs[0].token_ids:
            raise RuntimeError("there was no token")


MODES = {
    "jax": import_jax,
    "artifact": serve_artifact,
    "scratch": compile_and_serve,
    "page_in": page_in,
    "sha256": hash_memory,
}

if __name__ == "__main__":
    _laps = Laps(float(sys.argv[2]))
    _found = MODES[sys.argv[1]](_laps, json.loads(sys.argv[3]))
    print(json.dumps({"seconds": _laps.seconds, "total_s": sum(_laps.seconds.values()), **_found}), flush=True)
