"""A tiny Llama whose heads divide among eight devices, and its forward on a mesh by the rules of its family."""

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
    graphdef, state = nnx.split(make_filled_model(Llama, CONFIG))
    flat, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]

    def forward(params, tokens):
        return nnx.merge(graphdef, jax.tree.unflatten(tree, [params[name] for name in names]))(tokens)

    return forward, {name: leaf for name, (_, leaf) in zip(names, flat, strict=True)}


def compile_on(num_devices):
    """Returns the forward compiled for that many devices, and its parameters placed on them."""
    forward, params = make_forward()
    mesh = make_mesh(num_devices)
    specs = RULES.assign({name: leaf.shape for name, leaf in params.items()}, mesh_sizes(mesh)).specs
    placed = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec()))
    run = jax.jit(forward, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return run.lower(placed, tokens).compile(), placed, tokens
