"""The families as training forwards: shapes, dtypes, causality, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastgpt_jax.errors import UserError
from fastgpt_jax.models import GPT2, GPT2Config, Llama, LlamaConfig
from tests.filled_model import make_filled_model

pytestmark = pytest.mark.usefixtures("strict_jax")

LLAMA = LlamaConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
GPT2_CONFIG = GPT2Config(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
)
MODELS = {
    "llama": lambda **fields: make_filled_model(Llama, dataclasses.replace(LLAMA, **fields)),
    "gpt2": lambda **fields: make_filled_model(GPT2, dataclasses.replace(GPT2_CONFIG, **fields)),
}
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 23, (2, 9)), jnp.int32)


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tied", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float32")])
def test_logits_are_float32_whatever_the_parameters_are(name, tied, dtype):
    model = MODELS[name](tie_word_embeddings=tied, dtype=dtype)
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    logits = jax.eval_shape(model, TOKENS)
    assert (logits.shape, logits.dtype) == ((2, 9, 23), jnp.float32)
    assert sum(leaf.shape in [(23, 16), (16, 23)] for leaf in leaves) == (1 if tied else 2)


@pytest.mark.parametrize("name", MODELS)
def test_a_later_token_changes_no_earlier_logits(name):
    model = MODELS[name]()
    before = forward(model, TOKENS)
    after = forward(model, TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 23))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = MODELS[name]()

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda m: -jnp.mean(jax.nn.log_softmax(m(TOKENS))[..., 0]))(model)

    # A bias on the keys shifts all scores of a row alike, so only its gradient vanishes; Llama here has none.
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients(model)))


def test_sequence_longer_than_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match="32 learned positions, got a sequence of 33"):
        jax.eval_shape(MODELS["gpt2"](), jax.ShapeDtypeStruct((1, 33), jnp.int32))


@pytest.mark.parametrize(
    "fields", [{"num_key_value_heads": 3}, {"head_dim": 7}], ids=["heads not a multiple", "odd head dimension"]
)
def test_impossible_llama_shapes_are_user_errors(fields):
    with pytest.raises(UserError, match="got"):
        dataclasses.replace(LLAMA, **fields)
