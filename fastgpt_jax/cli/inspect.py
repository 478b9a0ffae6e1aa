"""`fastgpt inspect`: the X-ray of a model: its decode step before and after each pass, beside the lines it came from.

    fastgpt inspect FOLDER --format html --output xray.html
    fastgpt inspect my_model.py:make_model --after simplify
    fastgpt inspect FOLDER --quantization w4a16 --sparse "all: window(512) | sinks(8)"
    fastgpt inspect ARTIFACT

A function of your own is traced with shapes in place of weights. The page is one file that needs no network. An
artifact tells what its manifest holds. Exit code 1 says that the model is refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from absl import flags

from fastgpt_jax.artifact.loading import is_artifact
from fastgpt_jax.artifact.manifest import read_manifest
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.model_source import ModelSource, is_function_spec, load_source, needs_values, trace_source
from fastgpt_jax.cli.quantization_flags import add_quantization_flags, read_quantization_rules
from fastgpt_jax.cli.xray_html import render_html
from fastgpt_jax.cli.xray_json import render_json
from fastgpt_jax.cli.xray_text import render_text
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.quantization import make_pipeline
from fastgpt_jax.compiler.roofline import MACHINES
from fastgpt_jax.compiler.sparsity import with_sparsity
from fastgpt_jax.compiler.xray import DERIVED, XRay, xray, xray_artifact
from fastgpt_jax.errors import UserError
from passes.incremental.errors import NotServable
from passes.registry import PASSES, PIPELINES
from passes.select import SELECT

EXIT_REFUSED = 1
DEFAULT_MAX_MODEL_LEN = 512
RENDERERS: Mapping[str, Callable[[XRay, str], str]] = MappingProxyType(
    {"text": render_text, "html": render_html, "json": render_json}
)
"""Format -> a function of the X-ray and the name of the stage to show."""


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text(
        "model",
        None,
        "Model folder, artifact, or FILE.py:FUNCTION or MODULE:FUNCTION.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_enum("format", "text", list(RENDERERS), "What is written.", flag_values=values)
    text("after", None, "The pass after which the program is shown; by default the last.", flag_values=values)
    text("output", None, "File that it is written to, instead of standard output.", flag_values=values)
    integer(
        "max_model_len",
        None,
        f"Tokens of prompt and output together; by default what a folder names, else {DEFAULT_MAX_MODEL_LEN}.",
        lower_bound=2,
        flag_values=values,
    )
    integer("num_requests", 1, "Requests of the decode step.", lower_bound=1, flag_values=values)
    known = ",".join((*PASSES, SELECT, *PIPELINES))
    text("passes", CompileConfig().pipeline, f"Passes in order, of {known}.", flag_values=values)
    add_quantization_flags(values)
    flags.DEFINE_enum("machine", "h100", list(MACHINES), "Machine of the roofline.", flag_values=values)
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    format: str
    after: str | None
    output: str | None
    max_model_len: int | None
    num_requests: int
    passes: str
    quantization: str | None
    quantization_rules: str | None
    kv_cache_dtype: str
    sparse: str | None
    strict: bool
    machine: str


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "inspect",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        positional="model",
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Writes the X-ray."""
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        raise UserError(f"--output must lie in a folder that there is, got {options.output}")
    try:
        found = _look(options)
    except NotServable as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return EXIT_REFUSED
    names = [stage.name for stage in found.stages]
    _check_after(options, names)
    text = RENDERERS[options.format](found, options.after or names[-1])
    if options.output is None:
        print(text)
    else:
        Path(options.output).write_text(text, encoding="utf-8")
        print(f"{options.output}: {len(text.encode()):,} bytes", file=sys.stderr)
    return 0


def _check_after(options: Options, names: Sequence[str]) -> None:
    if options.after is not None and options.after not in names:
        raise UserError(f"--after must be one of {', '.join(dict.fromkeys(names))}, got {options.after!r}")


def _look(options: Options) -> XRay:
    machine = MACHINES[options.machine]
    if not is_function_spec(options.model) and is_artifact(Path(options.model)):
        _check_nothing_asked(options)
        return xray_artifact(read_manifest(Path(options.model)), machine)
    rules = read_quantization_rules(options.quantization_rules)
    try:
        pipeline = with_sparsity(make_pipeline(options.passes, options.quantization, rules), options.sparse)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--passes: {error}") from error
    _check_after(options, [DERIVED, *(entry.name for entry in pipeline)])
    if not is_function_spec(options.model):
        return _look_at(load_source(options.model, max_model_len=options.max_model_len), options)
    try:
        return _look_at(trace_source(options.model), options)
    except Exception as error:
        if not needs_values(error):
            raise
    return _look_at(load_source(options.model), options)


def _check_nothing_asked(options: Options) -> None:
    asked = (options.quantization, options.quantization_rules, options.sparse, options.kv_cache_dtype)
    if asked != (None, None, None, "auto"):
        raise UserError(
            "quantization and sparse are for models that are no artifacts; an artifact is what it was compiled to be"
        )


def _look_at(source: ModelSource, options: Options) -> XRay:
    limit = source.max_model_len
    if limit is not None and (options.max_model_len or 0) > limit:
        raise UserError(f"--max_model_len must be at most the model's own {limit}, got {options.max_model_len}")
    length = options.max_model_len or limit or DEFAULT_MAX_MODEL_LEN
    return xray(
        source.model,
        source.params,
        CompileConfig(
            max_model_len=length,
            pipeline=options.passes,
            quantization=options.quantization,
            quantization_rules=read_quantization_rules(options.quantization_rules),
            kv_cache_dtype=options.kv_cache_dtype,
            sparse=options.sparse,
            is_strict=options.strict,
        ),
        name=_name_of(options.model),
        machine=MACHINES[options.machine],
        num_requests=options.num_requests,
    )


def _name_of(model: str) -> str:
    place, _, function = model.rpartition(":") if is_function_spec(model) else (model, "", "")
    name = Path(place).resolve().name
    return f"{name}:{function}" if function else name
