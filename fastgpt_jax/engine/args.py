"""What an engine is made of, in vLLM's names; a value whose machinery is missing is refused, never ignored."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, no_type_check

from fastgpt_jax.artifact.loading import ON_MISMATCH, OnMismatch
from fastgpt_jax.artifact.verify import LEVELS, Level
from fastgpt_jax.errors import UserError

ONLY_VALUES: Mapping[str, Any] = MappingProxyType(
    {
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "trust_remote_code": False,
    }
)
"""Arguments of vLLM that are accepted at this value alone."""

CHOICES: Mapping[str, tuple[str | None, ...]] = MappingProxyType(
    {
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "verify": LEVELS,
        "on_mismatch": ON_MISMATCH,
        "kv_cache_dtype": ("auto", "int8", "fp8"),
        "quantization": (None, "w8a16", "w8a8", "w4a16", "w4a8", "fp8"),
    }
)


@no_type_check  # a wrong type is the user's mistake, and answered as one below
@dataclasses.dataclass(frozen=True)
class EngineArgs:
    """How to serve a model.

    Attributes:
      model: An artifact, a model folder, a loaded model, or a compiled one.
      tokenizer: Folder of a tokenizer that takes the place of the model's own.
      dtype: Of parameters and activations; "auto" is the checkpoint's.
      max_model_len: Tokens of prompt and output together; None is what the model was made for.
      max_num_seqs: Requests that run together; None leaves it to the compiler.
      max_num_batched_tokens: Tokens, padding included, of a prefill step that holds several requests; None leaves it
        to the compiler.
      max_logprobs: Most likely tokens that may be asked for; None leaves it to the compiler.
      gpu_memory_utilization: Share of the device's memory that weights and caches may take; more is an error at
        start. None leaves it unchecked.
      verify: How much of an artifact is read before it is used: "full", "fast" (all but the weights), or "auto", which
        is "full" up to 8 GB.
      on_mismatch: What to do with an artifact of another environment: "recompile" its portable programs, or "refuse".
      check_fingerprint: Whether an artifact must reproduce the log-probabilities of a fixed prompt before it serves.
      seed: Decides the draws of requests that bring no seed.
      quantization: Scheme that weights are stored by; None leaves them as they are.
      kv_cache_dtype: What rows of caches are stored as; "auto" leaves them as they are.
      tensor_parallel_size: Devices that share every layer; None is one, or what the model was compiled for.
    """

    model: Any
    tokenizer: str | Path | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_logprobs: int | None = None
    gpu_memory_utilization: float | None = None
    verify: Level = "auto"
    on_mismatch: OnMismatch = "recompile"
    check_fingerprint: bool = True
    seed: int = 0
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self):
        for name, only in ONLY_VALUES.items():
            if getattr(self, name) != only:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not supported in this version; leave it at {only!r}"
                )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        # The shortest request is a token of prompt and one of answer.
        least = {"max_model_len": 2, "max_num_seqs": 1, "max_num_batched_tokens": 1, "max_logprobs": 1, "seed": 0}
        for name, low in {**least, "tensor_parallel_size": 1}.items():
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"{name} must be an integer of at least {low}, got {value!r}")
        share = self.gpu_memory_utilization
        if share is not None and not (isinstance(share, (int, float)) and math.isfinite(share) and 0 < share <= 1):
            raise UserError(f"gpu_memory_utilization must be above 0 and at most 1, got {share!r}")


def make_engine_args(model: Any, options: Mapping[str, Any]) -> EngineArgs:
    """Returns the arguments; an unknown name is a UserError that names the nearest."""
    known = [field.name for field in dataclasses.fields(EngineArgs) if field.name != "model"]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(known)}"
            raise UserError(f"unknown engine argument {name!r}{hint}")
    return EngineArgs(model, **options)
