"""Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786, text) as ordinary training forwards.

Knows no cache, no serving and no checkpoint format. The one idea: layers are local, with a sliding window, or global;
Gemma 2 bounds scores and logits, Gemma 3 has norms on queries and keys instead and rotates local layers by a theta of
their own.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastgpt_jax.models.layers.attention import soft_cap
from fastgpt_jax.models.layers.decoder import DecoderConfig, rotation_of
from fastgpt_jax.models.layers.mlp import GatedMLP
from fastgpt_jax.models.layers.norm import RMSNorm
from fastgpt_jax.models.layers.rope import Rotation, rope_table
from fastgpt_jax.models.layers.self_attention import SelfAttention
from fastgpt_jax.models.layers.vocabulary import make_embed, make_head, unembed


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """Shape of a Gemma 2 or, where `has_head_norms`, a Gemma 3.

    Invariant: as many entries in `local_layers` as layers. `sliding_window` counts the positions a query of a local
    layer sees, its own included. Scores are divided by the root of `query_pre_attn_scalar`. A cap that is None leaves
    its values unbounded. `rope_local_base_freq` is the theta of local layers, whose rotation is never scaled; None
    where all layers rotate alike.
    """

    local_layers: tuple[bool, ...]
    sliding_window: int
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope_local_base_freq: float | None = None
    has_head_norms: bool = False
    attention_bias: bool = False


class Block(nnx.Module):
    """Attention and MLP, each between two norms and beside the residual stream."""

    def __init__(self, config: GemmaConfig, *, is_local: bool, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        norm = partial(RMSNorm, eps=config.rms_norm_eps, offset=1.0, dtype=dtype)
        self.is_local = is_local
        self.attention_norm, self.attention_post_norm = norm(width), norm(width)
        self.attention = SelfAttention(
            width,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            head_norm=norm if config.has_head_norms else None,
            scale=config.query_pre_attn_scalar**-0.5,
            window=config.sliding_window if is_local else None,
            softcap=config.attn_logit_softcapping,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm, self.mlp_post_norm = norm(width), norm(width)
        self.mlp = GatedMLP(width, config.intermediate_size, config.hidden_act, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation) -> Float[Array, "B T D"]:
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), rotation))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class Gemma(nnx.Module):
    """A decoder-only transformer with local and global layers: tokens to next-token logits."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.hidden_size
        self.config = config
        self.embed = make_embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, is_local=is_local, rngs=rngs) for is_local in config.local_layers])
        self.norm = RMSNorm(width, config.rms_norm_eps, offset=1.0, dtype=dtype)
        self.head = make_head(config.vocab_size, width, is_tied=config.tie_word_embeddings, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        config, T = self.config, tokens.shape[1]
        rotation = local_rotation = rotation_of(config, T)
        if config.rope_local_base_freq is not None:
            local_rotation = rope_table(jnp.arange(T), config.rotary_dim, config.rope_local_base_freq, None)
        x = self.embed(tokens)
        x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)  # rounded to the embedding's dtype, as it was trained
        for layer in self.layers:
            x = layer(x, local_rotation if layer.is_local else rotation)
        logits = unembed(self.norm(x), self.embed, self.head)
        cap = config.final_logit_softcapping
        return logits if cap is None else soft_cap(logits, cap)
