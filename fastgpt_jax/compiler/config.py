"""How a model is compiled, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastgpt_jax.compiler.bucket_plan import Traffic
from fastgpt_jax.compiler.quantization import scheme_named
from fastgpt_jax.compiler.sparsity import read_sparsity
from fastgpt_jax.errors import UserError
from passes.incremental.row_format import ROW_FORMATS
from passes.manager import PassOptions
from passes.quantization.rules import QuantizationRule
from sharding.rules import Rules

DEFAULT_PIPELINE = "simplify,attention,layer_norm,rms_norm,rope,gated_mlp,residual_norm,weight_rows,attend_pages,select"
_PAGES = ("page_size", "num_pages", "memory_pool_size")


@dataclass(frozen=True)
class CompileConfig:
    """Choices of a compile; `None` means chosen from the model.

    Attributes:
      max_model_len: Longest request in tokens, prompt and output together; by default what the checkpoint names.
      max_num_seqs: Requests that run at the same time.
      page_size: Tokens of a page of the caches.
      num_pages: Pages of the caches; by default as many as `max_num_seqs` requests of full length take.
      memory_pool_size: In place of `num_pages`, the bytes of all pages together on each device.
      gpu_memory_utilization: In place of `num_pages`, the share of a device's memory that weights, caches and the
        temporaries of steps may take together; on a CPU a share of what the machine and its container allow.
      max_num_batched_tokens: Tokens, padding included, of a prefill step that holds several requests.
      prefill_buckets: Chunk lengths of the prefill entry points, in tokens; by default those of
        16, 64, 256 and 1024 that fit, or what suits the traffic.
      decode_buckets: Numbers of requests that decode entry points take; by default powers of two, or what suits the
        traffic.
      traffic: What is expected to be served, where that is known.
      max_logprobs: Most likely tokens reported beside each sampled one.
      arguments: Further per-token arguments of the forward mapped to 'positions', 'segment_ids' or 'attention_mask'.
      pipeline: Passes over the derived step, by name, separated by commas.
      pass_options: Dumps, early stop and bisection of the pipeline.
      unroll_layers: Whether loops over layers are written out; by default on CPU, where scanning copies, and where
        `sparse` tells layers apart.
      tensor_parallel_size: Devices that share every layer, by heads, MLP columns and vocabulary.
      quantization: Scheme that all weights are quantized by but norms and routers; one of
        `passes.quantization.schemes.SCHEMES`.
      kv_cache_dtype: How rows of caches are stored: "auto" as they are, "int8" or "fp8" with a scale a vector.
      quantization_rules: Rules that come before those of the scheme.
      sparse: Which keys heads see, layer by layer, such as "all: window(512) | sinks(8)"; None for those that the model
        has them see.
      is_strict: Whether a rule or clause that decides about nothing of the model is an error.
      sharding_rules: What the dimensions of a model's own parameters mean, and how many KV heads it has; models from a
        checkpoint bring their own.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 8
    page_size: int | None = None
    num_pages: int | None = None
    memory_pool_size: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_batched_tokens: int = 2048
    prefill_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()
    traffic: Traffic | None = None
    max_logprobs: int = 20
    arguments: Mapping[str, str] = field(default_factory=dict)
    pipeline: str = DEFAULT_PIPELINE
    pass_options: PassOptions = PassOptions()
    unroll_layers: bool | None = None
    tensor_parallel_size: int = 1
    sharding_rules: Rules | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    quantization_rules: tuple[QuantizationRule, ...] = ()
    sparse: str | None = None
    is_strict: bool = False

    def __post_init__(self) -> None:
        if self.quantization is not None:
            scheme_named(self.quantization)
        if self.sparse is not None:
            read_sparsity(self.sparse)
        if self.kv_cache_dtype not in ("auto", *ROW_FORMATS):
            raise UserError(
                f"kv_cache_dtype must be one of auto, {', '.join(ROW_FORMATS)}, got {self.kv_cache_dtype!r}"
            )
        ones = ("max_num_seqs", "max_num_batched_tokens", "max_logprobs", "tensor_parallel_size")
        for name, least in {"max_model_len": 2, **dict.fromkeys((*ones, *_PAGES), 1)}.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise UserError(f"gpu_memory_utilization must be above 0 and at most 1, got {share!r}")
        asked = [name for name in (*_PAGES[1:], "gpu_memory_utilization") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} all decide how many pages there are; give one of them")
        for name in ("prefill_buckets", "decode_buckets"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or any(n < 1 for n in sizes):
                raise UserError(f"{name} must ascend from at least 1, got {sizes}")
