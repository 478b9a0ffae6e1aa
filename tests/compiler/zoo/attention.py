"""Attention in its many forms: head sharing, latents, altered scores and probabilities, extra keys."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .blocks import (
    HEAD_DIM,
    HEADS,
    MASKED,
    WIDTH,
    Draw,
    Params,
    attend,
    attention_weights,
    causal_attention,
    causal_mask,
    combine,
    decoder,
    decoder_params,
    heads,
    project,
    rms_norm,
    scores,
    softmax,
)
from .model import Forward, ZooModel
from .positions import rotate_half

LATENT, ROPE_DIM = 6, 4
NUM_MEMORY = 3


def fused_qkv(p: Params, x: Array, tokens: Array) -> Array:
    """One projection split in three, matrices transposed by hand, -inf in the mask."""
    batch, length, _ = x.shape
    parts = jnp.split(x @ p["qkv"], 3, axis=-1)
    q, k, v = (part.reshape(batch, length, HEADS, HEAD_DIM).transpose(0, 2, 1, 3) for part in parts)
    s = q @ k.swapaxes(-1, -2) * HEAD_DIM**-0.5
    y = jax.nn.softmax(jnp.where(causal_mask(length), s, -jnp.inf), axis=-1) @ v
    return y.transpose(0, 2, 1, 3).reshape(batch, length, WIDTH) @ p["proj"]


def fused_weights(draw: Draw) -> Params:
    return {"qkv": draw(WIDTH, 3 * WIDTH), "proj": draw(WIDTH, WIDTH)}


def softmax_by_hand(p: Params, x: Array, tokens: Array) -> Array:
    """Exponentials times the mask over their sum, normalised behind the values."""
    q, k, v = heads(p, x)
    mask = causal_mask(tokens.shape[1])
    s = jnp.where(mask, scores(q, k), -jnp.inf)
    e = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)) * mask
    y = jnp.einsum("bnts,bsnh->btnh", e, v) / jnp.einsum("bnts->btn", e)[..., None]
    return jnp.einsum("btnh,nhd->btd", y, p["o"])


def grouped_query(p: Params, x: Array, tokens: Array) -> Array:
    """GQA by a group axis on the queries; keys are never repeated."""
    q, k, v = heads(p, x)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, HEAD_DIM)
    s = jnp.einsum("btkgh,bskh->bkgts", q, k) / np.sqrt(HEAD_DIM)
    y = jnp.einsum("bkgts,bskh->btkgh", softmax(s, causal_mask(tokens.shape[1])), v)
    return jnp.einsum("btnh,nhd->btd", y.reshape(*y.shape[:2], HEADS, HEAD_DIM), p["o"])


def repeated_keys(p: Params, x: Array, tokens: Array) -> Array:
    """GQA or MQA by repeating keys and values up to the queries' heads."""
    q, k, v = heads(p, x)
    k, v = (jnp.repeat(y, HEADS // y.shape[2], axis=2) for y in (k, v))
    return combine(p, softmax(scores(q, k), causal_mask(tokens.shape[1])), v)


def one_key_head(p: Params, x: Array, tokens: Array) -> Array:
    """MQA: the single key head has no axis at all."""
    q, k, v = project(x, p["q"]), x @ p["k"][:, 0], x @ p["v"][:, 0]
    s = jnp.einsum("btnh,bsh->bnts", q, k) / np.sqrt(HEAD_DIM)
    y = jnp.einsum("bnts,bsh->btnh", softmax(s, causal_mask(tokens.shape[1])), v)
    return jnp.einsum("btnh,nhd->btd", y, p["o"])


def latent_weights(draw: Draw) -> Params:
    return {
        "q": draw(WIDTH, HEADS, HEAD_DIM),
        "down_kv": draw(WIDTH, LATENT),
        "up_k": draw(LATENT, HEADS, HEAD_DIM),
        "up_v": draw(LATENT, HEADS, HEAD_DIM),
        "o": draw(HEADS, HEAD_DIM, WIDTH, scale=WIDTH**-0.5),
    }


def latent_attention(p: Params, x: Array, tokens: Array) -> Array:
    """MLA without positions: keys and values expanded from a small normed latent (arXiv:2405.04434)."""
    latent = rms_norm(x @ p["down_kv"])
    k, v = project(latent, p["up_k"]), project(latent, p["up_v"])
    return combine(p, softmax(scores(project(x, p["q"]), k), causal_mask(tokens.shape[1])), v)


def latent_rope_weights(draw: Draw) -> Params:
    return {**latent_weights(draw), "q_rope": draw(WIDTH, HEADS, ROPE_DIM), "k_rope": draw(WIDTH, ROPE_DIM)}


def latent_rope_attention(p: Params, x: Array, tokens: Array) -> Array:
    """MLA with the decoupled rotary part that all heads share, concatenated to each head's key."""
    positions = jnp.arange(tokens.shape[1])
    latent = rms_norm(x @ p["down_kv"])
    k_rope = rotate_half((x @ p["k_rope"])[:, :, None], positions)
    q_rope = rotate_half(project(x, p["q_rope"]), positions)
    q = jnp.concatenate([project(x, p["q"]), q_rope], axis=-1)
    k = project(latent, p["up_k"])
    k = jnp.concatenate([k, jnp.broadcast_to(k_rope, (*k.shape[:3], ROPE_DIM))], axis=-1)
    return combine(p, softmax(scores(q, k), causal_mask(tokens.shape[1])), project(latent, p["up_v"]))


def alibi(p: Params, x: Array, tokens: Array, *, module=jnp) -> Array:
    """A per-head linear penalty on distance (arXiv:2108.12409), built with jnp or, at trace time, with NumPy."""
    q, k, v = heads(p, x)
    positions = module.arange(tokens.shape[1], dtype=module.float32)
    slopes = np.float32(2.0) ** -np.arange(1, HEADS + 1, dtype=np.float32)
    bias = slopes[:, None, None] * (positions[None, :] - positions[:, None])
    return combine(p, softmax(scores(q, k) + bias, causal_mask(tokens.shape[1])), v)


def soft_cap(p: Params, x: Array, tokens: Array) -> Array:
    """Scores squashed by a tanh between the product and the softmax, as in Gemma 2."""
    q, k, v = heads(p, x)
    return combine(p, softmax(2.0 * jnp.tanh(scores(q, k) / 2.0), causal_mask(tokens.shape[1])), v)


def normed_queries_and_keys(p: Params, x: Array, tokens: Array) -> Array:
    """RMS norm over each head of queries and keys."""
    q, k, v = heads(p, x)
    return combine(p, softmax(scores(rms_norm(q), rms_norm(k)), causal_mask(tokens.shape[1])), v)


def talking_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "before": draw(HEADS, HEADS), "after": draw(HEADS, HEADS)}


def talking_heads(p: Params, x: Array, tokens: Array) -> Array:
    """Heads mixed linearly before and after the softmax (arXiv:2003.02436)."""
    q, k, v = heads(p, x)
    s = jnp.einsum("bnts,nm->bmts", scores(q, k), p["before"])
    probs = jnp.einsum("bnts,nm->bmts", softmax(s, causal_mask(tokens.shape[1])), p["after"])
    return combine(p, probs, v)


def sink_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "sink": draw(HEADS)}


