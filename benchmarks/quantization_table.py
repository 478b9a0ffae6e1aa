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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fastgpt_jax
import passes
from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.quantization import make_pipeline
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.sampling.step_io import StepInputs
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
    """A setting on a text: bytes of all weights with scales, of a token's cache, and distances in nats."""

    setting: str
    text: str
    num_tokens: int
    weight_bytes: int
    cache_bytes_a_token: int
    mean_kld: float
    kld_999: float
    same_top1: float
    perplexity: float


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids `[R, T]`, each row a text of its own, padded past its count."""

    name: str
    tokens: np.ndarray
    counts: np.ndarray


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


def texts(model: Any, exact: Compiled) -> list[Text]:
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
    windows = [[bos, *ids[i : i + NUM_TOKENS - 1]] for i in range(0, wanted, NUM_TOKENS - 1)]
    return [_text("stories", stories), _text("wikitext2-valid", windows)]


def _text(name: str, rows: Sequence[Sequence[int]]) -> Text:
    tokens = np.zeros((len(rows), NUM_TOKENS), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Text(name, tokens, np.array([len(ids) for ids in rows], np.int32))


def served_logits(compiled: Compiled) -> Callable[[np.ndarray, np.ndarray], Any]:
    """The log-probabilities `[R, T, V]` of the served step, rewritten as it is when it serves."""
    program, store = compiled.program, compiled.store

    def step(params: dict[str, Any], tokens: Any, counts: Any) -> Any:
        slots = jnp.arange(NUM_ROWS, dtype=jnp.int32)
        num_pages = compiled.layout.pages_per_request(compiled.max_model_len)
        inputs = StepInputs(
            tokens=tokens.reshape(-1),
            num_new=counts,
            page_table=slots[:, None] * num_pages + jnp.arange(num_pages, dtype=jnp.int32),
            cache_len=jnp.zeros(NUM_ROWS, jnp.int32),
            slots=slots,
            targets=jnp.zeros(tokens.size, jnp.int32),
        )
        leaves = [params[path] for path in store.paths]
        logits, _ = program.logits(leaves, program.init_state(), inputs, last_row=False)
        return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

    config = compiled.config
    pipeline = make_pipeline(config.pipeline, config.quantization, config.quantization_rules)
    registry = {entry.name: entry for entry in pipeline}
    names = ",".join(entry.name for entry in pipeline)
    run = jax.jit(passes.apply(step, names, registry=registry, options=config.pass_options))
    params = {path: store[path] for path in store.paths}
    return lambda tokens, counts: run(params, tokens, counts)


def batches(text: Text, run: Callable[[np.ndarray, np.ndarray], Any]) -> Iterator[np.ndarray]:
    """Log-probabilities of the valid positions, a batch at a time."""
    for i in range(0, NUM_TEXTS, NUM_ROWS):
        found = np.asarray(run(text.tokens[i : i + NUM_ROWS], text.counts[i : i + NUM_ROWS]))
        yield found[np.arange(NUM_TOKENS) < text.counts[i : i + NUM_ROWS, None]]


def measure(setting: str, compiled: Compiled, text: Text, exact: np.ndarray) -> Row:
    """Compares one setting with the exact log-probabilities of a text."""
    found = np.concatenate(list(batches(text, served_logits(compiled))))
    kld = np.sum(np.exp(exact) * (exact - found), axis=-1)
    is_valid = np.arange(NUM_TOKENS) < text.counts[:, None]
    following = np.where(np.arange(1, NUM_TOKENS + 1) < text.counts[:, None], np.roll(text.tokens, -1, 1), -1)[is_valid]
    scored = following >= 0
    loss = -np.mean(found[scored, following[scored]])
    names = {n for key in _keys() for n in compiled.trace(key).weights}
    return Row(
        setting,
        text.name,
        len(found),
        sum(compiled.store[name].nbytes for name in names),
        compiled.layout.bytes_per_token,
        float(np.mean(kld)),
        float(np.quantile(kld, 0.999)),
        float(np.mean(exact.argmax(-1) == found.argmax(-1))),
        float(np.exp(loss)),
    )


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
        yield f"**{name}**, {of_text[0].num_tokens} tokens"
        yield ""
        yield "| | weight bytes | cache bytes a token | mean KLD | 99.9% KLD | same top-1 | perplexity |"
        yield "|---|---|---|---|---|---|---|"
        for row in of_text:
            yield (
                f"| {row.setting} | {row.weight_bytes:,} | {row.cache_bytes_a_token:,} | {row.mean_kld:.6f} | "
                f"{row.kld_999:.4f} | {row.same_top1:.2%} | {row.perplexity:.3f} |"
            )


def main(wanted: Sequence[str]) -> None:
    model = load_model(MODEL)
    exact = compiled_as("float32", model)
    found = texts(model, exact)
    reference = {text.name: np.concatenate(list(batches(text, served_logits(exact)))) for text in found}
    rows = []
    for setting in wanted or SETTINGS:
        start = time.perf_counter()
        compiled = compiled_as(setting, model)
        for text in found:
            rows.append(measure(setting, compiled, text, reference[text.name]))
            print(json.dumps(dataclasses.asdict(rows[-1])), flush=True)
        print(f"{setting}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not wanted:
        rows.sort(key=lambda row: row.text)
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{chr(10).join(table(rows))}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
