"""Llama (arXiv:2302.13971) as an ordinary training forward; Qwen2 is the same with biases on queries, keys and values.

Knows no cache, no serving and no checkpoint format. The one idea: this is what one writes to train the model, and
nothing in it is there for the compiler.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.errors import UserError
from fastgpt_jax.models.layers.attention import causal_attention
from fastgpt_jax.models.layers.mlp import GatedMLP
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.rope import RopeScaling, apply_rope, rope_table


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama; names and meanings are those of Hugging Face's config.json.

    Invariants: query heads are a multiple of KV heads; the head dimension is even. `dtype` is that of parameters and
    activations; norms, softmax, rotations and logits are float32 in any case. `attention_bias` is for queries, keys
    and values, `attention_output_bias` for the projection after them (Qwen2 has the first alone).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"query heads must be a multiple of KV heads, got N={self.num_attention_heads} and "
                f"K={self.num_key_value_heads}; check num_attention_heads and num_key_value_heads"
            )
        if self.head_dim % 2:
            raise UserError(f"rotary embeddings need an even head_dim, got {self.head_dim}")


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.query = linear(config.hidden_size, query_width, use_bias=config.attention_bias)
        self.key = linear(config.hidden_size, kv_width, use_bias=config.attention_bias)
        self.value = linear(config.hidden_size, kv_width, use_bias=config.attention_bias)
        self.output = linear(query_width, config.hidden_size, use_bias=config.attention_output_bias)
        self.head_dim = config.head_dim

    def __call__(
        self, x: Float[Array, "B T D"], cos: Float[Array, "T h"], sin: Float[Array, "T h"]
    ) -> Float[Array, "B T D"]:
        B, T, _ = x.shape
        query, key, value = (layer(x).reshape(B, T, -1, self.head_dim) for layer in (self.query, self.key, self.value))
        mixed = causal_attention(apply_rope(query, cos, sin), apply_rope(key, cos, sin), value)
        return self.output(mixed.reshape(B, T, -1))


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            use_bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T D"], cos: Float[Array, "T h"], sin: Float[Array, "T h"]
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """A decoder-only transformer: tokens to next-token logits."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        config = self.config
        positions = jnp.arange(tokens.shape[1])
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        if not config.tie_word_embeddings:
            return self.head(x)
        return jnp.einsum("BTD,VD->BTV", x, self.embed.embedding[...], preferred_element_type=jnp.float32)
