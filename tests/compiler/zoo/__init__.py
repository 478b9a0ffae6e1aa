"""Small models for the compiler's tests: those that are served, and those that must be refused."""

from . import (
    attention,
    frameworks_linen,
    frameworks_nnx,
    library_attention,
    loops,
    masks,
    misc,
    positions,
    recurrent,
    refused,
    shifts,
)
from .model import (
    ZooModel,
    full_forward,
    guilty_line,
    guilty_lines,
    jax_defaults,
    logits_of,
    perturbation,
    token_arguments,
    tokens_of,
)
from .quick import quick_jit

_CAUSAL: tuple[ZooModel, ...] = (
    *attention.MODELS,
    *library_attention.MODELS,
    *masks.MODELS,
    *positions.MODELS,
    *shifts.MODELS,
    *recurrent.MODELS,
    *loops.MODELS,
    *frameworks_linen.MODELS,
    *frameworks_nnx.MODELS,
    *misc.MODELS,
)
SERVED = tuple(model for model in _CAUSAL if not model.optional)
OPTIONAL = tuple(model for model in _CAUSAL if model.optional)
REFUSED = refused.MODELS

__all__ = [
    "OPTIONAL",
    "REFUSED",
    "SERVED",
    "ZooModel",
    "full_forward",
    "guilty_line",
    "guilty_lines",
    "jax_defaults",
    "logits_of",
    "perturbation",
    "quick_jit",
    "token_arguments",
    "tokens_of",
]
