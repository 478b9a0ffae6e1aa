"""From what a user calls a model to a compiled one.

The one idea: the compiler is reached by a lazy import and only for what is not compiled yet, so that serving a
compiled model loads no compiler.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from fastgpt_jax.artifact.cache_layout import SNAPSHOTS_PER_REQUEST
from fastgpt_jax.artifact.device_memory import device_memory_bytes
from fastgpt_jax.artifact.loading import is_artifact, load_artifact
from fastgpt_jax.engine.args import EngineArgs
from fastgpt_jax.engine.compiled import CompiledModel
from fastgpt_jax.errors import UserError


def resolve_model(args: EngineArgs) -> CompiledModel:
    """Compiles `args.model` unless that was done; raises UserError where it is nothing that can be served."""
    if isinstance(args.model, (str, Path)) and is_artifact(args.model):
        args = dataclasses.replace(args, model=_load_artifact(args))
    elif (args.verify, args.on_mismatch, args.check_fingerprint) != ("auto", "recompile", True):
        raise UserError("verify, on_mismatch and check_fingerprint are for artifacts, and this model is none")
    if not _is_compiled(args.model):
        return _compile(args)
    compiled = _check_compiled(args)
    if args.gpu_memory_utilization is not None:
        check_memory(compiled, args.gpu_memory_utilization)
    return compiled


def _is_compiled(model: Any) -> bool:
    return hasattr(model, "init_state") and hasattr(model, "step")


def _load_artifact(args: EngineArgs) -> CompiledModel:
    return load_artifact(
        args.model,
        verify=args.verify,
        on_mismatch=args.on_mismatch,
        check_fingerprint=args.check_fingerprint,
        tell=lambda line: print(line, file=sys.stderr),
    )


def _check_compiled(args: EngineArgs) -> CompiledModel:
    """A compiled model is what it is: an argument that asks for another one is an error."""
    for name in ("max_model_len", "max_num_seqs", "max_logprobs", "tensor_parallel_size"):
        value, found = getattr(args, name), getattr(args.model, name)
        if value is not None and value != found:
            raise UserError(f"{name}={value}, but the model was compiled for {found}; compile it again")
    asked = (args.dtype, args.tokenizer, args.quantization, args.kv_cache_dtype, args.sparse)
    if asked != ("auto", None, None, "auto", None):
        raise UserError(
            "dtype, tokenizer, quantization, kv_cache_dtype and sparse are decided when a model is compiled; leave "
            "them out for a compiled one"
        )
    return args.model


def _compile(args: EngineArgs) -> CompiledModel:
    # The compiler and the checkpoint readers are not needed to serve what is compiled already.
    from fastgpt_jax.compiler.compile import compile as compile_model  # noqa: PLC0415
    from fastgpt_jax.compiler.config import CompileConfig  # noqa: PLC0415
    from fastgpt_jax.compiler.distribution import check_devices  # noqa: PLC0415

    check_devices(args.tensor_parallel_size or 1)
    loaded = _load(args)
    longest = loaded.generation.max_model_len
    if args.max_model_len is not None and args.max_model_len > longest:
        raise UserError(f"max_model_len must be at most the model's own {longest}, got {args.max_model_len}")
    names = (
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_logprobs",
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "quantization",
        "kv_cache_dtype",
        "sparse",
    )
    chosen = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.max_batch is not None:
        chosen.setdefault("max_num_seqs", args.max_batch)
    config = dataclasses.replace(CompileConfig(max_model_len=args.max_model_len or longest), **chosen)
    return compile_model(loaded, config=config)


def _load(args: EngineArgs) -> Any:
    """Returns a loaded model with the tokenizer the user asked for."""
    model = args.model
    if isinstance(model, (str, Path)):
        from fastgpt_jax.checkpoint import load_model  # noqa: PLC0415

        dtype = None if args.dtype == "auto" else args.dtype
        model = load_model(model, dtype=dtype, max_model_len=args.max_model_len)
    elif not hasattr(model, "generation") or not hasattr(model, "model"):
        raise UserError(
            f"model must be a folder, a loaded model or a compiled one, got {type(model).__name__}; "
            "a function and its parameters go through fastgpt_jax.compile first"
        )
    elif args.dtype != "auto":
        raise UserError("dtype is decided when a model is loaded; give it to load_model")
    if args.tokenizer is None:
        return model
    from fastgpt_jax.tokenizer import load_tokenizer  # noqa: PLC0415

    tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise UserError(f"there is no tokenizer in {args.tokenizer}")
    return dataclasses.replace(model, tokenizer=tokenizer)


def check_memory(compiled: CompiledModel, share: float) -> None:
    """Raises UserError where caches and what is on the device already exceed this share of its memory."""
    layout = compiled.layout
    # Rows are cut over the devices, what a request carries is whole on each.
    pool_bytes = layout.num_pages * layout.bytes_per_page // compiled.tensor_parallel_size
    state_bytes = pool_bytes + (1 + SNAPSHOTS_PER_REQUEST) * compiled.max_num_seqs * layout.bytes_per_request
    stats = jax.local_devices()[0].memory_stats() or {}
    limit_bytes = device_memory_bytes(compiled.tensor_parallel_size)
    needed_bytes = state_bytes + stats.get("bytes_in_use", 0)
    if needed_bytes > share * limit_bytes:
        what = "weights and caches" if stats else "caches"
        raise UserError(
            f"{what} take {needed_bytes / 2**30:.2f} GiB and gpu_memory_utilization={share} allows "
            f"{share * limit_bytes / 2**30:.2f} GiB; lower max_num_seqs or max_model_len, or compile with a smaller "
            "memory_pool_size"
        )
