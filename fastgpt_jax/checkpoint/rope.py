"""RoPE settings as config.json writes them: `rope_scaling` beside `rope_theta`, or one `rope_parameters` for both.

Knows the spellings, not the formulas. The one idea: a scaling is accepted by its name, and one whose frequencies depend
on the length of the sequence is refused by its name, because keys that were cached earlier would be wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.layers.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_DEFAULT_THETA = 10000.0
_LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
_SUPPORTED = ("default", "linear", "llama3", "yarn")


def parse_rope(config: Fields) -> tuple[float, RopeScaling | None]:
    """Reads theta and the scaling.

    Raises:
      UserError: The scaling is unknown or depends on the length, or a field it needs is missing.
    """
    rope = config.object("rope_parameters")
    if not rope.values:
        rope = config.object("rope_scaling")
    rope.require("partial_rotary_factor", 1.0, 1.0)
    config.require("partial_rotary_factor", 1.0, 1.0)
    theta = rope.number("rope_theta", None) or config.number("rope_theta", _DEFAULT_THETA)
    if theta <= 1:
        raise UserError(f"{config.where} must give rope_theta > 1, got {theta}")
    # Older files write `type`; a file may hold both.
    kind = rope.string("rope_type", None) or rope.string("type", "default")
    return theta, _parse_scaling(kind, rope, config)


def export_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` entry that `parse_rope` reads back."""
    match scaling:
        case None:
            return None
        case LinearScaling():
            kind = "linear"
        case Llama3Scaling():
            kind = "llama3"
        case YarnScaling():
            kind = "yarn"
        case _:
            raise UserError(f"config.json has no spelling for rope scaling {type(scaling).__name__}")
    fields = dataclasses.asdict(scaling)
    return {"rope_type": kind} | {name: value for name, value in fields.items() if value is not None}


def _parse_scaling(kind: str, rope: Fields, config: Fields) -> RopeScaling | None:
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(rope.number("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position_embeddings=_original_length(rope, config),
            )
        case "yarn":
            return YarnScaling(
                factor=rope.number("factor"),
                original_max_position_embeddings=_original_length(rope, config),
                attention_factor=rope.number("attention_factor", None),
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                mscale=rope.number("mscale", None),
                mscale_all_dim=rope.number("mscale_all_dim", None),
                truncate=rope.boolean("truncate", True),
            )
    if kind in _LENGTH_DEPENDENT:
        raise UserError(
            f"{config.where} asks for {kind!r} rope scaling, whose frequencies depend on the length of the sequence: "
            "cached keys would be wrong as it grows; use 'yarn', 'llama3' or 'linear'"
        )
    nearest = difflib.get_close_matches(kind, _SUPPORTED, n=1, cutoff=0.0)[0]
    raise UserError(
        f"{config.where} asks for unsupported rope scaling {kind!r}; the nearest supported one is {nearest!r} "
        f"(of {', '.join(_SUPPORTED)})"
    )


def _original_length(rope: Fields, config: Fields) -> int:
    name = "original_max_position_embeddings"
    return rope.integer(name, None) or config.integer(name, None) or config.integer("max_position_embeddings")
