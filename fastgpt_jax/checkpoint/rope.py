"""RoPE settings as config.json writes them: `rope_scaling` beside `rope_theta`, or one `rope_parameters` for both.

Knows the spellings, not the formulas. The one idea: a scaling is accepted by its name, and one whose frequencies depend
on the length of the sequence is refused by its name, because keys that were cached earlier would be wrong. `longrope`
has two sets of frequencies; which of them is decided here, once, by the longest text that will be served.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.layers.rope import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling

_DEFAULT_THETA = 10000.0
_SUPPORTED = ("default", "linear", "llama3", "yarn", "longrope")


def parse_rope(config: Fields, max_model_len: int | None = None) -> tuple[float, RopeScaling | None]:
    """Reads theta and the scaling.

    Args:
      max_model_len: The longest text that will be served, in tokens; None for the model's own limit.

    Raises:
      UserError: The scaling is unknown or depends on the length, or a field it needs is missing.
    """
    rope = config.object("rope_parameters")
    return parse_rope_fields(rope if rope.values else config.object("rope_scaling"), config, max_model_len)


def parse_rope_fields(
    rope: Fields, config: Fields, max_model_len: int | None, theta: float = _DEFAULT_THETA
) -> tuple[float, RopeScaling | None]:
    """The same from an object of RoPE settings inside config.json; `theta` where neither names one."""
    theta = rope.number("rope_theta", None) or config.number("rope_theta", theta)
    if theta <= 1:
        raise UserError(f"{config.where} must give rope_theta > 1, got {theta}")
    return theta, _parse_scaling(rope_kind(rope), rope, config, max_model_len)


def rope_kind(rope: Fields) -> str:
    """The name of the scaling; older files write `type`, and a file may hold both."""
    return rope.string("rope_type", None) or rope.string("type", "default")


def parse_partial_rotary_factor(config: Fields) -> float:
    """The share of a head that is rotated."""
    inside = config.object("rope_parameters").number("partial_rotary_factor", None)
    factor = config.number("partial_rotary_factor", 1.0) if inside is None else inside
    if not 0 < factor <= 1:
        raise UserError(f"{config.where} must give partial_rotary_factor between 0 and 1, got {factor}")
    return factor


def rope_notes(scaling: RopeScaling | None) -> dict[str, str]:
    """What was decided about rotations on loading, for those who keep the model; nothing for most."""
    if not isinstance(scaling, LongRopeScaling):
        return {}
    original, chosen = scaling.original_max_position_embeddings, scaling.max_model_len
    side, sign = ("long", ">") if scaling.is_long else ("short", "<=")
    return {"rope_scaling": f"longrope: {side} factors, max_model_len {chosen} {sign} original {original}"}


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
        case LongRopeScaling():
            kind = "longrope"
        case _:
            raise UserError(f"config.json has no spelling for rope scaling {type(scaling).__name__}")
    fields = dataclasses.asdict(scaling)
    fields.pop("max_model_len", None)  # of whoever loads the model next
    return {"rope_type": kind} | {name: value for name, value in fields.items() if value is not None}


def _parse_scaling(kind: str, rope: Fields, config: Fields, max_model_len: int | None) -> RopeScaling | None:
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
        case "longrope" | "su":
            own_limit = config.integer("max_position_embeddings")
            # Phi-3's own entry outside comes before the one inside, as in transformers.
            name = "original_max_position_embeddings"
            original = config.integer(name, None) or rope.integer(name)
            return LongRopeScaling(
                short_factor=_factors(rope, "short_factor"),
                long_factor=_factors(rope, "long_factor"),
                original_max_position_embeddings=original,
                factor=rope.number("factor", own_limit / original),
                max_model_len=max_model_len or own_limit,
                attention_factor=rope.number("attention_factor", None),
            )
        case "dynamic":
            raise UserError(
                f"{config.where} asks for {kind!r} rope scaling, whose frequencies depend on the length of the "
                "sequence: cached keys would be wrong as it grows; use 'yarn', 'llama3' or 'linear'"
            )
    nearest = difflib.get_close_matches(kind, _SUPPORTED, n=1, cutoff=0.0)[0]
    raise UserError(
        f"{config.where} asks for unsupported rope scaling {kind!r}; the nearest supported one is {nearest!r} "
        f"(of {', '.join(_SUPPORTED)})"
    )


def _factors(rope: Fields, name: str) -> tuple[float, ...]:
    values = rope.values.get(name)
    is_number = [isinstance(v, int | float) and not isinstance(v, bool) for v in values or ()]
    if not isinstance(values, list) or not all(is_number):
        raise UserError(f"{rope.where} must give {name} as a list of numbers, got {values!r}")
    return tuple(float(v) for v in values)


def _original_length(rope: Fields, config: Fields) -> int:
    name = "original_max_position_embeddings"
    return rope.integer(name, None) or config.integer(name, None) or config.integer("max_position_embeddings")
