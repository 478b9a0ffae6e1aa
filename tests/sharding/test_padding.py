"""Widening with zeros: the logits of the padded model are those of the checkpoint, and what is not exact is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastgpt_jax.checkpoint import GenerationDefaults, LoadedModel
from fastgpt_jax.checkpoint.padding import pad_model
from fastgpt_jax.checkpoint.registry import family_of
from fastgpt_jax.errors import UserError
from fastgpt_jax.models import GPT2, GPT2Config, Llama
from fastgpt_jax.models.layers.mlp import ACTIVATIONS
from sharding import LogicalAxis, rules_of_templates
from tests.filled_model import make_filled_model
from tests.sharding.placed import CONFIG

GPT2_CONFIG = GPT2Config(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=22,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=32,
)
UNEVEN = dataclasses.replace(CONFIG, vocab_size=61, intermediate_size=45, num_hidden_layers=1)


def load(module, config) -> LoadedModel:
    model = make_filled_model(module, config)
    return LoadedModel(model, config, "tiny", None, GenerationDefaults(32), None, config.vocab_size)


def logits_of(loaded: LoadedModel):
    tokens = np.arange(12, dtype=np.int32)[None] * 7 % loaded.vocab_size
    return np.asarray(jax.jit(lambda tokens: loaded.model(tokens))(tokens))


def check_equal(loaded, padded):
    expected, got = logits_of(loaded), logits_of(padded)
    assert got.shape == expected.shape
    # Zeros add nothing; a wider product may sum in another order.
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (Llama, UNEVEN),
        pytest.param(
            Llama,
            dataclasses.replace(UNEVEN, mlp_bias=True, hidden_act="gelu", tie_word_embeddings=True),
            marks=pytest.mark.slow,
        ),
        (GPT2, GPT2_CONFIG),
    ],
)
def test_a_padded_model_has_the_logits_of_the_checkpoint(module, config):
    loaded = load(module, config)
    padded, padding = pad_model(loaded, 4)
    check_equal(loaded, padded)
    assert {str(change) for change in padding} == {
        f"mlp {config.intermediate_size} -> {padded.config.intermediate_size}",
        f"vocab {config.vocab_size} -> {padded.config.vocab_size}",
    }
    assert padded.vocab_size == config.vocab_size
    names = ["heads", "kv_heads"]
    rules = rules_of_templates(family_of(config).axes, {LogicalAxis(name): 4 for name in names})
    for path, leaf in nnx.to_flat_state(nnx.state(padded.model)):
        rules.spec_of(".".join(map(str, path)), leaf.get_value().shape, {"tensor": 4})


def test_only_what_does_not_divide_is_padded():
    padded, (change,) = pad_model(load(Llama, dataclasses.replace(UNEVEN, vocab_size=64)), 4)
    assert (change.axis, change.size, change.padded_size) == ("mlp", 45, 48)
    assert type(padded.model) is Llama


def test_a_model_that_divides_is_handed_on_as_it_is():
    loaded = load(Llama, CONFIG)
    assert pad_model(loaded, 8) == (loaded, ())


def test_every_activation_maps_zero_to_zero():
    for name, function in ACTIVATIONS.items():
        assert function(jnp.zeros(())) == 0, name


def test_heads_that_do_not_divide_are_refused_with_the_numbers_and_the_way_out():
    with pytest.raises(
        UserError, match=r"num_key_value_heads=8 and tensor_parallel_size=16; choose one of 1, 2, 4, 8$"
    ):
        pad_model(load(Llama, CONFIG), 16)


def test_matrices_fused_into_one_are_refused(monkeypatch):
    family = family_of(CONFIG)
    axes = dict(family.axes) | {"layers.{}.mlp.up.kernel": (LogicalAxis.EMBED, None)}
    fused = dataclasses.replace(
        family,
        tensors={path: dataclasses.replace(tensor, axes=axes[path]) for path, tensor in family.tensors.items()},
    )
    monkeypatch.setattr("fastgpt_jax.checkpoint.padding.family_of", lambda config: fused)
    with pytest.raises(
        UserError, match=r"mlp 45 -> 48.*layers.\{\}.mlp.up.kernel of shape \(32, 45\) cannot be widened"
    ):
        pad_model(load(Llama, dataclasses.replace(UNEVEN, vocab_size=64)), 4)
