"""Bloom (arXiv:2211.05100) as an ordinary training forward: ALiBi in place of positions, a norm after the embedding.

Knows no cache, no serving and no checkpoint format. The one idea: a head's query, key and value lie side by side in one
projection, so that dividing it among devices by heads keeps each head whole.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.errors import UserError
from fastgpt_jax.models.layers.alibi import alibi_bias
from fastgpt_jax.models.layers.attention import causal_attention
from fastgpt_jax.models.layers.mlp import MLP
from fastgpt_jax.models.layers.norm import LayerNorm
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True, kw_only=True)
class BloomConfig:
    """Shape of a Bloom.

    Invariant: the width is a multiple of the number of heads. `max_position_embeddings` is the length it was trained
    at (`seq_length`); nothing in the forward depends on it. `dtype` is that of parameters and activations; norms,
    softmax, biases of positions and logits are float32 in any case.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    dtype: str = "float32"

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"the width must be a multiple of the heads, got hidden_size={self.hidden_size} and "
                f"n_head={self.num_attention_heads}"
            )

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size


class Attention(nnx.Module):
    """Multi-head self-attention with linear biases and one projection for queries, keys and values."""

    def __init__(self, config: BloomConfig, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.output = linear(width, width)
        self.num_heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "N T T"]) -> Float[Array, "B T D"]:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, self.num_heads, 3, -1)
        query, key, value = (qkv[:, :, :, i] for i in range(3))
        return self.output(causal_attention(query, key, value, bias=bias).reshape(B, T, D))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: BloomConfig, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        self.attention_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(width, config.intermediate_size, "gelu_new", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "N T T"]) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class Bloom(nnx.Module):
    """A decoder-only transformer without position embeddings: tokens to next-token logits."""

    def __init__(self, config: BloomConfig, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        self.config = config
        self.embed = make_embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.embed_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.head = make_head(config.vocab_size, width, is_tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        bias = alibi_bias(self.config.num_attention_heads, tokens.shape[1])
        x = self.embed_norm(self.embed(tokens))
        for layer in self.layers:
            x = layer(x, bias)
        return unembed(self.norm(x), self.embed, self.head)
