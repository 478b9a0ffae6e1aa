"""The families as training forwards: shapes, dtypes, causality, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastgpt_jax.errors import UserError
from tests.filled_model import make_filled_model
from tests.models.families import FAMILIES, make_model

pytestmark = pytest.mark.usefixtures("strict_jax")

SLOW_TO_COMPILE = ("mistral", "qwen3", "phi3", "gemma2", "gemma3", "bloom")
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_TO_COMPILE else n for n in FAMILIES]
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 23, (2, 9)), jnp.int32)


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("tied", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float32")])
def test_logits_are_float32_whatever_the_parameters_are(name, tied, dtype):
    module, config = FAMILIES[name]
    config = dataclasses.replace(config, tie_word_embeddings=tied, dtype=dtype)
    model = make_filled_model(module, config)
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    logits = jax.eval_shape(model, TOKENS)
    assert (logits.shape, logits.dtype) == ((2, 9, 23), jnp.float32)
    assert sum(23 in leaf.shape for leaf in leaves) == (1 if tied else 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_later_token_changes_no_earlier_logits(name):
    model = make_model(name)
    before = forward(model, TOKENS)
    after = forward(model, TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 23))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = make_model(name)

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda m: -jnp.mean(jax.nn.log_softmax(m(TOKENS))[..., 0]))(model)

    for path, leaf in nnx.to_flat_state(gradients(model)):
        # A bias on the keys shifts all scores of a row alike, unless a norm or rotation follows.
        if (name, path[-2:]) != ("gpt2", ("key", "bias")) and path[-2:] != ("qkv", "bias"):
            assert float(jnp.abs(leaf.get_value()).max()) > 0, path


def test_sequence_longer_than_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match="32 learned positions, got a sequence of 33"):
        jax.eval_shape(make_model("gpt2"), jax.ShapeDtypeStruct((1, 33), jnp.int32))


@pytest.mark.parametrize(
    "fields", [{"num_key_value_heads": 3}, {"head_dim": 7}], ids=["heads not a multiple", "odd head dimension"]
)
def test_impossible_llama_shapes_are_user_errors(fields):
    with pytest.raises(UserError, match="got"):
        dataclasses.replace(FAMILIES["llama"][1], **fields)
