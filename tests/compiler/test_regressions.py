"""Mistakes once found in the derivation and its certificate, each as the smallest model that shows it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastgpt_jax
from fastgpt_jax.compiler.comparison import difference
from fastgpt_jax.compiler.trial_tokens import compared_ids, make_trial_tokens
from passes.incremental.errors import NotServable

VOCAB, WIDTH = 23, 8


def parameters() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "embed": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "a": jax.random.normal(keys[1], (WIDTH, WIDTH)) * WIDTH**-0.5,
        "out": jax.random.normal(keys[2], (WIDTH, VOCAB)),
    }


def attend(params: Any, x: Any, mask: Any) -> Any:
    scores = jnp.where(mask, x @ jnp.swapaxes(x @ params["a"], 1, 2), -1e9)
    return x + jax.nn.softmax(scores) @ x


def earlier(tokens: Any) -> Any:
    return jnp.tri(tokens.shape[1], dtype=bool)


def compile_model(fn: Any, params: Any = None, length: int = 16) -> Any:
    params = parameters() if params is None else params
    return fastgpt_jax.compile(fn, params, fastgpt_jax.CompileConfig(max_model_len=length, max_num_seqs=2))


# ------------------------------------------------------------------------------------------ the certificate
def sees_all(params: Any, tokens: Any) -> Any:
    return attend(params, params["embed"][tokens], jnp.bool_(True)) @ params["out"]


@pytest.mark.parametrize("fill", [-1e4, -1e9, float(jnp.finfo(jnp.float32).min)])
def test_fill_among_the_logits_hides_no_leak(fill: float):
    with pytest.raises(NotServable, match="not causal"):
        compile_model(lambda p, t: jnp.where(jnp.arange(VOCAB) > VOCAB - 3, fill, sees_all(p, t)))


def test_difference_is_measured_against_logits_and_not_against_fills():
    want = np.array([[1.0, -8.0, -1e9], [2.0, 4.0, -1e9]], np.float32)
    assert difference(want, want) == 0.0
    assert difference(want + np.array([0.08, 0, 0], np.float32), want) == pytest.approx(0.01, rel=1e-3)
    assert difference(want + np.array([0, 0, 64], np.float32), want) < 1e-6  # the spacing of float32 there
    large = np.array([3e5, 2e4, -1e3, 40.0], np.float32)  # a continuum has no fill
    assert difference(large + 3, large) == pytest.approx(1e-5, rel=1e-3)


def test_model_without_a_finite_logit_is_refused():
    params = parameters()
    params["out"] = params["out"] * jnp.nan
    with pytest.raises(NotServable, match="no finite number"):
        compile_model(sees_all, params)


def sees_placeholders(params: Any, tokens: Any) -> Any:
    """Placeholders of an image see each other both ways, as in Gemma 3."""
    image = tokens[0] == 21
    mask = earlier(tokens) | (image[:, None] & image)
    return attend(params, params["embed"][tokens], mask) @ params["out"]


def test_tokens_that_the_model_asks_for_are_tried():
    params = parameters()
    params["embed"] = jnp.tile(params["embed"], (100, 1))
    params["out"] = jnp.tile(params["out"], (1, 100))
    with pytest.raises(NotServable, match="not causal"):
        compile_model(sees_placeholders, params)


def test_special_tokens_stand_in_late_pairs():
    tokens = make_trial_tokens(40, 1000, [7, 999], seed=0)
    assert tokens[27:31].tolist() == [7, 7, 999, 999]
    assert make_trial_tokens(2, 1000, [7], seed=0).shape == (2,)
    assert set(make_trial_tokens(64, 2, [], seed=0).tolist()) == {0, 1}


def sees_prefix(params: Any, tokens: Any, *, size: int) -> Any:
    mask = earlier(tokens) | (jnp.arange(tokens.shape[1]) < size)
    return attend(params, params["embed"][tokens], mask) @ params["out"]


def test_long_prefix_is_found_whole():
    compiled = compile_model(lambda p, t: sees_prefix(p, t, size=130), length=320)
    assert compiled.min_first_chunk == 130


def sees_a_region(params: Any, tokens: Any) -> Any:
    """Causal but for a few tokens, far from both ends."""
    i = jnp.arange(tokens.shape[1])
    region = (i >= 80) & (i < 88)
    return attend(params, params["embed"][tokens], earlier(tokens) | (region[:, None] & region)) @ params["out"]


def test_small_region_that_looks_ahead_is_found():
    with pytest.raises(NotServable, match="not causal"):
        compile_model(sees_a_region, length=128)


def noisy_recurrence(params: Any, tokens: Any) -> Any:
    """A key split in every trip costs what no parameter determines."""

    def step(carry: Any, x: Any) -> Any:
        h, key = carry
        key, use = jax.random.split(key)
        h = jnp.tanh(h @ params["a"] + x + 0.1 * jax.random.normal(use, (WIDTH,)))
        return (h, key), h

    x = params["embed"][tokens[0]]
    return jax.lax.scan(step, (jnp.zeros(WIDTH), jax.random.key(0)), x)[1][None] @ params["out"]


def test_loop_over_time_is_not_counted_as_parameters_only_work():
    certificate = compile_model(noisy_recurrence).certificate
    assert 0.5 < certificate.decode_ratio <= 1.2


def test_ids_compared_with_tokens_are_found():
    compiled = compile_model(lambda p, t: jnp.where((t == 5)[..., None], 0, p["embed"][t]) @ p["out"])
    assert compared_ids(compiled.captured) == [5]


# ------------------------------------------------------------------------------------------ the capture
def test_traces_of_a_capture_and_of_the_user_are_kept_apart():
    """A jitted function is traced once; whoever comes second would find the other's trace of it."""

    @jax.jit
    def recurrence(decay: Any, x: Any) -> Any:
        return jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, x), axis=1)[1]

    def forward(params: Any, tokens: Any) -> Any:
        x = params["embed"][tokens]
        return recurrence(jax.nn.sigmoid(x @ params["a"]), x) @ params["out"]

    params = parameters()
    jax.eval_shape(forward, params, jnp.zeros((1, 12), jnp.int32))  # before: at the shorter length of the capture
    assert {e.kind for e in compile_model(forward).layout.entries} == {"carry"}
    jax.eval_shape(jax.grad(lambda p: forward(p, jnp.zeros((1, 16), jnp.int32)).sum()), params)  # after


