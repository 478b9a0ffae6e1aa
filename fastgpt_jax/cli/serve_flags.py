"""The flags of `fastgpt serve`, and what they say as settings of the server and options of the engine.

Knows no server that runs. The one idea: whatever `ServerSettings` limits has a flag of the same name, so that a limit
that is added there can be set here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import flags

from fastgpt_jax.artifact.loading import ON_MISMATCH
from fastgpt_jax.artifact.verify import LEVELS
from fastgpt_jax.cli.quantization_flags import add_quantization_flags
from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.async_llm import NUM_TOKENISERS
from fastgpt_jax.serving.auth import load_api_keys
from fastgpt_jax.serving.settings import LOG_FORMATS, LOG_LEVELS, ServerSettings

LIMITS: Mapping[str, str] = MappingProxyType(
    {
        "max_body_bytes": "Most bytes of a request's body.",
        "max_header_bytes": "Most bytes of a request's headers.",
        "max_prompts": "Most prompts of a request, or inputs of an embedding.",
        "max_n": "Most continuations of a prompt.",
        "max_sequences": "Most prompts times continuations of a request.",
        "max_stop_strings": "Most stop strings of a request.",
        "max_stop_chars": "Most characters of a stop string.",
        "max_logit_bias": "Most entries of logit_bias.",
        "max_messages": "Most messages of a chat.",
        "max_json_depth": "Deepest nesting of a body.",
        "max_schema_bytes": "Largest JSON schema, regular expression or grammar; 65536 at most.",
        "max_request_id_chars": "Longest request id that a client may choose.",
        "max_queue_len": "Sequences that may wait for a place; one more is refused with 429.",
        "max_queued_tokens": "Prompt tokens that may wait for their first answer.",
        "request_timeout_s": "Seconds after which a request ends with 504.",
        "body_timeout_s": "Seconds in which a body must arrive.",
        "grammar_timeout_s": "Seconds in which a schema or grammar must be compiled.",
        "keep_alive_timeout_s": "Seconds after which an idle connection is closed.",
        "shutdown_timeout_s": "Seconds that requests under way get after SIGTERM.",
        "result_cache_ttl_s": "Seconds that answers to deterministic requests are kept; 0 keeps none.",
        "result_cache_bytes": "Most bytes that kept answers may take.",
    }
)
"""Field of ServerSettings that is a flag of the same name -> what it is."""

MODEL_OPTIONS = ("tokenizer", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_logprobs")
MODEL_OPTIONS = (*MODEL_OPTIONS, "tensor_parallel_size", "quantization", "kv_cache_dtype", "sparse")
"""Decided when a model is compiled: flags of `fastgpt compile`, and checked against an artifact by the engine."""
COMPILE_OPTIONS = ("params", "quantization_rules", "strict", "page_size", "memory_pool_size")
"""Flags of `fastgpt compile` that an artifact has no use for."""
ENGINE_OPTIONS = ("verify", "on_mismatch", "seed", "max_batch", "min_batch", "batch_timeout_ms", "pin_buckets")
"""Decided when the engine starts."""
SWAP_GIB = 4.0
"""Of the host's memory, for `--swap_to_cpu` alone."""
PRECISIONS: Mapping[str, str] = MappingProxyType(
    {"mixed": "bfloat16", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
)
"""Precision -> dtype of parameters and activations; norms, softmax and sampling are float32 in all."""


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("model", None, "Artifact, model folder, hub's id, or FILE.py:FUNCTION.", required=True, flag_values=values)
    text("config", None, "YAML file with service, hardware and optimization; flags win.", flag_values=values)
    _add_model_flags(values)
    _add_engine_flags(values)
    default = ServerSettings()
    text("host", default.host, "Address to listen on; 0.0.0.0 is all.", flag_values=values)
    integer("port", default.port, "Port to listen on; 0 takes a free one.", flag_values=values)
    integer("control_port", None, "Port for /drain and /profile, from this machine alone.", flag_values=values)
    text("profile_folder", None, "Where profiles of --control_port are written.", flag_values=values)
    flags.DEFINE_multi_string("served_model_name", [], "What requests call the model; repeatable.", flag_values=values)
    text("api_key_file", None, "File with an API key a line; without it no key is asked for.", flag_values=values)
    flags.DEFINE_bool("open_metrics", False, "/metrics and /openapi.json need no key.", flag_values=values)
    flags.DEFINE_multi_string(
        "cors_allow_origins",
        [],
        "Origin of web pages that may call the server; * is all; repeatable.",
        flag_values=values,
    )
    text("ssl_certfile", None, "PEM file with the certificate, for TLS.", flag_values=values)
    text("ssl_keyfile", None, "PEM file with the certificate's key.", flag_values=values)
    flags.DEFINE_enum("log_format", default.log_format, LOG_FORMATS, "How log lines look.", flag_values=values)
    flags.DEFINE_enum("log_level", default.log_level, LOG_LEVELS, "What is logged.", flag_values=values)
    text("prewarm", None, "JSON lines with prompts whose prefixes are cached before ready.", flag_values=values)
    text("cache_folder", "~/.cache/fastgpt-jax", "Where compiled models are kept.", flag_values=values)
    for name, meaning in LIMITS.items():
        value = getattr(default, name)
        define = integer if isinstance(value, int) else flags.DEFINE_float
        define(name, value, meaning, flag_values=values)
    return values


def _add_model_flags(values: flags.FlagValues) -> None:
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("params", None, "safetensors file or Orbax folder for FUNCTION's parameters.", flag_values=values)
    text("tokenizer", None, "Folder of a tokenizer.", flag_values=values)
    text("dtype", "auto", "Of a model folder: auto, float32, bfloat16 or float16.", flag_values=values)
    flags.DEFINE_enum(
        "precision", None, list(PRECISIONS), "dtype by another name; mixed is bfloat16.", flag_values=values
    )
    integer("max_model_len", None, "Tokens of prompt and output together.", lower_bound=2, flag_values=values)
    integer("max_num_seqs", None, "Sequences that run together.", lower_bound=1, flag_values=values)
    integer("max_num_batched_tokens", None, "Most tokens of a step.", lower_bound=1, flag_values=values)
    integer("max_logprobs", None, "Most likely tokens that may be asked for.", lower_bound=1, flag_values=values)
    integer("tensor_parallel_size", None, "Devices that share every layer.", lower_bound=1, flag_values=values)
    integer("pipeline_parallel_size", 1, "Devices that share the layers among them; 1.", flag_values=values)
    add_quantization_flags(values)


def _add_engine_flags(values: flags.FlagValues) -> None:
    text, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
    flags.DEFINE_enum("verify", None, LEVELS, "How much of an artifact is checked first.", flag_values=values)
    flags.DEFINE_enum(
        "on_mismatch",
        None,
        ON_MISMATCH,
        "With an artifact of another environment: recompile or refuse.",
        flag_values=values,
    )
    text("gpu_id", None, "GPUs to run on, as in 0 or 0,1.", flag_values=values)
    text("memory_pool_size", None, "Bytes of all pages on each device, as in 24GB.", flag_values=values)
    integer("page_size", None, "Tokens of a page of the caches.", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "gpu_memory_utilization",
        None,
        "Share of a device's memory that weights, pages and steps may take.",
        flag_values=values,
    )
    boolean("swap_to_cpu", False, "Rows of preempted requests go to the host's memory.", flag_values=values)
    flags.DEFINE_float("swap_space", None, "GiB of the host's memory for them.", lower_bound=0, flag_values=values)
    boolean("enable_prefix_caching", True, "Prompts that begin alike share what was computed.", flag_values=values)
    boolean("pin_buckets", False, "Steps have one shape each, whoever runs beside; slower.", flag_values=values)
    boolean("async_pipeline", True, "The next step is prepared while one runs; always.", flag_values=values)
    integer("max_batch", None, "Most sequences that run together.", lower_bound=1, flag_values=values)
    integer("min_batch", None, "Sequences that an idle engine waits for.", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "batch_timeout_ms", None, "Longest that it waits for min_batch.", lower_bound=0, flag_values=values
    )
    integer("num_workers", NUM_TOKENISERS, "Threads that make tokens of text.", lower_bound=1, flag_values=values)
    integer("seed", None, "Decides the draws of requests without a seed.", flag_values=values)


def make_settings(values: flags.FlagValues, model_name: str) -> ServerSettings:
    """Returns what the flags say of the server."""
    given = flag_values(values)
    same = (*LIMITS, "host", "port", "control_port", "open_metrics", "log_format", "log_level")
    return ServerSettings(
        **{name: given[name] for name in same},
        profile_folder=_path(given["profile_folder"]),
        ssl_certfile=_path(given["ssl_certfile"]),
        ssl_keyfile=_path(given["ssl_keyfile"]),
        served_model_names=tuple(given["served_model_name"]) or (model_name,),
        api_keys=() if given["api_key_file"] is None else load_api_keys(given["api_key_file"]),
        cors_allow_origins=tuple(given["cors_allow_origins"]),
    )


def flag_values(values: flags.FlagValues) -> dict[str, Any]:
    """Returns the values of all flags by name."""
    return {name: values[name].value for name in values}


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def apply_config(values: flags.FlagValues, config: Mapping[str, Any]) -> None:
    """Sets flags that the command line did not set."""
    for name, value in config.items():
        if not values[name].present:
            try:
                values[name].parse(value if isinstance(value, bool) else str(value))
            except flags.Error as error:
                raise UserError(f"--config: {error}") from error


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What the flags say of the model and the engine, by name; None is left to whoever decides.

    Attributes:
      compiled: Decided when a model is compiled.
      compiling: For a model that is no artifact alone.
      engine: Decided when the engine starts.
    """

    model: str
    compiled: Mapping[str, Any]
    compiling: Mapping[str, Any]
    engine: Mapping[str, Any]
    gpu_id: str | None
    num_workers: int
    cache_folder: Path
    prewarm: Path | None


def make_model_options(values: flags.FlagValues) -> ModelOptions:
    """Returns what the flags say of the model."""
    # A 0 was asked for, though it equals False.
    given = {
        name: value
        for name, value in flag_values(values).items()
        if value is not None and value is not False and value != "auto"
    }

    def pick(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    if not values["async_pipeline"].value:
        raise UserError("async_pipeline=false is not supported: the next step is always prepared while one runs")
    if given["pipeline_parallel_size"] != 1:
        raise UserError(
            f"pipeline_parallel_size={given['pipeline_parallel_size']} is not supported: layers are not divided among "
            "devices yet; leave it at 1, or give tensor_parallel_size"
        )
    engine = {**pick(ENGINE_OPTIONS), **pick(("gpu_memory_utilization",))}
    if not values["enable_prefix_caching"].value:
        engine["enable_prefix_caching"] = False
    swap_gib = given.get("swap_space", SWAP_GIB if "swap_to_cpu" in given else None)
    if swap_gib is not None:
        engine["swap_space"] = int(swap_gib * 2**30)
    return ModelOptions(
        model=given["model"],
        compiled={**pick(MODEL_OPTIONS), **_dtype(given.get("dtype"), given.get("precision"))},
        compiling=pick(COMPILE_OPTIONS),
        engine=engine,
        gpu_id=given.get("gpu_id"),
        num_workers=given["num_workers"],
        cache_folder=Path(given["cache_folder"]).expanduser(),
        prewarm=_path(given.get("prewarm")),
    )


def _dtype(dtype: str | None, precision: str | None) -> dict[str, str]:
    asked = {dtype, None if precision is None else PRECISIONS[precision]} - {None}
    if len(asked) > 1:
        raise UserError(f"--dtype={dtype} and --precision={precision} ask for different dtypes; give one of them")
    return {"dtype": name for name in asked if name is not None}  # noqa: B035 - one at most
