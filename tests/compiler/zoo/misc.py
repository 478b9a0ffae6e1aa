"""What fits nowhere else: lengths demanded, mixing weights, experts, precision, outputs, RNG keys."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from .blocks import (
    HEADS,
    MAX,
    VOCAB,
    WIDTH,
    Draw,
    Params,
    attention_weights,
    causal_attention,
    causal_mask,
    combine,
    decoder,
    decoder_params,
    embed_tokens,
    heads,
    make_draw,
    mlp,
    rms_norm,
    scores,
    softmax,
)
from .model import Forward, ZooModel

EXPERTS = 4


def embed_multiple(params: Params, tokens: Array, *, of: int) -> Array:
    """Demands a length that a tiled kernel would like."""
    if tokens.shape[1] % of:
        raise ValueError(f"sequence length must be a multiple of {of}, got {tokens.shape[1]}")
    return embed_tokens(params, tokens)


def one_length(length: int, width: int) -> tuple[Forward, Params]:
    """A forward whose every shape is written down for one length.

    With `width == length` no shape tells time from features.
    """
    draw = make_draw(0)
    names = ("q", "k", "v", "o")
    layers = [{name: draw(width, width) for name in names} for _ in range(2)]
    params = {"embed": draw(VOCAB, width, scale=1.0), "unembed": draw(width, VOCAB), "layers": layers}
    params["positions"] = draw(length, width, scale=1.0)

    def fn(params: Params, tokens: Array) -> Array:
        if tokens.shape[1] != length:
            raise ValueError(f"this model takes {length} tokens, got {tokens.shape[1]}")
        x = params["embed"][tokens] + params["positions"]
        for p in params["layers"]:
            q, k, v = (
                (rms_norm(x) @ p[n]).reshape(-1, length, HEADS, width // HEADS).swapaxes(1, 2) for n in names[:3]
            )
            probs = softmax(q @ k.swapaxes(2, 3) * (width // HEADS) ** -0.5, causal_mask(length))
            x = x + (probs @ v).swapaxes(1, 2).reshape(-1, length, width) @ p["o"]
        return rms_norm(x) @ params["unembed"]

    return fn, params


def spatial_gating(p: Params, x: Array, tokens: Array) -> Array:
    """gMLP (arXiv:2105.08050): learned weights [T, T], lower-triangular, mix the tokens of half the channels."""
    length = tokens.shape[1]
    value, gate = jnp.split(jax.nn.gelu(x @ p["in"]), 2, axis=-1)
    mixing = jnp.tril(p["mixing"][:length, :length])
    return (value * (jnp.einsum("ts,bsd->btd", mixing, rms_norm(gate)) + 1.0)) @ p["out"]


def gating_weights(draw: Draw) -> Params:
    return {"in": draw(WIDTH, 2 * WIDTH), "out": draw(WIDTH, WIDTH), "mixing": draw(MAX, MAX, scale=0.3)}


def masked_then_mixed(p: Params, x: Array, tokens: Array) -> Array:
    """The same weights masked by a comparison and normalised by row; the product puts time in front."""
    length = tokens.shape[1]
    mixing = softmax(p["mixing"][:length, :length], causal_mask(length))
    return jnp.tensordot(mixing, jnp.tanh(x @ p["out"]), axes=(1, 1)).swapaxes(0, 1)


def first_token_added(p: Params, x: Array, tokens: Array) -> Array:
    """The first token's features reach every later one directly."""
    return causal_attention(p, x, tokens) + jnp.tanh(x[:, :1])


def routed(p: Params, x: Array) -> Array:
    """Weights f[B, T, E] of the two best experts, zero elsewhere."""
    top, chosen = jax.lax.top_k(x @ p["router"], 2)
    return jnp.einsum("btx,btxe->bte", jax.nn.softmax(top, axis=-1), jax.nn.one_hot(chosen, EXPERTS))


def experts_of_all(p: Params, x: Array) -> Array:
    """Every expert's answer, [B, T, E, D]."""
    return jnp.einsum("bted,edf->btef", jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["w1"])), p["w2"])


