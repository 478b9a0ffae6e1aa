"""Compiles stories260K under every quantization scheme and writes what that costs into docs/quantization.md.

    python -m benchmarks.quantization_table                # all schemes, and the table is replaced
    python -m benchmarks.quantization_table w8a16 w4a8     # these alone, and no file is touched

Prints one line of JSON a scheme and text. What is compared are logits of the served step over whole texts, caches
included, with those of the same step in float32. Needs the shared data beside the checkout.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import fastgpt_jax
from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.quality import (
    LogProbs,
    Quality,
    Windows,
    compare,
    cut_windows,
    log_probs,
    pad_windows,
    trace_logits,
)
from fastgpt_jax.engine.llm import LLM
from passes.manager import PassOptions

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
MODEL, WIKITEXT = DATA / "models/stories260K", DATA / "corpora/wikitext2-valid.txt"
PAGE = ROOT / "docs" / "quantization.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
NUM_TEXTS, NUM_TOKENS, NUM_ROWS = 64, 256, 16

SETTINGS = {
    "float32": (None, "auto"),
    "w8a16": ("w8a16", "auto"),
    "w8a8": ("w8a8", "auto"),
    "fp8": ("fp8", "auto"),
    "w4a16": ("w4a16", "auto"),
    "w4a8": ("w4a8", "auto"),
    "KV int8": (None, "int8"),
    "KV fp8": (None, "fp8"),
    "w8a8, KV int8": ("w8a8", "int8"),
}
"""Scheme of the weights and dtype of the caches."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting on a text: bytes of all weights with scales, of a token's cache, and distances."""

    setting: str
    text: str
    weight_bytes: int
    cache_bytes_a_token: int
    quality: Quality


def compiled_as(setting: str, model: Any) -> Compiled:
    """The model under a setting; its rewrites are validated by the test suite."""
    scheme, cache = SETTINGS[setting]
    config = CompileConfig(
        max_model_len=NUM_TOKENS,
        max_num_seqs=NUM_ROWS,
        quantization=scheme,
        kv_cache_dtype=cache,
        pass_options=PassOptions(is_validating=False),
    )
    return compile_model(model, config=config)


def texts(model: Any, exact: Compiled) -> dict[str, Windows]:
    """What the float32 model writes at temperature 1, seeds 0 to 63, and the beginning of WikiText-2's validation."""
    bos = model.tokenizer.bos_token_id
    sampling = [
        fastgpt_jax.SamplingParams(temperature=1.0, seed=i, max_tokens=NUM_TOKENS - 1) for i in range(NUM_TEXTS)
    ]
    outputs = LLM(exact).generate(prompt_token_ids=[[bos]] * NUM_TEXTS, sampling_params=sampling, use_tqdm=False)
    stories = [[bos, *output.outputs[0].token_ids] for output in outputs]
    wanted = NUM_TEXTS * (NUM_TOKENS - 1)
    text = WIKITEXT.read_text(encoding="utf-8")[: wanted * 8]
    ids = [i for i in model.tokenizer.encode(text) if i != bos][:wanted]
    return {"stories": pad_windows(stories, NUM_TOKENS), "wikitext2-valid": cut_windows(ids, NUM_TOKENS, bos)}


def served(compiled: Compiled) -> LogProbs:
    """The served step over whole texts, rewritten as it is when it serves."""
    graph = trace_logits(compiled.program, compiled.store.paths, NUM_ROWS, NUM_TOKENS)
    compiled.manager.run(graph)
    return log_probs(graph, compiled.leaves)


def measure(setting: str, compiled: Compiled, found: Mapping[str, Windows], exact: LogProbs) -> Iterator[Row]:
    """Compares one setting with the exact model, a row a text."""
    names = {n for key in _keys() for n in compiled.trace(key).weights}
    weight_bytes = sum(compiled.store[name].nbytes for name in names)
    run = served(compiled)
    for text, windows in found.items():
        (quality,) = compare(exact, [run], windows, NUM_ROWS)
        yield Row(setting, text, weight_bytes, compiled.layout.bytes_per_token, quality)


def _keys() -> list[EntryPointKey]:
    return [EntryPointKey(NUM_ROWS, NUM_ROWS, "greedy", False)]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines between the markers."""
    yield (
        f"stories260K, {NUM_TEXTS} texts of at most {NUM_TOKENS} tokens each: stories that the float32 model writes at "
        "temperature 1 after the BOS token alone, seeds 0 to 63, and as many windows from the beginning of "
        f"WikiText-2's validation part, which this model cannot predict. jax {jax.__version__} on CPU, one run, "
        "deterministic."
    )
    for name in dict.fromkeys(row.text for row in rows):
        of_text = [row for row in rows if row.text == name]
        yield ""
        yield f"**{name}**, {of_text[0].quality.num_tokens} tokens"
        yield ""
        yield "| | weight bytes | cache bytes a token | mean KLD | 99.9% KLD | same top-1 | perplexity |"
        yield "|---|---|---|---|---|---|---|"
        for row in of_text:
            yield (
                f"| {row.setting} | {row.weight_bytes:,} | {row.cache_bytes_a_token:,} | {row.quality.mean_kld:.6f} | "
                f"{row.quality.kld_999:.4f} | {row.quality.same_top1:.2%} | {row.quality.perplexity:.3f} |"
            )


def main(wanted: Sequence[str]) -> None:
    model = load_model(MODEL)
    exact = compiled_as("float32", model)
    found, reference = texts(model, exact), served(exact)
    rows = []
    for setting in wanted or SETTINGS:
        start = time.perf_counter()
        for row in measure(setting, compiled_as(setting, model), found, reference):
            rows.append(row)
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        print(f"{setting}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not wanted:
        rows.sort(key=lambda row: row.text)
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{chr(10).join(table(rows))}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