def sink_column(p: Params, x: Array, tokens: Array) -> Array:
    """A learned logit per head takes part in the softmax and is dropped behind it, as in gpt-oss."""
    q, k, v = heads(p, x)
    s = jnp.where(causal_mask(tokens.shape[1]), scores(q, k), MASKED)
    sink = jnp.broadcast_to(p["sink"][None, :, None, None], (*s.shape[:3], 1))
    return combine(p, jax.nn.softmax(jnp.concatenate([s, sink], axis=-1), axis=-1)[..., :-1], v)


def sink_in_denominator(p: Params, x: Array, tokens: Array) -> Array:
    """The same, with the sink only added to the sum of exponentials."""
    q, k, v = heads(p, x)
    e = jnp.exp(jnp.where(causal_mask(tokens.shape[1]), scores(q, k), -jnp.inf))
    return combine(p, e / (e.sum(axis=-1, keepdims=True) + jnp.exp(p["sink"])[:, None, None]), v)


def memory_weights(draw: Draw, count: int) -> Params:
    memory = {name: draw(count, HEADS, HEAD_DIM, scale=1.0) for name in ("memory_k", "memory_v")}
    return {**attention_weights(draw), **memory}


def learned_memory(p: Params, x: Array, tokens: Array) -> Array:
    """Learned key and value vectors put before those of the tokens; every query sees them."""
    q, k, v = heads(p, x)
    batch, length, count = x.shape[0], x.shape[1], p["memory_k"].shape[0]
    k, v = (
        jnp.concatenate([jnp.broadcast_to(p[name], (batch, *p[name].shape)), y], axis=1)
        for name, y in (("memory_k", k), ("memory_v", v))
    )
    mask = jnp.concatenate([jnp.ones((length, count), bool), causal_mask(length)], axis=1)
    return combine(p, softmax(scores(q, k), mask), v)