def dense_experts(p: Params, x: Array, tokens: Array) -> Array:
    """All experts run; a one-hot of the top two weighs them."""
    return causal_attention(p, x, tokens) + jnp.einsum("bte,btef->btf", routed(p, x), experts_of_all(p, x))


def scattered_experts(p: Params, x: Array, tokens: Array) -> Array:
    """The weights of a token's two best experts are written into its row by index."""
    best, which = jax.lax.top_k(x @ p["router"], 2)
    rows, row = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[None, :, None]
    weights = jnp.zeros_like(x @ p["router"]).at[rows, row, which].set(jax.nn.softmax(best, axis=-1))
    return causal_attention(p, x, tokens) + jnp.einsum("bte,btef->btf", weights, experts_of_all(p, x))


def gathered_experts(p: Params, x: Array, tokens: Array) -> Array:
    """Each token gathers the weights of its best expert."""
    best = jnp.argmax(x @ p["router"], axis=-1)
    y = jnp.einsum("btf,btfd->btd", jax.nn.silu(jnp.einsum("btd,btdf->btf", x, p["w1"][best])), p["w2"][best])
    return causal_attention(p, x, tokens) + y


def fixed_capacity_experts(p: Params, x: Array, tokens: Array) -> Array:
    """Each expert takes its first six tokens, whatever the length; later ones are dropped."""
    weights = routed(p, x)
    taken = (weights > 0).astype(jnp.int32)
    place = jnp.cumsum(taken, axis=1) - taken
    kept = jnp.where(place < 6, weights, 0.0)
    return causal_attention(p, x, tokens) + jnp.einsum("bte,btef->btf", kept, experts_of_all(p, x))


def expert_weights(draw: Draw) -> Params:
    experts = {name: draw(EXPERTS, WIDTH, WIDTH, scale=WIDTH**-0.5) for name in ("w1", "w2")}
    return {**attention_weights(draw), **experts, "router": draw(WIDTH, EXPERTS)}


