"""What is served against the model's own forward in float32: log-probabilities of texts, and whole distributions.

Runs in our environment. The one idea: the reference is the training forward on the float32 weights, in the same process
and on the same tokens, so that quantization, kernels, caches and the engine all show, and nothing else does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastgpt_jax.checkpoint import LoadedModel, load_model
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.quality import compare, log_probs, pad_windows, trace_logits
from passes.manager import PassOptions


def compare_with_forward(
    source: Path, prompts: list[list[int]], served: list[list[float]], build: dict[str, Any]
) -> dict[str, Any]:
    """See `Engine.check`; all prompts are of one length."""
    exact = load_model(source, dtype="float32")
    graphdef, state = nnx.split(exact.model)
    forward = jax.jit(lambda state, tokens: jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens).astype(jnp.float32)))
    tokens = np.array(prompts, np.int32)
    reference = np.concatenate([np.asarray(forward(state, row[None])) for row in tokens])
    expected = np.take_along_axis(reference[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    error = float(np.max(np.abs(expected - np.array(served))))
    dtype = build.pop("dtype")
    found = _distributions(exact if dtype == "float32" else load_model(source, dtype=dtype), tokens, build)
    (quality,) = compare(lambda *_: reference, [found], pad_windows(prompts, tokens.shape[1]), len(prompts))
    largest = float(np.max(np.abs(reference - np.asarray(found(tokens, np.full(len(tokens), tokens.shape[1]))))))
    return {"logprob_error": error, "largest_logprob_error": largest, **dataclasses.asdict(quality)}


def _distributions(loaded: LoadedModel, tokens: np.ndarray, build: dict[str, Any]) -> Any:
    """The served step over whole texts, compiled here as the artifact was."""
    count, length = tokens.shape
    config = CompileConfig(
        max_model_len=length, max_num_seqs=count, pass_options=PassOptions(is_validating=False), **build
    )
    compiled = compile_model(loaded, config=config)
    graph = trace_logits(compiled.program, compiled.store.paths, count, length)
    compiled.manager.run(graph)
    return log_probs(graph, compiled.leaves)
