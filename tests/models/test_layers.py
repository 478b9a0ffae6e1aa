"""Layers against their formulas, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.models.layers.attention import causal_attention
from fastgpt_jax.models.layers.norm import LayerNorm, RMSNorm
from fastgpt_jax.models.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    apply_rope,
    make_frequencies,
    rope_table,
)

pytestmark = pytest.mark.usefixtures("strict_jax")
FLOAT32 = jnp.dtype(jnp.float32)
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def random(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def attend_by_hand(query, key, value):
    B, T, N, H = query.shape
    G = N // key.shape[2]
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(B, T, N):
        scores = key[b, : t + 1, n // G].astype(np.float64) @ query[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, : t + 1, n // G]
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_query_heads_read_their_group_and_nothing_later(num_kv_heads):
    query = random(2, 5, 6, 4)
    key, value = random(2, 5, num_kv_heads, 4, seed=1), random(2, 5, num_kv_heads, 4, seed=2)
    out = jax.jit(causal_attention)(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value))
    np.testing.assert_allclose(out, attend_by_hand(query, key, value), atol=1e-5)


def test_norms_follow_their_formulas():
    x = random(2, 3, 8) + 100.0
    rms, layer = RMSNorm(8, 1e-5, dtype=FLOAT32), LayerNorm(8, 1e-5, dtype=FLOAT32)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(rms(jnp.asarray(x)), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5), rtol=1e-5)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-4)  # x is rounded to float32 at 100.


def test_norms_keep_bfloat16_outside_and_float32_inside():
    x = jnp.full((1, 4), 300.0, jnp.bfloat16)
    norm = RMSNorm(4, 1e-5, dtype=jnp.dtype(jnp.bfloat16))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), jnp.ones((1, 4), jnp.bfloat16))


def test_rotations_keep_lengths_and_depend_on_distances_alone():
    x = jnp.asarray(np.repeat(random(1, 1, 2, 8), 12, axis=1))
    cos, sin = rope_table(jnp.arange(12), 8, 100.0, None)
    rotated = np.asarray(apply_rope(x, cos, sin))
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    products = np.einsum("btnh,bsnh->nts", rotated, rotated)
    np.testing.assert_allclose(products[:, 3, 1], products[:, 11, 9], rtol=1e-4)


def test_linear_scaling_divides_every_frequency():
    plain = make_frequencies(16, 1e4, None)
    np.testing.assert_allclose(make_frequencies(16, 1e4, LinearScaling(4.0)), plain / 4, rtol=1e-6)


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones():
    plain, scaled = make_frequencies(128, 5e5, None), make_frequencies(128, 5e5, LLAMA3)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns < 4) & (turns > 1)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


def test_yarn_keeps_the_first_frequency_divides_the_last_and_grows_the_amplitude():
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=4096)
    plain, scaled = make_frequencies(128, 1e4, None), make_frequencies(128, 1e4, scaling)
    np.testing.assert_allclose([scaled[0], scaled[-1]], [plain[0], plain[-1] / 4], rtol=1e-6)
    assert scaling.amplitude == pytest.approx(1.1386294)
    assert YarnScaling(4.0, 4096, attention_factor=2.0).amplitude == 2.0
    assert YarnScaling(4.0, 4096, mscale=1.0, mscale_all_dim=1.0).amplitude == 1.0
    cos, _ = rope_table(jnp.arange(1), 128, 1e4, scaling)
    np.testing.assert_allclose(cos, scaling.amplitude, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearScaling(0.0),
        lambda: LinearScaling(float("nan")),
        lambda: Llama3Scaling(8.0, 4.0, 4.0, 8192),
        lambda: YarnScaling(factor=-1.0, original_max_position_embeddings=64),
    ],
)
def test_impossible_scalings_are_user_errors(make):
    with pytest.raises(UserError, match="rope scaling needs"):
        make()