def bfloat16() -> tuple[Forward, Params]:
    """Weights and activations in bfloat16, the softmax and the logits in float32."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), decoder_params(attention_weights, None, seed=0))

    def fn(params: Params, tokens: Array) -> Array:
        x = params["embed"][tokens]
        for p in params["layers"]:
            q, k, v = heads(p, rms_norm(x))
            probs = softmax(scores(q, k).astype(jnp.float32), causal_mask(tokens.shape[1]))
            x = x + combine(p, probs.astype(jnp.bfloat16), v)
            x = x + mlp(p, rms_norm(x))
        return (rms_norm(x) @ params["unembed"]).astype(jnp.float32)

    return fn, params


def tied_embeddings() -> tuple[Forward, Params]:
    """The embedding table makes the logits too; embeddings are scaled and logits capped, as in Gemma."""
    params = decoder_params(attention_weights, None, seed=0)

    def fn(params: Params, tokens: Array) -> Array:
        x = params["embed"][tokens] * WIDTH**0.5
        for p in params["layers"]:
            x = x + causal_attention(p, rms_norm(x), tokens) + mlp(p, rms_norm(x))
        return 5.0 * jnp.tanh(jnp.einsum("btd,vd->btv", rms_norm(x), params["embed"]) / 5.0)

    return fn, {name: params[name] for name in ("embed", "layers")}


def one_hot_embedding(params: Params, tokens: Array) -> Array:
    """Looks tokens up by a matrix product."""
    return jax.nn.one_hot(tokens, VOCAB) @ params["embed"]


def logits_in_tuple() -> tuple[Forward, Params]:
    """Returns the final features beside the logits, and names them for taps."""
    params = decoder_params(attention_weights, None, seed=0)

    def fn(params: Params, tokens: Array) -> tuple[Array, Array]:
        x = params["embed"][tokens]
        for p in params["layers"]:
            x = x + causal_attention(p, rms_norm(x), tokens)
        features = checkpoint_name(rms_norm(x), "features")
        return features @ params["unembed"], features

    return fn, params


def logits_in_dict() -> tuple[Forward, Params]:
    """Returns a balance loss beside the logits: a mean over all tokens, which serving must neither need nor mind."""
    params = decoder_params(expert_weights, None, seed=0)

    def fn(params: Params, tokens: Array) -> dict[str, Array]:
        x, loss = params["embed"][tokens], jnp.zeros(())
        for p in params["layers"]:
            y = rms_norm(x)
            loss = loss + jnp.square(routed(p, y).mean(axis=(0, 1))).sum() * EXPERTS
            x = x + dense_experts(p, y, tokens)
        return {"aux_loss": loss, "logits": rms_norm(x) @ params["unembed"]}

    return fn, params


def rng_key_unused() -> tuple[Forward, Params]:
    """A key among the parameters feeds a dropout that inference switches off."""

    def fn(params: Params, tokens: Array, deterministic: bool = True) -> Array:
        x, key = params["embed"][tokens], params["dropout"]
        for p in params["layers"]:
            key, layer_key = jax.random.split(key)
            y = causal_attention(p, rms_norm(x), tokens)
            if not deterministic:
                y = jnp.where(jax.random.bernoulli(layer_key, 0.9, y.shape), y / 0.9, 0.0)
            x = x + y
        return rms_norm(x) @ params["unembed"]

    return fn, {**decoder_params(attention_weights, None, seed=0), "dropout": jax.random.key(7)}


def rng_key_drawn_from() -> tuple[Forward, Params]:
    """Random features for linear scores are drawn from a key in the forward (arXiv:2009.14794)."""

    def fn(params: Params, tokens: Array) -> Array:
        x, key = params["embed"][tokens], params["features"]
        for i, p in enumerate(params["layers"]):
            directions = jax.random.normal(jax.random.fold_in(key, i), (16, WIDTH // HEADS))
            q, k, v = heads(p, rms_norm(x))
            q, k = (jnp.exp(jnp.einsum("btnh,fh->btnf", rms_norm(y), directions) / 8.0) for y in (q, k))
            weights = jnp.einsum("btnf,bsnf->bnts", q, k) * causal_mask(tokens.shape[1])
            x = x + combine(p, weights / weights.sum(axis=-1, keepdims=True), v)
        return rms_norm(x) @ params["unembed"]

    return fn, {**decoder_params(attention_weights, None, seed=0), "features": jax.random.key(11)}


MODELS = (
    ZooModel(
        "length_multiple_of_4",
        lambda: decoder(causal_attention, embed=partial(embed_multiple, of=4)),
        length_multiple=4,
    ),
    ZooModel(
        "length_multiple_of_8",
        lambda: decoder(causal_attention, embed=partial(embed_multiple, of=8)),
        length_multiple=8,
    ),
    ZooModel("one_length", lambda: one_length(32, width=24), only_length=32, test_length=32),
    ZooModel(
        "one_length_wide",
        lambda: one_length(32, width=32),
        only_length=32,
        test_length=32,
        optional=True,
        notes="The width equals the only length: by shapes alone nothing tells time from features.",
    ),
    ZooModel("spatial_gating", lambda: decoder(spatial_gating, gating_weights)),
    ZooModel("softmax_of_mixing_weights", lambda: decoder(masked_then_mixed, gating_weights)),
    ZooModel("first_token_added", lambda: decoder(first_token_added)),
    ZooModel("dense_experts", lambda: decoder(dense_experts, expert_weights)),
    ZooModel("scattered_experts", lambda: decoder(scattered_experts, expert_weights)),
    ZooModel("gathered_experts", lambda: decoder(gathered_experts, expert_weights)),
    ZooModel("fixed_capacity_experts", lambda: decoder(fixed_capacity_experts, expert_weights)),
    ZooModel("bfloat16", bfloat16, tolerance=3e-2),
    ZooModel("tied_embeddings", tied_embeddings),
    ZooModel("one_hot_embedding", lambda: decoder(causal_attention, embed=one_hot_embedding)),
    ZooModel("logits_in_tuple", logits_in_tuple),
    ZooModel("logits_in_dict", logits_in_dict),
    ZooModel("rng_key_unused", rng_key_unused),
    ZooModel("rng_key_drawn_from", rng_key_drawn_from),
)
