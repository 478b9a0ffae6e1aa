"""A model compiled for the prompts at hand, in the process that serves them.

The one idea: a context no longer than the prompts and their answers need, unless another is asked for, since caches and
the time of a step grow with it.
"""

from __future__ import annotations

import sys
from typing import Any

from fastgpt_jax.cli.model_source import ModelSource
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.errors import UserError

MOST_TOGETHER = 8


def compile_for_prompts(
    source: ModelSource,
    *,
    num_prompts: int,
    num_tokens: int,
    max_model_len: int | None,
    max_num_seqs: int | None,
    tensor_parallel_size: int = 1,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    quantization_rules: tuple[Any, ...] = (),
    sparse: str | None = None,
    is_strict: bool = False,
) -> Any:
    """Compiles a model, as far as it goes.

    Args:
      num_tokens: Of the longest prompt and its answer together.
      max_model_len: The context asked for; None is `num_tokens`, or the model's own limit where that is less.
      max_num_seqs: Prompts that run together; None is all of them, up to 8.
      tensor_parallel_size: Devices that share every layer.
      quantization, kv_cache_dtype, quantization_rules, sparse, is_strict: As in `CompileConfig`.
    """
    for name, value, low in (("max_model_len", max_model_len, 2), ("max_num_seqs", max_num_seqs, 1)):
        if value is not None and value < low:
            raise UserError(f"--{name} must be at least {low}, got {value}")
    limit = source.max_model_len
    if limit is not None and (max_model_len or 0) > limit:
        raise UserError(f"--max_model_len must be at most the model's own {limit}, got {max_model_len}")
    length = max_model_len or (num_tokens if limit is None else min(num_tokens, limit))
    config = CompileConfig(
        max_model_len=length,
        max_num_seqs=max_num_seqs or min(num_prompts, MOST_TOGETHER),
        tensor_parallel_size=tensor_parallel_size,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        quantization_rules=quantization_rules,
        sparse=sparse,
        is_strict=is_strict,
    )
    compiled = compile_model(source.model, source.params, config=config, tokenizer=source.tokenizer)
    for name, note in compiled.notes.items():
        print(f"{name}: {note}", file=sys.stderr)
    return compiled
