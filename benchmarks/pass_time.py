"""How long each pass takes on large shapes, all of them abstract: no weight is made and nothing is compiled.

    python -m benchmarks.pass_time                    # GPT-2 124M at T = 1024, a Llama of 70B's shape with 80 layers
    python -m benchmarks.pass_time llama70b-20        # the same Llama with 20 layers

Prints a line of JSON a model: seconds of reading the program, of each pass, and of validating what they report, by the
clock; for all passes and for validation also in CPU time, verifying the program after each pass included; operations
before and after, and what passes matched. Rewrites that are too large to run are counted, for their reasons.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.derivation_table import commit
from fastgpt_jax.models.gpt2 import GPT2, GPT2Config
from fastgpt_jax.models.llama import Llama, LlamaConfig
from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.numerics import Numerics
from passes.quantization.quantize_weights import quantize_weights
from passes.quantization.rules import default_rules
from passes.quantization.schemes import SCHEMES
from passes.reader import trace
from passes.registry import PASSES, Pass, make_registry, parse_pipeline
from passes.transform import name_parameters
from passes.validation import Validator

PIPELINE = "fuse,quantize_weights"
REGISTRY = make_registry(
    [
        *PASSES.values(),
        Pass(
            "quantize_weights",
            lambda graph: quantize_weights(graph, default_rules(SCHEMES["w8a16"])),
            Numerics.APPROXIMATE,
        ),
    ]
)


def gpt2_124m() -> tuple[nnx.Module, int]:
    """GPT-2 of 124M parameters, and the length of its sequences."""
    return GPT2(GPT2Config(50257, 768, 3072, 12, 12, 1024), rngs=nnx.Rngs(0)), 1024


def llama_70b(num_layers: int) -> tuple[nnx.Module, int]:
    """A Llama of the 70B model's widths."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=num_layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    return Llama(config, rngs=nnx.Rngs(0)), 2048


MODELS: dict[str, Callable[[], tuple[nnx.Module, int]]] = {
    "gpt2-124m": gpt2_124m,
    **{f"llama70b-{n}": functools.partial(llama_70b, n) for n in (10, 20, 40, 80)},
}
DEFAULT = ("gpt2-124m", "llama70b-80")


def read(name: str) -> tuple[Graph, int]:
    """The program of a model, and the length of its sequences."""
    make = MODELS[name]
    length = 0

    def split() -> Any:
        nonlocal length
        model, length = make()
        return nnx.split(model)

    graphdef, state = nnx.eval_shape(split)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    graph, _ = trace(lambda state, tokens: nnx.merge(graphdef, state)(tokens), state, tokens)
    name_parameters(graph, (state, tokens), [0])
    return graph, length


def measure(name: str) -> dict[str, Any]:
    """One row."""
    start = time.perf_counter()
    graph, length = read(name)
    read_s, ops = time.perf_counter() - start, graph.count()
    start = time.process_time()
    runs = PassManager(parse_pipeline(PIPELINE, REGISTRY), PassOptions(is_validating=False)).run(graph)
    cpu_s, start, cpu_start = time.process_time() - start, time.perf_counter(), time.process_time()
    validator = Validator()
    verdicts = [validator.check(rewrite) for run in runs for rewrite in run.result.rewrites]
    return {
        "model": name,
        "length": length,
        "ops": [ops, graph.count()],
        "read_s": round(read_s, 3),
        "passes_s": round(sum(run.seconds for run in runs), 3),
        "passes_cpu_s": round(cpu_s, 3),
        "passes": [[run.name, run.result.matched, round(run.seconds, 3)] for run in runs],
        "validation_s": round(time.perf_counter() - start, 3),
        "validation_cpu_s": round(time.process_time() - cpu_start, 3),
        "rewrites": len(verdicts),
        "not_valid": dict(Counter(verdict.where for verdict in verdicts if verdict.status != "valid")),
    }


def main(names: Sequence[str]) -> None:
    """Measures the models named, or the two of the table."""
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit()}
    for name in names or DEFAULT:
        if name not in MODELS:
            raise SystemExit(f"no model {name!r}; there are {', '.join(MODELS)}")
        sys.stdout.write(json.dumps({**measure(name), **about}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
