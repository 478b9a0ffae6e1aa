"""The demo's baseline is right and never traces while the clock runs."""

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.cli.recompute import Recompute

V = 11


def test_it_writes_the_most_likely_tokens_and_does_not_trace_again():
    traced = []

    def fn(params, tokens):
        """The next token's logits depend on all tokens so far, by a causal sum."""
        traced.append(tokens.shape)
        return params[jnp.cumsum(tokens, axis=1) % V]

    params = jax.random.normal(jax.random.key(0), (V, V))
    baseline = Recompute(fn, params, max_model_len=70)
    assert baseline.lengths == (64, 70)
    assert traced == [(1, 64), (1, 70)]
    ids = [3, 5]
    for _ in range(68):
        ids.append(int(np.argmax(params[sum(ids) % V])))
    assert baseline.generate([3, 5], 68) == ids[2:]
    assert len(traced) == 2
