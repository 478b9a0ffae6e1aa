"""`fastgpt explain`: what serving a model would cache and carry, what mixes its tokens, and what is refused.

    fastgpt explain my_model.py:make_model --max_model_len 2048

A function of your own is traced with shapes in place of weights, unless `--params` names them. Exit code 1 says that
the model is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags

from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.model_source import ModelSource, is_function_spec, load_source, needs_values, trace_source
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.explain import Explanation, explain
from fastgpt_jax.errors import UserError

EXIT_REFUSED = 1
DEFAULT_MAX_MODEL_LEN = 512


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "model", None, "Model folder, or FILE.py:FUNCTION or MODULE:FUNCTION.", required=True, flag_values=values
    )
    flags.DEFINE_string(
        "params",
        None,
        "safetensors file or Orbax folder for FUNCTION's parameters, to certify on them instead of on random numbers.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_model_len",
        None,
        f"Tokens of prompt and output together; by default what a folder names, else {DEFAULT_MAX_MODEL_LEN}.",
        lower_bound=2,
        flag_values=values,
    )
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    params: str | None
    max_model_len: int | None


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "explain",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        positional="model",
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Prints the explanation."""
    found = _explain(options)
    print(found)
    return EXIT_REFUSED if found.refusal is not None else 0


def _explain(options: Options) -> Explanation:
    if options.params is not None or not is_function_spec(options.model):
        return _explain_source(load_source(options.model, options.params, max_model_len=options.max_model_len), options)
    try:
        return _explain_source(trace_source(options.model), options)
    except Exception as error:
        if not needs_values(error):
            raise
    return _explain_source(load_source(options.model), options)


def _explain_source(source: ModelSource, options: Options) -> Explanation:
    limit = source.max_model_len
    if limit is not None and (options.max_model_len or 0) > limit:
        raise UserError(f"--max_model_len must be at most the model's own {limit}, got {options.max_model_len}")
    length = options.max_model_len or limit or DEFAULT_MAX_MODEL_LEN
    return explain(source.model, source.params, CompileConfig(max_model_len=length))
