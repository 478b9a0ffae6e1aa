"""The most likely token of each row: the variant for batches in which every request has temperature 0 and no extras."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.logprobs import describe
from fastgpt_jax.sampling.step_io import StepOutputs


def sample(logits: Float[Array, "R V"], inputs: SamplerInputs | None, max_logprobs: int) -> StepOutputs:
    """Takes each row's most likely token, the lowest id among equals. Reads nothing of `inputs`."""
    del inputs
    ids = jnp.argmax(logits, axis=1).astype(jnp.int32)
    return describe(logits, ids, jnp.zeros_like(ids), max_logprobs)