def test_python_number_among_the_parameters_gives_way_in_promotion():
    params = {**jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters()), "scale": 0.5, "count": np.int64(2)}
    with jax.numpy_dtype_promotion("standard"):
        compiled = compile_model(lambda p, t: (p["embed"][t] * p["scale"]) @ p["out"], params)
    assert compiled.captured.graph.outputs[0].dtype == jnp.bfloat16
    assert all(isinstance(x, jax.Array) for x in compiled.leaves)


# ------------------------------------------------------------------------------------------ the rules
def branch_of_one_token(params: Any, x: Any) -> Any:
    """A recurrence whose step has a branch and a loop of unknown length, which are of one token each."""

    def step(h: Any, row: Any) -> Any:
        h = jax.lax.cond(row.sum() > 0, lambda h: jnp.tanh(h @ params["a"] + row), lambda h: 0.5 * h, h)
        h = jax.lax.while_loop(lambda h: jnp.abs(h).sum() > 2, lambda h: 0.5 * h, h)
        return h, h

    return jax.lax.scan(step, jnp.zeros(WIDTH), x[0])[1][None]


def weights_scattered_a_token(params: Any, x: Any) -> Any:
    """The two best of eight channels are kept, by a scatter mapped over tokens, as routers write it."""
    best, index = jax.lax.top_k(x @ params["a"], 2)
    return jax.vmap(jax.vmap(lambda w, i: jnp.zeros(WIDTH).at[i].set(w)))(best, index)


def convolved_channels(params: Any, x: Any) -> Any:
    """`jnp.convolve` a channel; mapped, it reshapes in another order of dimensions."""
    one = jax.vmap(lambda row, taps: jnp.convolve(row, taps)[: row.shape[0]], (1, 1), 1)
    return jax.vmap(one, (0, None))(x, params["a"][:4])


def unpacked(params: Any, x: Any) -> Any:
    """Queries, keys and values from one product, unpacked: one operation on later releases of JAX."""
    q, k, v = jnp.einsum("btd,cde->cbte", x, jnp.stack([params["a"], params["a"].T, params["a"] + 1]))
    scores = jnp.where(earlier(x[..., 0]), q @ jnp.swapaxes(k, 1, 2), -1e9)
    return jax.nn.softmax(scores) @ v


def weights_scattered_by_row(params: Any, x: Any) -> Any:
    """The same, with the token's own row in the index."""
    best, index = jax.lax.top_k((x @ params["a"])[0], 2)
    return jnp.zeros_like(x[0]).at[jnp.arange(x.shape[1])[:, None], index].set(best)[None]


BESIDE_TIME = [branch_of_one_token, weights_scattered_a_token, weights_scattered_by_row, convolved_channels, unpacked]


@pytest.mark.parametrize("mix", BESIDE_TIME)
def test_operations_beside_time_are_served(mix: Any):
    certificate = compile_model(lambda p, t: mix(p, p["embed"][t]) @ p["out"]).certificate
    assert certificate.worst_error < 1e-5


def scattered_along_time(params: Any, x: Any) -> Any:
    """Each token writes its row where the first channel says."""
    place = jnp.argmax(x, axis=-1)[0]
    return jnp.zeros_like(x).at[:, place].add(x)


def test_scatter_along_time_is_refused():
    with pytest.raises(NotServable, match="writes at computed tokens"):
        compile_model(lambda p, t: scattered_along_time(p, p["embed"][t]) @ p["out"])
