"""Every parameter of every family has a logical axis, or None, for each of its dimensions."""

import pytest
from flax import nnx

from fastgpt_jax.checkpoint.parameters import named_leaves
from fastgpt_jax.checkpoint.registry import FAMILIES, family_of
from fastgpt_jax.models import GPT2, GPT2Config, Llama
from sharding.axes import LogicalAxis
from tests.checkpoint.folders import CONFIG

GPT2_CONFIG = GPT2Config(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
MODULES = {"llama": (Llama, CONFIG), "gpt2": (GPT2, GPT2_CONFIG)}


@pytest.mark.parametrize("name", MODULES)
def test_axes_say_what_the_sizes_of_every_parameter_are(name):
    module, config = MODULES[name]
    family = family_of(config)
    sizes = {LogicalAxis.VOCAB: config.vocab_size, LogicalAxis.EMBED: config.hidden_size}
    sizes |= {LogicalAxis.MLP: config.intermediate_size}
    state = nnx.state(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    for path, tensor, variable in named_leaves(family.tensors, nnx.to_flat_state(state)):
        shape = variable.get_value().shape
        assert len(shape) == len(tensor.axes), path
        assert all(sizes.get(axis, size) == size for axis, size in zip(tensor.axes, shape, strict=True)), path


def test_axes_of_attention_name_its_heads():
    for family in FAMILIES:
        assert family.axes["layers.{}.attention.output.kernel"] == (LogicalAxis.HEADS, LogicalAxis.EMBED)
        assert set(family.axes) == set(family.tensors)