def null_key(p: Params, x: Array, tokens: Array) -> Array:
    """One learned key in front; the mask counts columns instead of being concatenated."""
    q, k, v = heads(p, x)
    length = tokens.shape[1]
    k = jnp.concatenate([jnp.tile(p["memory_k"], (len(x), 1, 1, 1)), k], axis=1)
    v = jnp.concatenate([jnp.tile(p["memory_v"], (len(x), 1, 1, 1)), v], axis=1)
    return combine(p, softmax(scores(q, k), jnp.arange(length)[:, None] + 1 >= jnp.arange(length + 1)), v)


def memory_behind(p: Params, x: Array, tokens: Array) -> Array:
    """Learned keys put behind those of the tokens, with the mask padded by true columns."""
    q, k, v = heads(p, x)
    length, count = tokens.shape[1], p["memory_k"].shape[0]
    k = jnp.concatenate([k, jnp.tile(p["memory_k"], (len(x), 1, 1, 1))], axis=1)
    v = jnp.concatenate([v, jnp.tile(p["memory_v"], (len(x), 1, 1, 1))], axis=1)
    mask = jnp.pad(causal_mask(length), ((0, 0), (0, count)), constant_values=True)
    return combine(p, softmax(scores(q, k), mask), v)


def top_scores(p: Params, x: Array, tokens: Array, *, keep: int = 4) -> Array:
    """Only the four largest scores of a query survive, found by `top_k`."""
    q, k, v = heads(p, x)
    s = jnp.where(causal_mask(tokens.shape[1]), scores(q, k), MASKED)
    return combine(p, softmax(s, s >= lax.top_k(s, keep)[0][..., -1:]), v)


def sorted_threshold(p: Params, x: Array, tokens: Array) -> Array:
    """The same, with the threshold read from the sorted scores."""
    q, k, v = heads(p, x)
    s = jnp.where(causal_mask(tokens.shape[1]), scores(q, k), MASKED)
    return combine(p, softmax(s, s >= jnp.sort(s, axis=-1)[..., -4:-3]), v)


def differential(p: Params, x: Array, tokens: Array) -> Array:
    """The difference of two attention maps (arXiv:2410.05258): half of each head for either."""
    q, k, v = heads(p, x)
    mask = causal_mask(tokens.shape[1])
    first, second = (softmax(scores(a, b), mask) for a, b in zip(jnp.split(q, 2, -1), jnp.split(k, 2, -1), strict=True))
    return combine(p, first - 0.3 * second, v)


def sigmoid_attention(p: Params, x: Array, tokens: Array) -> Array:
    """No softmax: every score through its own sigmoid, masked by a product."""
    q, k, v = heads(p, x)
    return combine(p, jax.nn.sigmoid(scores(q, k) - 1.0) * causal_mask(tokens.shape[1]), v)


def output_gate_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "gate": draw(WIDTH, WIDTH)}


def output_gate(p: Params, x: Array, tokens: Array) -> Array:
    """The query's own token gates what attention returns."""
    return causal_attention(p, x, tokens) * jax.nn.sigmoid(x @ p["gate"])


def merged_batch_and_heads(p: Params, x: Array, tokens: Array) -> Array:
    """Batch and heads as one axis, the way batched matrix products like it."""
    batch, length, _ = x.shape
    q, k, v = (y.swapaxes(1, 2).reshape(batch * HEADS, length, HEAD_DIM) for y in heads(p, x))
    probs = softmax(q @ k.swapaxes(1, 2) / np.sqrt(HEAD_DIM), causal_mask(length))
    y = (probs @ v).reshape(batch, HEADS, length, HEAD_DIM).swapaxes(1, 2)
    return (y.reshape(batch * length, WIDTH) @ p["o"].reshape(WIDTH, WIDTH)).reshape(batch, length, WIDTH)


def merged_time_and_heads(p: Params, x: Array, tokens: Array) -> Array:
    """Time and heads as one axis around a map of each key, then apart again."""
    q, k, v = heads(p, x)
    k = jnp.tanh(k.reshape(-1, HEAD_DIM) * 1.5).reshape(v.shape)
    return combine(p, softmax(scores(q, k), causal_mask(tokens.shape[1])), v)


def vmapped_heads(p: Params, x: Array, tokens: Array) -> Array:
    """One head written for one sequence, mapped over heads and batch."""

    def head(row: Array, q: Array, k: Array, v: Array, o: Array) -> Array:
        s = (row @ q) @ (row @ k).T / np.sqrt(HEAD_DIM)
        return jax.nn.softmax(jnp.where(causal_mask(len(row)), s, -jnp.inf), axis=-1) @ (row @ v) @ o

    over_heads = jax.vmap(head, in_axes=(None, 1, 1, 1, 0))
    return jax.vmap(lambda row: over_heads(row, p["q"], p["k"], p["v"], p["o"]).sum(axis=0))(x)


