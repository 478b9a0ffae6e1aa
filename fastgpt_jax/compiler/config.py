"""How a model is compiled, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.errors import UserError
from passes.manager import PassOptions


@dataclass(frozen=True)
class CompileConfig:
    """Choices of a compile; `None` means chosen from the model.

    Attributes:
      max_model_len: Longest request in tokens, prompt and output together; by default what the checkpoint names.
      max_num_seqs: Requests that hold a cache at the same time.
      max_num_batched_tokens: Tokens, padding included, of a prefill step that holds several requests.
      prefill_buckets: Chunk lengths of the prefill entry points, in tokens; by default those of
        16, 64, 256 and 1024 that fit.
      decode_buckets: Numbers of requests that decode entry points take; by default powers of two.
      max_logprobs: Most likely tokens reported beside each sampled one.
      arguments: Further per-token arguments of the forward mapped to 'positions', 'segment_ids' or 'attention_mask'.
      pipeline: Passes over the derived step, by name, separated by commas.
      pass_options: Dumps, early stop and bisection of the pipeline.
      unroll_layers: Whether loops over layers are written out; by default on CPU, where scanning copies.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    prefill_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()
    max_logprobs: int = 20
    arguments: Mapping[str, str] = field(default_factory=dict)
    pipeline: str = "simplify"
    pass_options: PassOptions = PassOptions()
    unroll_layers: bool | None = None

    def __post_init__(self) -> None:
        least_values = {"max_model_len": 2, "max_num_seqs": 1, "max_num_batched_tokens": 1, "max_logprobs": 1}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("prefill_buckets", "decode_buckets"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or any(n < 1 for n in sizes):
                raise UserError(f"{name} must ascend from at least 1, got {sizes}")


def choose_buckets(config: CompileConfig, max_model_len: int, min_first_chunk: int) -> Buckets:
    """The shapes of steps that a model is compiled for; the longest prefill holds the first chunk a prefix-LM needs."""
    chunk_lens = [n for n in config.prefill_buckets if n <= max_model_len] or [
        n for n in (16, 64, 256, 1024) if n <= max_model_len
    ]
    if not chunk_lens:
        chunk_lens = [max_model_len]
    if chunk_lens[-1] < min_first_chunk:
        chunk_lens.append(min_first_chunk)
    prefill = []
    for chunk_len in chunk_lens:
        together = min(config.max_num_seqs, config.max_num_batched_tokens // chunk_len)
        prefill += [(chunk_len, rows) for rows in sorted({1, max(together, 1)})]
    decode = {n for n in config.decode_buckets or _powers_of_two(config.max_num_seqs) if n < config.max_num_seqs}
    return Buckets(tuple(prefill), (*sorted(decode), config.max_num_seqs))


def _powers_of_two(below: int) -> list[int]:
    return [2**n for n in range(below.bit_length())]
