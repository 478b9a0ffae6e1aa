"""Feed-forward layers, token by token; they know nothing of time.

The one idea: an activation is a name in a table, spelled as Hugging Face's `hidden_act`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "relu": jax.nn.relu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": partial(jax.nn.gelu, approximate=True),
        "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    }
)


class MLP(nnx.Module):
    """`down(act(up(x)))`, with biases."""

    def __init__(self, width: int, mlp_width: int, activation: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.up = linear(width, mlp_width)
        self.down = linear(mlp_width, width)
        self.activation = activation

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (GLU variants, arXiv:2002.05202)."""

    def __init__(
        self, width: int, mlp_width: int, activation: str, *, use_bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        linear = partial(nnx.Linear, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.gate = linear(width, mlp_width)
        self.up = linear(width, mlp_width)
        self.down = linear(mlp_width, width)
        self.activation = activation

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
