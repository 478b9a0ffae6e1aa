"""Every parameter of every family has a logical axis, or None, for each of its dimensions."""

import dataclasses

import pytest
from flax import nnx

from fastgpt_jax.checkpoint.parameters import named_leaves
from fastgpt_jax.checkpoint.registry import FAMILIES, family_of
from sharding.axes import LogicalAxis
from tests.models.families import FAMILIES as MODELS


@pytest.mark.parametrize("name", MODELS)
def test_axes_say_what_the_sizes_of_every_parameter_are(name):
    module, config = MODELS[name]
    config = dataclasses.replace(config, tie_word_embeddings=False)
    sizes = {LogicalAxis.VOCAB: config.vocab_size, LogicalAxis.EMBED: config.hidden_size}
    sizes |= {LogicalAxis.MLP: config.intermediate_size}
    state = nnx.state(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    for path, tensor, variable in named_leaves(family_of(config).tensors, nnx.to_flat_state(state)):
        shape = variable.get_value().shape
        assert len(shape) == len(tensor.axes), path
        assert all(sizes.get(axis, size) == size for axis, size in zip(tensor.axes, shape, strict=True)), path


def test_axes_of_attention_name_its_heads():
    for family in FAMILIES:
        assert family.axes["layers.{}.attention.output.kernel"] == (LogicalAxis.HEADS, LogicalAxis.EMBED)
        assert set(family.axes) == set(family.tensors)
