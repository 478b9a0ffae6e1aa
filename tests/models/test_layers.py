"""Layers against their formulas, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.models.layers.alibi import alibi_bias, alibi_slopes
from fastgpt_jax.models.layers.attention import causal_attention
from fastgpt_jax.models.layers.norm import LayerNorm, RMSNorm
from fastgpt_jax.models.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    apply_rope,
    make_frequencies,
    rope_table,
)

pytestmark = pytest.mark.usefixtures("strict_jax")
FLOAT32 = jnp.dtype(jnp.float32)
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)

LONGROPE = functools.partial(LongRopeScaling, (1.0, 2.0), (3.0, 4.0), original_max_position_embeddings=64, factor=8.0)


def random(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def attend_by_hand(query, key, value, *, scale=None, window=None, softcap=None, bias=None):
    B, T, N, H = query.shape
    G = N // key.shape[2]
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = slice(max(0, t + 1 - (window or T)), t + 1)
        scores = key[b, seen, n // G].astype(np.float64) @ query[b, t, n] * (scale or H**-0.5)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias[n, t, seen]
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, seen, n // G]
    return out


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_query_heads_read_their_group_and_nothing_later(num_kv_heads):
    query = random(2, 5, 6, 4)
    key, value = random(2, 5, num_kv_heads, 4, seed=1), random(2, 5, num_kv_heads, 4, seed=2)
    out = jax.jit(causal_attention)(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value))
    np.testing.assert_allclose(out, attend_by_hand(query, key, value), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 3}, {"window": 9}, {"softcap": 0.5, "scale": 2.0}, {"bias": random(6, 5, 5, seed=3)}],
    ids=lambda options: next(iter(options)),
)
def test_windows_caps_and_biases_follow_their_formulas(options):
    query, key, value = random(2, 5, 6, 4), random(2, 5, 3, 4, seed=1), random(2, 5, 3, 4, seed=2)
    arrays = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out = jax.jit(functools.partial(causal_attention, **arrays))(*map(jnp.asarray, (query, key, value)))
    np.testing.assert_allclose(out, attend_by_hand(query, key, value, **options), atol=1e-5)


def test_slopes_of_heads_are_powers_of_one_base_and_the_rest_come_from_twice_as_many():
    np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9), rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125], rtol=1e-6)
    np.testing.assert_allclose(alibi_bias(8, 4)[1, 3], [-0.75, -0.5, -0.25, 0.0], rtol=1e-6)


def test_a_norm_with_an_offset_adds_it_to_the_weight():
    x = random(2, 8)
    plain, offset = RMSNorm(8, 1e-6, dtype=FLOAT32), RMSNorm(8, 1e-6, offset=1.0, dtype=FLOAT32)
    np.testing.assert_allclose(offset(jnp.asarray(x)), plain(jnp.asarray(x)), rtol=1e-6)
    offset.weight[...] = jnp.ones(8)
    np.testing.assert_allclose(offset(jnp.asarray(x)), 2 * plain(jnp.asarray(x)), rtol=1e-6)


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


def test_dimensions_beyond_the_rotated_ones_stay():
    x = jnp.asarray(random(1, 4, 2, 8))
    cos, sin = rope_table(jnp.arange(4), 6, 100.0, None)
    rotated = apply_rope(x, cos, sin)
    np.testing.assert_array_equal(rotated[..., 6:], x[..., 6:])
    np.testing.assert_array_equal(rotated[..., :6], apply_rope(x[..., :6], cos, sin))


def test_longrope_divides_by_the_factors_of_the_length_served():
    plain = make_frequencies(4, 100.0, None)
    short, long = LONGROPE(max_model_len=64), LONGROPE(max_model_len=65)
    np.testing.assert_allclose(make_frequencies(4, 100.0, short), plain / [1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(make_frequencies(4, 100.0, long), plain / [3.0, 4.0], rtol=1e-6)
    assert short.amplitude == long.amplitude == pytest.approx(np.sqrt(1 + np.log(8) / np.log(64)))
    assert LONGROPE(max_model_len=64, attention_factor=1.5).amplitude == 1.5
    with pytest.raises(UserError, match="rope scaling needs 4 numbers in short_factor.*got 2"):
        make_frequencies(8, 100.0, short)


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
        lambda: LongRopeScaling((1.0, 0.0), (1.0, 1.0), 64, factor=8.0, max_model_len=64),
    ],
)
def test_impossible_scalings_are_user_errors(make):
    with pytest.raises(UserError, match="rope scaling needs"):
        make()
