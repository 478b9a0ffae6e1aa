"""One token a row under any mixture of temperature, penalties, bias, bans and truncation.

Does not know how requests ask for these (`params.py`). The one idea: a token is drawn by adding Gumbel noise to the
logits and taking the largest; the noise depends on the request's seed and step alone, so a request draws the same
tokens in whatever batch it runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.logprobs import describe
from fastgpt_jax.sampling.step_io import StepOutputs
from fastgpt_jax.sampling.truncation import truncate

MIN_TEMPERATURE = 1e-5
"""Below this a row is greedy: dividing logits by less would overflow float32."""


def sample(logits: Float[Array, "R V"], inputs: SamplerInputs, max_logprobs: int) -> StepOutputs:
    """Samples one token per row, in vLLM's order: bans, bias, penalties, temperature, truncation, draw.

    Rows of temperature 0 take the most likely token after bans, bias and penalties. Reported log-probabilities and
    ranks are the model's own, before all of these.
    """
    raw = logits.astype(jnp.float32)
    adjusted = _penalize(_add_bias(_forbid(raw, inputs), inputs), inputs)
    is_random = jnp.asarray(inputs.temperature) >= MIN_TEMPERATURE
    greedy_ids = jnp.argmax(adjusted, axis=1).astype(jnp.int32)
    random_ids, full_sorts = jax.lax.cond(
        jnp.any(is_random),
        lambda: _draw(adjusted, inputs, is_random),
        lambda: (greedy_ids, jnp.zeros_like(greedy_ids)),
    )
    return describe(raw, jnp.where(is_random, random_ids, greedy_ids), full_sorts, max_logprobs)


def _forbid(logits: Float32[Array, "R V"], inputs: SamplerInputs) -> Float32[Array, "R V"]:
    """Sends the logits of tokens whose bit in `allowed_bits` is 0 to -inf."""
    num_rows, vocab_size = logits.shape
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    bits = (inputs.allowed_bits[:, :, None] >> shifts) & jnp.uint32(1)
    return jnp.where(bits.reshape(num_rows, -1)[:, :vocab_size] != 0, logits, -jnp.inf)


def _add_bias(logits: Float32[Array, "R V"], inputs: SamplerInputs) -> Float32[Array, "R V"]:
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return jax.lax.cond(
        jnp.any(inputs.bias_values != 0),
        lambda: logits.at[rows, inputs.bias_ids].add(inputs.bias_values, mode="drop"),
        lambda: logits,
    )


def _penalize(logits: Float32[Array, "R V"], inputs: SamplerInputs) -> Float32[Array, "R V"]:
    """Applies the repetition penalty over prompt and output, then frequency and presence penalties over the output."""
    history = jnp.asarray(inputs.history)
    positions = jnp.arange(history.shape[1], dtype=jnp.int32)[None, :]
    is_valid = positions < inputs.num_total[:, None]
    is_output = is_valid & (positions >= inputs.num_prompt[:, None])

    def apply() -> Float32[Array, "R V"]:
        is_seen = _count(history, is_valid, logits.shape[1]) > 0
        counts = _count(history, is_output, logits.shape[1]).astype(jnp.float32)
        factor = jnp.where(is_seen, inputs.repetition_penalty[:, None], 1.0)
        penalized = jnp.where(logits > 0, logits / factor, logits * factor)
        penalized = penalized - inputs.frequency_penalty[:, None] * counts
        return penalized - jnp.where(counts > 0, inputs.presence_penalty[:, None], 0.0)

    is_asked = (inputs.repetition_penalty != 1) | (inputs.frequency_penalty != 0) | (inputs.presence_penalty != 0)
    return jax.lax.cond(jnp.any(is_asked), apply, lambda: logits)


def _count(history: Int32[Array, "R S"], is_counted: Bool[Array, "R S"], vocab_size: int) -> Int32[Array, "R V"]:
    """Returns how often each token occurs among the counted positions; ids outside the vocabulary are ignored."""
    rows = jnp.arange(history.shape[0], dtype=jnp.int32)[:, None]
    counts = jnp.zeros((history.shape[0], vocab_size), jnp.int32)
    is_inside = (history >= 0) & (history < vocab_size)
    return counts.at[rows, jnp.where(is_inside, history, 0)].add((is_counted & is_inside).astype(jnp.int32))


def _draw(
    logits: Float32[Array, "R V"], inputs: SamplerInputs, is_random: Bool[Array, " R"]
) -> tuple[Int32[Array, " R"], Int32[Array, " R"]]:
    """Draws a token per row from the truncated distribution; returns how many full sorts that took as well."""
    scaled = logits / jnp.where(is_random, inputs.temperature, 1.0)[:, None]
    kept, full_sorts = truncate(scaled, inputs, is_random)
    seeds, steps = jnp.asarray(inputs.seeds), jnp.asarray(inputs.num_total - inputs.num_prompt)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(seeds, steps, logits.shape[1])
    return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=1).astype(jnp.int32), full_sorts


def _gumbel(seed: Array, step: Array, vocab_size: int) -> Float32[Array, " V"]:
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)
