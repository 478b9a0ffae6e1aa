"""`fastgpt compile`: writes an artifact that a fresh process serves at once, with nothing left to compile.

    fastgpt compile --model FOLDER --output ARTIFACT
    fastgpt compile --model my_model.py:make_model --output ARTIFACT --max_model_len 2048 --traffic histogram.json

The plan and the progress go to standard error, the tables of entry points and passes to standard output. Interrupted,
it leaves no artifact; run again, it goes on behind the last finished entry point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from absl import flags

from fastgpt_jax.artifact.environment import current_environment
from fastgpt_jax.artifact.loading import ON_MISMATCH, is_artifact
from fastgpt_jax.artifact.manifest import OutputChange, QualityRecord, read_manifest
from fastgpt_jax.artifact.staging import Staging
from fastgpt_jax.artifact.verify import verify_artifact
from fastgpt_jax.checkpoint import LoadedModel
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.compile_report import (
    entry_point_table,
    pass_table,
    plan_text,
    quality_table,
    sparsity_text,
    summary,
)
from fastgpt_jax.cli.devices import make_virtual_devices
from fastgpt_jax.cli.model_source import ModelSource, is_function_spec, load_source
from fastgpt_jax.cli.progress import BuildProgress
from fastgpt_jax.cli.quality_text import read_quality_text
from fastgpt_jax.cli.quantization_flags import add_quantization_flags, read_quantization_rules
from fastgpt_jax.cli.tables import format_bytes, format_seconds
from fastgpt_jax.cli.traffic_file import read_traffic
from fastgpt_jax.compiler.build import BuildReport, build_artifact
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.memory_plan import parse_bytes
from fastgpt_jax.compiler.quality_passes import changes_by_pass, measure_quality
from fastgpt_jax.compiler.quantization import make_pipeline
from fastgpt_jax.compiler.sparsity import with_sparsity
from fastgpt_jax.errors import UserError
from passes.manager import PassManager, PassOptions
from passes.registry import PASSES, PIPELINES
from passes.select import SELECT

AUTO = "auto"


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    default = CompileConfig()
    text("model", None, "Model folder, or FILE.py:FUNCTION or MODULE:FUNCTION.", required=True, flag_values=values)
    text("params", None, "safetensors file or Orbax folder for FUNCTION's parameters.", flag_values=values)
    text("tokenizer", None, "Folder of a tokenizer.", flag_values=values)
    text("output", None, "Folder of the artifact.", required=True, flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace the artifact of another model.", flag_values=values)
    text("dtype", AUTO, "Of a model folder: auto, float32, bfloat16 or float16.", flag_values=values)
    integer("max_model_len", None, "Tokens of prompt and output together.", lower_bound=2, flag_values=values)
    integer("max_num_seqs", default.max_num_seqs, "Requests that run together.", lower_bound=1, flag_values=values)
    integer("page_size", None, "Tokens of a page of the caches.", lower_bound=1, flag_values=values)
    text("memory_pool_size", None, "Bytes of all pages on each device, as in 2GiB.", flag_values=values)
    flags.DEFINE_float(
        "gpu_memory_utilization",
        None,
        "Share of a device's memory that weights, pages and steps may take; pages fill it.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    integer(
        "max_num_batched_tokens",
        default.max_num_batched_tokens,
        "Tokens, padding included, of a prefill of several requests.",
        lower_bound=1,
        flag_values=values,
    )
    integer(
        "max_logprobs",
        default.max_logprobs,
        "Most likely tokens that may be asked for beside each sampled one.",
        lower_bound=1,
        flag_values=values,
    )
    text("buckets", AUTO, "Tokens of the prefill steps, as in 16,64,256, or auto.", flag_values=values)
    text("decode_buckets", AUTO, "Requests of the decode steps, as in 1,8, or auto.", flag_values=values)
    text("traffic", None, "Histogram that auto buckets are chosen for, a JSON file.", flag_values=values)
    known = ",".join((*PASSES, SELECT, *PIPELINES))
    text("passes", default.pipeline, f"Passes in order, of {known}.", flag_values=values)
    text("print_ir_after", None, "Show the program after a pass: all, changed or its name.", flag_values=values)
    text("stop_after", None, "Last pass that is run.", flag_values=values)
    integer("bisect_limit", None, "Rewrites that are made, the rest is skipped.", lower_bound=0, flag_values=values)
    flags.DEFINE_enum(
        "on_invalid",
        default.pass_options.on_invalid,
        ["error", "skip"],
        "What to do when a rewrite computes something else than what it replaced: end, or leave its pass out.",
        flag_values=values,
    )
    integer("tensor_parallel_size", 1, "Devices that share every layer.", lower_bound=1, flag_values=values)
    add_quantization_flags(values)
    flags.DEFINE_bool("check_passes", False, "Measure how each pass changes the model's logits.", flag_values=values)
    text(
        "quality_text", None, "Text file on which what is rounded is compared with the exact model.", flag_values=values
    )
    integer("quality_tokens", 4096, "Tokens of that text that are used.", lower_bound=2, flag_values=values)
    flags.DEFINE_enum(
        "verify",
        AUTO,
        [AUTO, "full", "fast", "none"],
        "How much of what was written is read again.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "on_mismatch",
        "recompile",
        list(ON_MISMATCH),
        "What to do with an artifact of another environment in the output folder.",
        flag_values=values,
    )
    flags.DEFINE_bool("plan_only", False, "Print the plan and stop.", flag_values=values)
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    params: str | None
    tokenizer: str | None
    output: str
    overwrite: bool
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    page_size: int | None
    memory_pool_size: str | None
    gpu_memory_utilization: float | None
    max_num_batched_tokens: int
    max_logprobs: int
    buckets: str
    decode_buckets: str
    traffic: str | None
    passes: str
    print_ir_after: str | None
    stop_after: str | None
    bisect_limit: int | None
    on_invalid: Literal["error", "skip"]
    tensor_parallel_size: int
    quantization: str | None
    kv_cache_dtype: str
    quantization_rules: str | None
    sparse: str | None
    strict: bool
    check_passes: bool
    quality_text: str | None
    quality_tokens: int
    verify: str
    on_mismatch: str
    plan_only: bool


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "compile",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> None:
    """Plans, compiles, writes and reports; every mistake that can be seen before the work is told before it."""
    config = make_config(options)
    make_virtual_devices(options.tensor_parallel_size)
    if not options.plan_only:
        check_output(options)
    source = load_source(options.model, options.params, options.tokenizer, options.dtype, options.max_model_len)
    check_length(options, source)
    text = None
    if options.quality_text is not None:
        tokenizer = source.tokenizer or getattr(source.model, "tokenizer", None)
        text = read_quality_text(options.quality_text, options.quality_tokens, tokenizer)
    with contextlib.redirect_stdout(sys.stderr):  # what passes are asked to show is no table
        compiled = _derive(source, config)
    plan = plan_text(compiled.bucket_plan, compiled.captured.graph.count())
    if options.plan_only:
        print(plan)
        return
    _say(plan)
    with contextlib.redirect_stdout(sys.stderr):
        changes = changes_by_pass(compiled) if options.check_passes else ()
        quality = () if text is None else measure_quality(compiled, text.windows(compiled), text.name)
    report = _build(compiled, source, options, changes, quality)
    if options.verify != "none":
        verify_artifact(Path(options.output), options.verify)  # pyright: ignore[reportArgumentType]
    tables = [entry_point_table(report.manifest), pass_table(report.manifest)]
    tables += [sparsity_text(report.manifest)] if options.sparse is not None else []
    tables += [quality_table(report.manifest)] if quality else []
    print("\n\n".join([*tables, summary(report)]))


def make_config(options: Options) -> CompileConfig:
    """What the flags ask for; a UserError names the flag that asks for what there is not."""
    pass_options = PassOptions(
        options.print_ir_after, options.stop_after, options.bisect_limit, on_invalid=options.on_invalid
    )
    rules = read_quantization_rules(options.quantization_rules)
    try:
        pipeline = make_pipeline(options.passes, options.quantization, rules)
        PassManager(with_sparsity(pipeline, options.sparse), pass_options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--passes, --print_ir_after or --stop_after: {error}") from error
    if options.max_model_len is None and is_function_spec(options.model):
        raise UserError("--max_model_len must be given for a function, which does not name its longest sequence")
    decode_buckets = _parse_buckets("decode_buckets", options.decode_buckets)
    if max(decode_buckets, default=0) > options.max_num_seqs:
        raise UserError(
            f"--decode_buckets must be at most --max_num_seqs={options.max_num_seqs}, got {decode_buckets[-1]}"
        )
    return CompileConfig(
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        page_size=options.page_size,
        memory_pool_size=None if options.memory_pool_size is None else parse_bytes(options.memory_pool_size),
        gpu_memory_utilization=options.gpu_memory_utilization,
        max_num_batched_tokens=options.max_num_batched_tokens,
        prefill_buckets=_parse_buckets("buckets", options.buckets),
        decode_buckets=decode_buckets,
        traffic=None if options.traffic is None else read_traffic(options.traffic),
        max_logprobs=options.max_logprobs,
        pipeline=options.passes,
        pass_options=pass_options,
        tensor_parallel_size=options.tensor_parallel_size,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        quantization_rules=rules,
        sparse=options.sparse,
        is_strict=options.strict,
    )


def check_output(options: Options) -> None:
    """Refuses an output that must not be replaced; says why one that is there will be."""
    output = Path(options.output)
    Staging(output)  # refuses what is no artifact
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {output} cannot be written: {parent} is no folder, or one that may not be written to"
        )
    if not is_artifact(output):
        return
    try:
        manifest = read_manifest(output)
    except UserError as error:
        if not options.overwrite:
            raise UserError(f"{error}, or replace it by --overwrite") from error
        _say(f"replacing what is there: {error}")
        return
    name = model_name(options.model)
    if manifest.model.name != name and not options.overwrite:
        raise UserError(f"{output} holds an artifact of {manifest.model.name}, not of {name}; --overwrite replaces it")
    found = manifest.environment.mismatches(current_environment())
    if found and options.on_mismatch == "refuse":
        raise UserError(f"{output} was compiled for another environment: {'; '.join(found)}")
    if found:
        _say(f"replacing {output}, which was compiled for another environment: {'; '.join(found)}")


def check_length(options: Options, source: ModelSource) -> None:
    """Refuses a context that the model does not reach, and steps longer than the context."""
    limit = source.max_model_len
    if limit is not None and (options.max_model_len or 0) > limit:
        raise UserError(f"--max_model_len must be at most the model's own {limit}, got {options.max_model_len}")
    length = options.max_model_len or limit
    longest = max(_parse_buckets("buckets", options.buckets), default=0)
    if length is not None and longest > length:
        raise UserError(f"--buckets must be at most the {length} tokens of --max_model_len, got {longest}")


def model_name(model: str) -> str:
    """What the manifest calls the model that `--model` names."""
    if not is_function_spec(model):
        return Path(model).resolve().name
    place, _, function = model.rpartition(":")
    return f"{Path(place).name}:{function}"


def _parse_buckets(flag: str, text: str) -> tuple[int, ...]:
    """Numbers in any order; none for `auto`."""
    if text.strip() == AUTO:
        return ()
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise UserError(f"--{flag} must be whole numbers from 1 with commas, as in 16,64,256, or auto, got {text!r}")
    return tuple(sizes)


def _derive(source: ModelSource, config: CompileConfig) -> Compiled:
    started = time.monotonic()
    compiled = compile_model(source.model, source.params, config=config, tokenizer=source.tokenizer)
    error = compiled.certificate.worst_error
    took = format_seconds(time.monotonic() - started)
    _say(f"traced, derived and certified in {took}; equal to the forward within {error:.1e} of the largest logit")
    layout = compiled.layout
    if layout.num_pool_arrays:
        nbytes = format_bytes(layout.num_pages * layout.bytes_per_page / compiled.tensor_parallel_size)
        _say(f"caches of {layout.num_pages:,} pages of {layout.page_size} tokens, {nbytes} on each device")
    for name, note in compiled.notes.items():
        _say(f"{name}: {note}")
    return compiled


def _build(
    compiled: Compiled,
    source: ModelSource,
    options: Options,
    changes: Sequence[OutputChange],
    quality: Sequence[QualityRecord],
) -> BuildReport:
    """Writes the artifact; an interrupt or a full disk says what is kept."""
    loaded = source.model if isinstance(source.model, LoadedModel) else None
    with BuildProgress() as progress, contextlib.redirect_stdout(sys.stderr):
        try:
            return build_artifact(
                compiled,
                Path(options.output),
                name=model_name(options.model),
                notes=loaded.notes if loaded else None,
                chat_template=loaded.chat_template if loaded else None,
                changes=changes,
                quality=quality,
                report=progress,
            )
        except KeyboardInterrupt:
            _say(f"\ninterrupted; {_kept(progress.num_done)}, and nothing is at {options.output} that was not before")
            raise
        except OSError as error:
            place = f" {error.filename}" if error.filename else ""
            raise UserError(f"cannot write{place}: {error.strerror or error}; {_kept(progress.num_done)}") from error


def _kept(count: int) -> str:
    return (
        f"{count} finished entry point{'' if count == 1 else 's'} are kept for the next run"
        if count
        else "nothing is kept"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