def vmapped_batch() -> tuple[Forward, Params]:
    """The whole model written for one sequence; `vmap` adds the batch."""
    fn, params = decoder(causal_attention)
    return jax.vmap(lambda params, row: fn(params, row[None])[0], in_axes=(None, 0)), params


def probabilities_reused() -> tuple[Forward, Params]:
    """The first layer's probabilities serve every layer."""

    def fn(params: Params, tokens: Array) -> Array:
        x, probs = params["embed"][tokens], None
        for p in params["layers"]:
            q, k, v = heads(p, rms_norm(x))
            if probs is None:
                probs = softmax(scores(q, k), causal_mask(tokens.shape[1]))
            x = x + combine(p, probs, v)
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(attention_weights, None, seed=0)


def keys_shared_across_layers() -> tuple[Forward, Params]:
    """Later layers attend to the first layer's keys and values (arXiv:2405.12981)."""

    def fn(params: Params, tokens: Array) -> Array:
        x = params["embed"][tokens]
        _, k, v = heads(params["layers"][0], rms_norm(x))
        for p in params["layers"]:
            q = project(rms_norm(x), p["q"])
            x = x + combine(p, softmax(scores(q, k), causal_mask(tokens.shape[1])), v)
        return rms_norm(x) @ params["unembed"]

    return fn, decoder_params(attention_weights, None, seed=0)


def two_attentions_one_projection(p: Params, x: Array, tokens: Array) -> Array:
    """Keys that are also the values, and a second, narrower attention over the same keys."""
    q, k, _ = heads(p, x)
    distance = jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])
    near = attend({**p, "v": p["k"]}, x, (distance >= 0) & (distance < 4))
    return near + combine(p, softmax(scores(q, k), distance >= 0), k)


MODELS = (
    ZooModel("mha", lambda: decoder(causal_attention)),
    ZooModel("fused_qkv", lambda: decoder(fused_qkv, fused_weights)),
    ZooModel("softmax_by_hand", lambda: decoder(softmax_by_hand)),
    ZooModel("gqa_grouped", lambda: decoder(grouped_query, partial(attention_weights, kv_heads=2))),
    ZooModel("gqa_repeated", lambda: decoder(repeated_keys, partial(attention_weights, kv_heads=2))),
    ZooModel("mqa", lambda: decoder(one_key_head, partial(attention_weights, kv_heads=1))),
    ZooModel("mqa_repeated", lambda: decoder(repeated_keys, partial(attention_weights, kv_heads=1))),
    ZooModel("mla", lambda: decoder(latent_attention, latent_weights)),
    ZooModel("mla_rope", lambda: decoder(latent_rope_attention, latent_rope_weights)),
    ZooModel("alibi", lambda: decoder(alibi)),
    ZooModel("alibi_numpy", lambda: decoder(partial(alibi, module=np))),
    ZooModel("soft_cap", lambda: decoder(soft_cap)),
    ZooModel("qk_norm", lambda: decoder(normed_queries_and_keys)),
    ZooModel("talking_heads", lambda: decoder(talking_heads, talking_weights)),
    ZooModel("sink_column", lambda: decoder(sink_column, sink_weights)),
    ZooModel("sink_in_denominator", lambda: decoder(sink_in_denominator, sink_weights)),
    ZooModel("learned_memory", lambda: decoder(learned_memory, partial(memory_weights, count=NUM_MEMORY))),
    ZooModel("null_key", lambda: decoder(null_key, partial(memory_weights, count=1))),
    ZooModel("memory_behind", lambda: decoder(memory_behind, partial(memory_weights, count=NUM_MEMORY))),
    ZooModel("top_scores", lambda: decoder(top_scores)),
    ZooModel("sorted_threshold", lambda: decoder(sorted_threshold)),
    ZooModel("differential", lambda: decoder(differential)),
    ZooModel("sigmoid_attention", lambda: decoder(sigmoid_attention)),
    ZooModel("output_gate", lambda: decoder(output_gate, output_gate_weights)),
    ZooModel("merged_batch_and_heads", lambda: decoder(merged_batch_and_heads)),
    ZooModel("merged_time_and_heads", lambda: decoder(merged_time_and_heads)),
    ZooModel("vmapped_heads", lambda: decoder(vmapped_heads)),
    ZooModel("vmapped_batch", vmapped_batch),
    ZooModel("probabilities_reused", probabilities_reused),
    ZooModel("keys_shared_across_layers", keys_shared_across_layers),
    ZooModel("keys_are_values", lambda: decoder(two_attentions_one_projection)),
)
