"""Between token ids and vectors: the embedding, and the head that gives logits.

The one idea: a tied model has no head, and its logits are products with the embedding; logits are float32 whatever the
parameters are.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def make_embed(num_rows: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Embed:
    """A table with a row for every token, or for every learned position."""
    init = nnx.initializers.normal(0.02)
    return nnx.Embed(num_rows, width, embedding_init=init, dtype=dtype, param_dtype=dtype, rngs=rngs)


def make_head(vocab_size: int, width: int, *, is_tied: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear | None:
    """The projection to logits; None where the embedding does its work."""
    if is_tied:
        return None
    return nnx.Linear(
        width,
        vocab_size,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def unembed(x: Float[Array, "B T D"], embed: nnx.Embed, head: nnx.Linear | None) -> Float[Array, "B T V"]:
    """Logits, float32."""
    if head is not None:
        return head(x)
    return jnp.einsum("BTD,VD->BTV", x, embed.embedding[...], preferred_element_type=jnp.float32)
