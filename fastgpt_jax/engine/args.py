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
from fastgpt_jax.engine.core_options import CoreOptions
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
      max_num_batched_tokens: Tokens, padding included, of the largest prefill step; None leaves it to the compiler. Of
        a compiled model, larger steps are left out.
      max_logprobs: Most likely tokens that may be asked for; None leaves it to the compiler.
      gpu_memory_utilization: Share of the device's memory that weights, caches and the temporaries of steps may take.
        A model that is compiled now gets caches of all that is left; one that was compiled and takes more is an error
        at start. None gives it caches for `max_num_seqs` requests of full length, and checks nothing.
      verify: How much of an artifact is read before it is used: "full", "fast" (all but the weights), or "auto", which
        is "full" up to 8 GB.
      on_mismatch: What to do with an artifact of another environment: "recompile" its portable programs, or "refuse".
      check_fingerprint: Whether an artifact must reproduce the log-probabilities of a fixed prompt before it serves.
      max_batch: Most continuations that run together, at most `max_num_seqs`; None is that, and where that is None too,
        the model is compiled for it.
      min_batch: An idle engine waits until so many continuations are there,
      batch_timeout_ms: or until the oldest of them has waited so long; they take a running engine at once.
      num_workers: Threads that turn text into ids, for lists of prompts; 0 uses the caller's.
      enable_prefix_caching: Whether prompts that begin alike share what was computed.
      pin_buckets: Whether what runs beside a request must not change how its sums are made: prompts run in steps of one
        shape and single tokens in steps of another, and nothing is shared but among continuations of a prompt.
      swap_space: Memory of the host, in bytes, for the rows of requests that lost their pages to others; without room
        they are computed again.
      seed: Decides the draws of requests that bring no seed.
      quantization: Scheme that weights are stored by; None leaves them as they are.
      sparse: Which keys heads see, layer by layer, such as "all: window(512) | sinks(8)"; None leaves attention as it
        is.
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
    max_batch: int | None = None
    min_batch: int = 1
    batch_timeout_ms: float = 0.0
    num_workers: int = 0
    enable_prefix_caching: bool = True
    pin_buckets: bool = False
    swap_space: int = 0
    seed: int = 0
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    quantization: str | None = None
    sparse: str | None = None
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
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in ("enable_prefix_caching", "pin_buckets"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {getattr(self, name)!r}")
        wait_ms = self.batch_timeout_ms
        if not (isinstance(wait_ms, (int, float)) and math.isfinite(wait_ms) and wait_ms >= 0):
            raise UserError(f"batch_timeout_ms must be a finite number of at least 0, got {wait_ms!r}")
        _ = self.core_options  # which checks how these go together
        share = self.gpu_memory_utilization
        if share is not None and not (isinstance(share, (int, float)) and math.isfinite(share) and 0 < share <= 1):
            raise UserError(f"gpu_memory_utilization must be above 0 and at most 1, got {share!r}")

    @property
    def core_options(self) -> CoreOptions:
        """What of this the loop needs to know."""
        return CoreOptions(
            max_batch=self.max_batch,
            min_batch=self.min_batch,
            batch_timeout_ms=self.batch_timeout_ms,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enable_prefix_caching=self.enable_prefix_caching,
            pins_buckets=self.pin_buckets,
            swap_bytes=self.swap_space,
        )


_LEAST = {
    "max_model_len": 2,  # a token of prompt and one of answer
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_logprobs": 1,
    "max_batch": 1,
    "min_batch": 1,
    "num_workers": 0,
    "swap_space": 0,
    "seed": 0,
    "tensor_parallel_size": 1,
}
_OPTIONAL = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_logprobs",
    "max_batch",
    "tensor_parallel_size",
)


def make_engine_args(model: Any, options: Mapping[str, Any]) -> EngineArgs:
    """Returns the arguments; an unknown name is a UserError that names the nearest."""
    known = [field.name for field in dataclasses.fields(EngineArgs) if field.name != "model"]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(known)}"
            raise UserError(f"unknown engine argument {name!r}{hint}")
    return EngineArgs(model, **options)
