"""How a model is compiled, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastgpt_jax.errors import UserError
from passes.manager import PassOptions


@dataclass(frozen=True)
class CompileConfig:
    """Choices of a compile; `None` means chosen from the model.

    Attributes:
      max_model_len: Longest request in tokens, prompt and output together; by default what the checkpoint names.
      max_num_seqs: Requests that hold a cache at the same time.
      prefill_buckets: Chunk lengths of the prefill entry points, in tokens; by default those of
        16, 64, 256 and 1024 that fit.
      max_logprobs: Most likely tokens reported beside each sampled one.
      arguments: Further per-token arguments of the forward mapped to 'positions', 'segment_ids' or 'attention_mask'.
      pipeline: Passes over the derived step, by name, separated by commas.
      pass_options: Dumps, early stop and bisection of the pipeline.
      unroll_layers: Whether loops over layers are written out; by default on CPU, where scanning copies.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 8
    prefill_buckets: tuple[int, ...] = ()
    max_logprobs: int = 20
    arguments: Mapping[str, str] = field(default_factory=dict)
    pipeline: str = "simplify"
    pass_options: PassOptions = PassOptions()
    unroll_layers: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_model_len", 2), ("max_num_seqs", 1), ("max_logprobs", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if list(self.prefill_buckets) != sorted(set(self.prefill_buckets)) or any(n < 1 for n in self.prefill_buckets):
            raise UserError(f"prefill_buckets must ascend from at least 1, got {self.prefill_buckets}")


def choose_prefill_buckets(config: CompileConfig, max_model_len: int, min_first_chunk: int) -> tuple[int, ...]:
    """The chunk lengths of prefill, ascending; the last holds the first chunk a prefix-LM needs."""
    buckets = [n for n in config.prefill_buckets if n <= max_model_len] or [
        n for n in (16, 64, 256, 1024) if n <= max_model_len
    ]
    if not buckets:
        buckets = [max_model_len]
    if buckets[-1] < min_first_chunk:
        buckets.append(min_first_chunk)
    return tuple(buckets)
