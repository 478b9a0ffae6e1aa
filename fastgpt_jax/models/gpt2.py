"""GPT-2 (Radford et al., 2019) as an ordinary training forward: learned positions, LayerNorm, tied head.

Knows no cache, no serving and no checkpoint format. The one idea: this is what one writes to train the model, and
nothing in it is there for the compiler.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.errors import UserError
from fastgpt_jax.models.layers.mlp import MLP
from fastgpt_jax.models.layers.norm import LayerNorm
from fastgpt_jax.models.layers.self_attention import SelfAttention
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2, in the words the other families use (`n_embd` is `hidden_size`, and so on).

    Invariant: the width is a multiple of the number of heads. `dtype` is that of parameters and activations; norms,
    softmax and logits are float32 in any case.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_new"
    tie_word_embeddings: bool = True
    dtype: str = "float32"

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"the width must be a multiple of the heads, got n_embd={self.hidden_size} and "
                f"n_head={self.num_attention_heads}"
            )


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        dtype, width, num_heads = jnp.dtype(config.dtype), config.hidden_size, config.num_attention_heads
        self.attention_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.attention = SelfAttention(
            width, num_heads, num_heads, width // num_heads, bias=True, output_bias=True, dtype=dtype, rngs=rngs
        )
        self.mlp_norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT2(nnx.Module):
    """A decoder-only transformer with learned positions: tokens to next-token logits."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        self.config = config
        self.embed = make_embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.positions = make_embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(width, config.layer_norm_eps, dtype=dtype)
        self.head = make_head(config.vocab_size, width, is_tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        T, max_len = tokens.shape[1], self.config.max_position_embeddings
        if T > max_len:
            raise ValueError(f"this GPT-2 has {max_len} learned positions, got a sequence of {T} tokens; shorten it")
        x = self.embed(tokens) + self.positions.embedding[:T][None]
        for layer in self.layers:
            x = layer(x)
        return unembed(self.norm(x), self.embed, self.head)
