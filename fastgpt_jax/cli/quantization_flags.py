"""The flags that ask for quantized weights and sparse attention, the same for every tool that compiles.

Loads no compiler: a tool that serves what is compiled already has these flags too.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from fastgpt_jax.engine.args import CHOICES


def add_quantization_flags(values: flags.FlagValues) -> None:
    """Adds `--quantization`, `--quantization_rules`, `--kv_cache_dtype`, `--sparse` and `--strict`."""
    schemes = [name for name in CHOICES["quantization"] if name is not None]
    flags.DEFINE_enum("quantization", None, schemes, "Store weights by this scheme.", flag_values=values)
    flags.DEFINE_string(
        "quantization_rules",
        None,
        "JSON file with a list of {pattern, op, scheme} that come before those of --quantization.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "kv_cache_dtype",
        "auto",
        [str(name) for name in CHOICES["kv_cache_dtype"]],
        "What rows of caches are stored as.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "sparse",
        None,
        "Which keys heads see, as in 'layers[0:4]: window(512) | sinks(8); heads[0:half]: density(0.3)'.",
        flag_values=values,
    )
    flags.DEFINE_bool("strict", False, "A rule or clause that decides about nothing is an error.", flag_values=values)


def read_quantization_rules(path: str | None) -> Any:
    """The rules of a file; none without one."""
    if path is None:
        return ()
    # The compiler is loaded where something is compiled.
    from fastgpt_jax.compiler.quantization import read_rules  # noqa: PLC0415

    return read_rules(path)
