"""A plain forward cut by path rules: the same logits on any number of devices, and no more collectives than needed."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sharding import DivisibilityError, count_collectives
from tests.sharding.placed import CONFIG, RULES, compile_on, make_forward


@pytest.mark.parametrize(
    "num_devices", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8]
)
def test_one_device_equals_many(num_devices):
    compiled, params, tokens = compile_on(1)
    assert not count_collectives(compiled)
    logits = np.asarray(compiled(params, tokens))
    compiled, params, tokens = compile_on(num_devices)
    # Sums over heads and MLP columns in another order, in float32.
    np.testing.assert_allclose(np.asarray(compiled(params, tokens)), logits, atol=3e-6 * np.abs(logits).max(), rtol=0)
    # Behind attention and MLP of each layer, one for the rows of the cut embedding; logits are gathered once.
    assert count_collectives(compiled) == {"all-reduce": 2 * CONFIG.num_hidden_layers + 1, "all-gather": 1}
    (layer,) = {name for name in params if name.endswith("0.attention.query.kernel")}
    assert params[layer].addressable_shards[0].data.shape == (32, 64 // num_devices)


def test_every_parameter_has_a_rule_and_norms_are_replicated():
    params = {name: leaf.shape for name, leaf in make_forward()[1].items()}
    made = RULES.assign(params, {"tensor": 8})
    assert not made.unmatched
    whole = {name for name, spec in made.specs.items() if spec == PartitionSpec() or not any(spec)}
    assert whole == {name for name in params if name.endswith("norm.weight")}


def test_more_devices_than_heads_are_refused():
    params = {name: leaf.shape for name, leaf in make_forward()[1].items()}
    with pytest.raises(DivisibilityError, match="kv_heads of layers.0.attention.key.kernel .*16 devices.* got 8"):
        RULES.assign(params, {"tensor": 16})
