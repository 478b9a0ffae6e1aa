"""Forwards on a mesh by the rules of their families; a tiny Llama whose heads divide among eight devices."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from fastgpt_jax.checkpoint.registry import family_of
from fastgpt_jax.models import Llama, LlamaConfig
from sharding import LogicalAxis, make_mesh, mesh_sizes, rules_of_templates
from tests.filled_model import make_filled_model

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=4,
    max_position_embeddings=32,
)
UNITS = {LogicalAxis.HEADS: 16, LogicalAxis.KV_HEADS: 8, LogicalAxis.HEAD_DIM: 4}
RULES = rules_of_templates(family_of(CONFIG).axes, UNITS)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 5 % 64


def make_forward():
    """Returns the forward and its parameters by dotted path."""
    return forward_of(make_filled_model(Llama, CONFIG))


def forward_of(model):
    """Returns a module's forward and its parameters by dotted path."""
    graphdef, state = nnx.split(model)
    flat, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]

    def forward(params, tokens):
        return nnx.merge(graphdef, jax.tree.unflatten(tree, [params[name] for name in names]))(tokens)

    return forward, {name: leaf for name, (_, leaf) in zip(names, flat, strict=True)}


def compile_on(num_devices):
    """Returns the tiny Llama's forward compiled for that many devices, its parameters placed on them, and tokens."""
    return place(*make_forward(), RULES, num_devices, TOKENS)


def place(forward, params, rules, num_devices, tokens):
    """Returns a forward compiled for that many devices, its parameters placed on them, and the tokens."""
    mesh = make_mesh(num_devices)
    specs = rules.assign({name: leaf.shape for name, leaf in params.items()}, mesh_sizes(mesh)).specs
    placed = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec()))
    run = jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return run.lower(placed, tokens).compile(), placed, tokens
