"""Every family on two devices: the logits of one, a rule for every parameter, and no more exchange than layers need."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fastgpt_jax.checkpoint import GenerationDefaults, LoadedModel
from fastgpt_jax.checkpoint.padding import pad_model
from fastgpt_jax.compiler.distribution import family_rules
from sharding import count_collectives
from tests.models.families import FAMILIES, make_model
from tests.sharding.placed import forward_of, place


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_same_logits_on_two_devices(name: str):
    config = FAMILIES[name][1]
    loaded = LoadedModel(make_model(name), config, name, None, GenerationDefaults(32), None, config.vocab_size)
    padded, padding = pad_model(loaded, 2)
    assert {str(change) for change in padding} == {"vocab 23 -> 24"}
    rules, (forward, params) = family_rules(padded.config), forward_of(padded.model)
    assert not rules.assign({path: leaf.shape for path, leaf in params.items()}, {"tensor": 2}).unmatched
    tokens = np.arange(12, dtype=np.int32)[None] * 5 % 23
    expected = np.asarray(jax.jit(lambda tokens: loaded.model(tokens))(tokens))
    compiled, params, tokens = place(forward, params, rules, 2, tokens)
    # Sums over heads and MLP columns in another order, in float32.
    np.testing.assert_allclose(
        np.asarray(compiled(params, tokens)), expected, atol=1e-5 * np.abs(expected).max(), rtol=0
    )
    # Two a layer and one for the rows of the cut embedding; logits are gathered once.
    assert count_collectives(compiled) == {"all-reduce": 2 * config.num_hidden_layers + 1, "all-gather": 1}
