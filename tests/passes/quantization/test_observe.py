"""Statistics of activations against those computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.quantization.observe import observe


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_statistics_are_those_of_the_activations_and_the_result_stays():
    params = {"a": normal(8, 6), "layers": normal(3, 6, 6, seed=1) / 3}
    x = normal(2, 4, 8, seed=2)
    seen = []

    def fn(params, x, keep=lambda _: None):
        keep(x)
        x = x @ params["a"]
        for layer in params["layers"]:
            keep(x)
            x = jnp.tanh(x @ layer)
        keep(x)
        return x @ params["a"].T

    def scanned(params, x):
        x = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ params["a"], params["layers"])[0]
        return x @ params["a"].T

    want = fn(params, x, lambda x: seen.append(np.asarray(x).reshape(-1, x.shape[-1])))
    found, statistics = jax.jit(observe(scanned))(params, x)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert set(statistics) == {"a:dot", "layers:dot", "a:dot#2"}
    expected = {"a:dot": seen[0], "layers:dot": np.stack(seen[1:4]), "a:dot#2": seen[4]}
    for key, rows in expected.items():
        np.testing.assert_allclose(statistics[key].absmax, np.abs(rows).max((-2, -1)), rtol=1e-5)
        np.testing.assert_allclose(statistics[key].channel_absmax, np.abs(rows).max(-2), rtol=1e-5)
        np.testing.assert_allclose(statistics[key].channel_mean_square, (rows**2).mean(-2), rtol=1e-4)


def test_products_of_activations_have_no_statistics():
    _, statistics = observe(lambda p, x: x @ x.T + p["w"])({"w": jnp.ones((4, 4))}, jnp.ones((4, 4)))
    assert statistics == {}
