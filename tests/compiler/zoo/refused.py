"""Models that must be refused: not causal, dependent on the length, or (for now) beyond the derivation.

The line to blame ends in a mark that `guilty_lines` finds. `reason` is what the message must speak of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .blocks import (
    MASKED,
    MAX,
    WIDTH,
    Draw,
    Mix,
    Params,
    attention_weights,
    causal_attention,
    causal_mask,
    combine,
    decoder,
    heads,
    scores,
    softmax,
)
from .misc import EXPERTS, expert_weights, experts_of_all, routed
from .model import ZooModel
from .positions import rotate_half
from .recurrent import square_weights

# Not causal by values: shapes alone show nothing wrong.


def bidirectional(p: Params, x: Array, tokens: Array) -> Array:
    q, k, v = heads(p, x)
    probs = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), axis=-1)  # refused here
    return combine(p, probs, v)


def mask_off_by_one(p: Params, x: Array, tokens: Array) -> Array:
    """Each query sees one key too many."""
    q, k, v = heads(p, x)
    i = jnp.arange(tokens.shape[1])
    probs = jax.nn.softmax(jnp.where(i[:, None] + 1 >= i, scores(q, k), MASKED), axis=-1)  # refused here
    return combine(p, probs, v)


def mask_upside_down(p: Params, x: Array, tokens: Array) -> Array:
    """Keys and queries of the mask confused."""
    q, k, v = heads(p, x)
    i = jnp.arange(tokens.shape[1])
    probs = jax.nn.softmax(jnp.where(i[:, None] <= i, scores(q, k), MASKED), axis=-1)  # refused here
    return combine(p, probs, v)


def mask_in_blocks(p: Params, x: Array, tokens: Array) -> Array:
    """Blocks of four see all of themselves, the future too."""
    q, k, v = heads(p, x)
    block = jnp.arange(tokens.shape[1]) // 4
    probs = jax.nn.softmax(jnp.where(block[:, None] >= block, scores(q, k), MASKED), axis=-1)  # refused here
    return combine(p, probs, v)


def mask_in_whole_blocks(p: Params, x: Array, tokens: Array) -> Array:
    """The same in a model that takes whole blocks only, so that no prefix it accepts shows the leak."""
    if tokens.shape[1] % 4:
        raise ValueError(f"sequence length must be a multiple of 4, got {tokens.shape[1]}")
    q, k, v = heads(p, x)
    block = jnp.arange(tokens.shape[1]) // 4
    probs = jax.nn.softmax(jnp.where(block[:, None] >= block, scores(q, k), MASKED), axis=-1)  # refused here
    return combine(p, probs, v)


def mask_multiplied(p: Params, x: Array, tokens: Array) -> Array:
    """Hidden scores become zero, not minus infinity: every later key still takes its share."""
    q, k, v = heads(p, x)
    probs = jax.nn.softmax(scores(q, k) * causal_mask(tokens.shape[1]), axis=-1)  # refused here
    return combine(p, probs, v)


def mask_leaves_first_row_empty(p: Params, x: Array, tokens: Array) -> Array:
    """No token sees itself, so the first averages over all columns, whatever their number."""
    q, k, v = heads(p, x)
    i = jnp.arange(tokens.shape[1])
    probs = jax.nn.softmax(jnp.where(i[:, None] > i, scores(q, k), MASKED), axis=-1)  # refused here
    return combine(p, probs, v)


def softmax_over_queries(p: Params, x: Array, tokens: Array) -> Array:
    """The softmax runs along the wrong axis."""
    q, k, v = heads(p, x)
    s = jnp.where(causal_mask(tokens.shape[1]), scores(q, k), MASKED)
    probs = jax.nn.softmax(s, axis=-2)  # refused here
    return combine(p, probs, v)


def mixing_without_mask(p: Params, x: Array, tokens: Array) -> Array:
    """MLP-Mixer's learned weights over all tokens."""
    length = tokens.shape[1]
    return jnp.einsum("ts,bsd->btd", p["mixing"][:length, :length], x)  # refused here


# Dependent on the length.


def scaled_by_log_length(p: Params, x: Array, tokens: Array) -> Array:
    q, k, v = heads(p, x)
    s = scores(q, k) * np.log(tokens.shape[1])  # refused here
    return combine(p, softmax(s, causal_mask(tokens.shape[1])), v)


def divided_by_length(p: Params, x: Array, tokens: Array) -> Array:
    q, k, v = heads(p, x)
    weights = jnp.where(causal_mask(tokens.shape[1]), scores(q, k), 0.0)
    weights = weights / tokens.shape[1]  # refused here
    return combine(p, weights, v)


def last_token_marked(p: Params, x: Array, tokens: Array) -> Array:
    last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1  # refused here
    return causal_attention(p, jnp.where(last[:, None], 2.0 * x, x), tokens)


def last_tokens_see_all(p: Params, x: Array, tokens: Array) -> Array:
    """A window for all but the last four queries."""
    q, k, v = heads(p, x)
    i = jnp.arange(tokens.shape[1])
    late = i[:, None] >= tokens.shape[1] - 4  # refused here
    return combine(p, softmax(scores(q, k), (i[:, None] >= i) & (late | (i[:, None] - i < 4))), v)


def embed_from_the_end(params: Params, tokens: Array) -> Array:
    positions = tokens.shape[1] - 1 - jnp.arange(tokens.shape[1])  # refused here
    return params["embed"][tokens] + params["positions"][positions]


def embed_by_reversed_table(params: Params, tokens: Array) -> Array:
    """Positions counted from the end by turning the table around."""
    table = params["positions"][: tokens.shape[1]][::-1]  # refused here
    return params["embed"][tokens] + table


def embed_by_fraction(params: Params, tokens: Array) -> Array:
    """Positions from zero to one, so that every longer text moves all of them."""
    fraction = jnp.linspace(0.0, 1.0, tokens.shape[1])  # refused here
    return params["embed"][tokens] + fraction[:, None] * params["positions"][0]


def position_table(draw: Draw) -> Params:
    return {"positions": draw(MAX, WIDTH, scale=1.0)}


def dynamic_rope(p: Params, x: Array, tokens: Array) -> Array:
    """Rotary angles whose base grows with the length past the trained one (NTK-aware, `dynamic`)."""
    q, k, v = heads(p, x)
    size, trained, positions = q.shape[-1], 6, jnp.arange(tokens.shape[1])
    growth = max(tokens.shape[1] / trained, 1.0) ** (size / (size - 2))
    angle = positions[:, None, None] * (100.0 * growth) ** -(jnp.arange(0, size, 2) / size)  # refused here

    def rotate(y: Array) -> Array:
        a, b = jnp.split(y, 2, axis=-1)
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)

    return combine(p, softmax(scores(rotate(q), rotate(k)), causal_mask(tokens.shape[1])), v)


def shifted_rope(p: Params, x: Array, tokens: Array) -> Array:
    """Rotary positions relative to the last token for the queries alone."""
    q, k, v = heads(p, x)
    i = jnp.arange(tokens.shape[1])
    q = rotate_half(q, i + tokens.shape[1])  # refused here
    return combine(p, softmax(scores(q, rotate_half(k, i)), causal_mask(tokens.shape[1])), v)


def capacity_of_length(p: Params, x: Array, tokens: Array) -> Array:
    """Each expert takes as many tokens as the length allows; which are dropped depends on what follows."""
    weights = routed(p, x)
    taken = (weights > 0).astype(jnp.int32)
    place = jnp.cumsum(taken, axis=1) - taken
    kept = jnp.where(place < tokens.shape[1] // EXPERTS, weights, 0.0)  # refused here
    return causal_attention(p, x, tokens) + jnp.einsum("bte,btef->btf", kept, experts_of_all(p, x))


# Mixing over time that reaches the future.


def mean_over_time(p: Params, x: Array, tokens: Array) -> Array:
    return causal_attention(p, x - x.mean(axis=1, keepdims=True), tokens)  # refused here


def maximum_over_time(p: Params, x: Array, tokens: Array) -> Array:
    return causal_attention(p, x - jnp.max(x, axis=1, keepdims=True), tokens)  # refused here


def normalized_over_time(p: Params, x: Array, tokens: Array) -> Array:
    """Instance normalisation: mean and variance of each channel over the sequence."""
    mean = jnp.mean(x, axis=1, keepdims=True)  # refused here
    variance = jnp.mean(jnp.square(x - mean), axis=1, keepdims=True)  # refused here
    return causal_attention(p, (x - mean) * lax.rsqrt(variance + 1e-5), tokens)


def softmax_over_time(p: Params, x: Array, tokens: Array) -> Array:
    """Each channel is a distribution over all positions."""
    return causal_attention(p, x * jax.nn.softmax(x @ p["a"], axis=1), tokens)  # refused here


def fourier_over_time(p: Params, x: Array, tokens: Array) -> Array:
    """FNet's mixing (arXiv:2105.03824)."""
    return jnp.fft.fft(x, axis=1).real / 4.0  # refused here


def flipped(p: Params, x: Array, tokens: Array) -> Array:
    """A recurrence that runs over the reversed sequence."""
    backwards = jnp.flip(x, axis=1)  # refused here

    def step(h: Array, row: Array) -> tuple[Array, Array]:
        h = jnp.tanh(h @ p["a"] + row)
        return h, h

    _, states = lax.scan(step, jnp.zeros((x.shape[0], WIDTH)), backwards.swapaxes(0, 1))
    return jnp.flip(states.swapaxes(0, 1), axis=1)  # refused here


def scanned_in_reverse(p: Params, x: Array, tokens: Array) -> Array:
    def step(h: Array, row: Array) -> tuple[Array, Array]:
        h = jnp.tanh(h @ p["a"] + row)
        return h, h

    states = lax.scan(step, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1), reverse=True)[1]  # refused here
    return states.swapaxes(0, 1)


def summed_in_reverse(p: Params, x: Array, tokens: Array) -> Array:
    return jnp.tanh(lax.cumsum(x @ p["a"], axis=1, reverse=True))  # refused here


def associatively_scanned_in_reverse(p: Params, x: Array, tokens: Array) -> Array:
    return jnp.tanh(lax.associative_scan(jnp.add, x @ p["a"], axis=1, reverse=True))  # refused here


def final_state_of_scan(p: Params, x: Array, tokens: Array) -> Array:
    """What a recurrence ends with summarises the whole text, and is added to every token."""

    def step(h: Array, row: Array) -> tuple[Array, None]:
        return jnp.tanh(h @ p["a"] + row), None

    final, _ = lax.scan(step, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1))  # refused here
    return x + final[:, None]  # refused here


def looking_ahead(p: Params, x: Array, tokens: Array) -> Array:
    ahead = x[:, 1:]  # refused here
    return causal_attention(p, x + jnp.pad(ahead, ((0, 0), (0, 1), (0, 0))), tokens)


def rolled_ahead(p: Params, x: Array, tokens: Array) -> Array:
    return causal_attention(p, x + jnp.roll(x, -1, axis=1), tokens)  # refused here


def rolled_around(p: Params, x: Array, tokens: Array) -> Array:
    """A shift into the past, but the first row receives the last."""
    return causal_attention(p, x + jnp.roll(x, 1, axis=1), tokens)  # refused here


def gathered_ahead(p: Params, x: Array, tokens: Array) -> Array:
    """Gathers the row two further on, the last one beyond the end."""
    ahead = x[:, jnp.minimum(jnp.arange(tokens.shape[1]) + 2, tokens.shape[1] - 1)]  # refused here
    return causal_attention(p, x + ahead, tokens)


def last_token_added(p: Params, x: Array, tokens: Array) -> Array:
    """As `first_token_added`, from the other end."""
    return causal_attention(p, x + x[:, -1:], tokens)  # refused here


def conv_ahead(p: Params, x: Array, tokens: Array) -> Array:
    y = lax.conv_general_dilated(x, p["dense"], (1,), [(1, 2)], dimension_numbers=("NWC", "WIO", "NWC"))  # refused here
    return jnp.tanh(y)


def conv_same(p: Params, x: Array, tokens: Array) -> Array:
    y = lax.conv_general_dilated(x, p["dense"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))  # refused here
    return jnp.tanh(y)


def conv_cut_in_the_middle(p: Params, x: Array, tokens: Array) -> Array:
    """Padded by three on both sides, but cut one row too late."""
    y = lax.conv_general_dilated(x, p["dense"], (1,), [(3, 3)], dimension_numbers=("NWC", "WIO", "NWC"))  # refused here
    return jnp.tanh(y[:, 1 : tokens.shape[1] + 1])  # refused here


def dense_kernel(draw: Draw) -> Params:
    return {"dense": draw(4, WIDTH, WIDTH, scale=(4 * WIDTH) ** -0.5)}


# Tokens picked by comparing them with later ones.


def experts_choose(p: Params, x: Array, tokens: Array) -> Array:
    """Each expert picks its best tokens of the whole sequence (arXiv:2202.09368)."""
    affinity = jax.nn.softmax(x @ p["router"], axis=-1)
    kept = affinity >= lax.top_k(affinity.swapaxes(1, 2), 6)[0][..., -1][:, None]  # refused here
    return causal_attention(p, x, tokens) + jnp.einsum("bte,btef->btf", kept * affinity, experts_of_all(p, x))


def scattered_ahead(p: Params, x: Array, tokens: Array) -> Array:
    """Each token writes its weights into the row of the token before it."""
    best, which = jax.lax.top_k(x @ p["router"], 2)
    row = jnp.maximum(jnp.arange(x.shape[1]) - 1, 0)[:, None]
    weights = jnp.zeros_like(x[0] @ p["router"]).at[row, which[0]].add(best[0])  # refused here
    return causal_attention(p, x, tokens) + jnp.einsum("te,btef->btf", weights, experts_of_all(p, x))


def best_half_kept(p: Params, x: Array, tokens: Array) -> Array:
    """Mixture of depths (arXiv:2404.02258): only the tokens that rank in the upper half pass."""
    score = (x @ p["router"])[..., 0]
    rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)  # refused here
    kept = rank < tokens.shape[1] // 2  # refused here
    return jnp.where(kept[..., None], causal_attention(p, x, tokens), 0.0)


def above_median(p: Params, x: Array, tokens: Array) -> Array:
    """A threshold read from the scores sorted over time."""
    score = (x @ p["router"])[..., 0]
    threshold = jnp.sort(score, axis=1)[:, 8:9]  # refused here
    return jnp.where((score > threshold)[..., None], causal_attention(p, x, tokens), 0.0)


# Time split into blocks, and not causal within them.


def averaged_by_block(p: Params, x: Array, tokens: Array) -> Array:
    """Blocks of four share the mean of their tokens. Whole blocks are consistent over lengths, and still look ahead."""
    blocks = x.reshape(x.shape[0], -1, 4, WIDTH)  # refused here
    return causal_attention(p, x + jnp.repeat(blocks.mean(axis=2), 4, axis=1), tokens)


# Causal, but beyond the derivation for now.


def attention_in_blocks(p: Params, x: Array, tokens: Array) -> Array:
    """Each block of four attends to itself, time reshaped to [T / 4, 4]."""
    q, k, v = heads(p, x)
    q, k, v = (y.reshape(y.shape[0], -1, 4, *y.shape[2:]) for y in (q, k, v))  # refused here
    probs = softmax(jnp.einsum("bctnh,bcsnh->bcnts", q, k), causal_mask(4))
    y = jnp.einsum("bcnts,bcsnh->bctnh", probs, v).reshape(*x.shape[:2], *v.shape[3:])
    return jnp.einsum("btnh,nhd->btd", y, p["o"])


def chunked_linear_attention(p: Params, x: Array, tokens: Array) -> Array:
    """Linear attention chunk by chunk: a product within each, a summed state between them."""
    q, k, v = heads(p, x)
    q, k, v = (y.reshape(y.shape[0], -1, 4, *y.shape[2:]) for y in (q, k, v))  # refused here
    inside = jnp.einsum("bctnh,bcsnh->bcnts", q, k) * causal_mask(4)
    memory = jnp.einsum("bcsni,bcsnj->bcnij", k, v)
    before = jnp.cumsum(memory, axis=1) - memory
    y = jnp.einsum("bcnts,bcsnh->bctnh", inside, v) + jnp.einsum("bctni,bcnij->bctnj", q, before)
    return jnp.einsum("btnh,nhd->btd", y.reshape(*x.shape[:2], *v.shape[3:]) / 64.0, p["o"])


def python_loop_over_time(p: Params, x: Array, tokens: Array) -> Array:
    h, states = jnp.zeros((x.shape[0], WIDTH)), []
    for i in range(tokens.shape[1]):
        h = jnp.tanh(h @ p["a"] + x[:, i])  # refused here
        states.append(h)
    return jnp.stack(states, axis=1)  # refused here


def convolved_by_fourier(p: Params, x: Array, tokens: Array) -> Array:
    """A convolution as long as the text, by FFT of the padded sequence (arXiv:2302.10866)."""
    length = tokens.shape[1]
    spectrum = jnp.fft.rfft(x, n=2 * length, axis=1)  # refused here
    kernel = jnp.fft.rfft(p["filter"][:length], n=2 * length, axis=0)  # refused here
    return jnp.fft.irfft(spectrum * kernel, n=2 * length, axis=1)[:, :length]  # refused here


def experts_by_sorting(p: Params, x: Array, tokens: Array) -> Array:
    """Tokens sorted by their expert, worked on in that order and put back; none is dropped."""
    flat = x.reshape(-1, WIDTH)
    best = jnp.argmax(flat @ p["router"], axis=-1)
    order = jnp.argsort(best)  # refused here
    ordered, expert = flat[order], best[order]  # refused here
    y = jax.nn.silu(jnp.einsum("td,tdf->tf", ordered, p["w1"][expert]))
    back = jnp.argsort(order)  # refused here
    return causal_attention(p, x, tokens) + y[back].reshape(x.shape)  # refused here


def filter_weights(draw: Draw) -> Params:
    decay = jnp.exp(-0.2 * jnp.arange(MAX))[:, None]
    return {"filter": draw(MAX, WIDTH, scale=1.0) * decay}


def mixing_weights(draw: Draw) -> Params:
    return {"mixing": draw(MAX, MAX, scale=0.3)}


def softmax_weights(draw: Draw) -> Params:
    return {**attention_weights(draw), "a": draw(WIDTH, WIDTH)}


def _refused(
    mix: Mix, reason: str, weights: Callable[[Draw], Params] = attention_weights, *, length_multiple: int = 1, **facts
) -> ZooModel:
    """A refused model named after its mixing, which holds the marked line."""
    make = partial(decoder, mix, weights)
    return ZooModel(mix.__name__, make, reason=reason, guilty=mix, length_multiple=length_multiple, **facts)


def _refused_embedding(embed: Callable[[Params, Array], Array], reason: str) -> ZooModel:
    make = partial(decoder, causal_attention, embed=embed, extra=position_table)
    return ZooModel(embed.__name__, make, reason=reason, guilty=embed)


MODELS = (
    _refused(bidirectional, "not causal"),
    _refused(mask_off_by_one, "not causal"),
    _refused(mask_upside_down, "not causal"),
    _refused(mask_in_blocks, "not causal"),
    _refused(mask_in_whole_blocks, "not causal", length_multiple=4),
    _refused(mask_multiplied, "not causal"),
    _refused(mask_leaves_first_row_empty, "not causal"),
    _refused(softmax_over_queries, ""),
    _refused(mixing_without_mask, "not causal", mixing_weights),
    _refused(scaled_by_log_length, "length"),
    _refused(divided_by_length, "length"),
    _refused(last_token_marked, "length"),
    _refused(last_tokens_see_all, "length"),
    _refused_embedding(embed_from_the_end, "length"),
    _refused_embedding(embed_by_reversed_table, ""),
    _refused_embedding(embed_by_fraction, "length"),
    _refused(dynamic_rope, "length"),
    _refused(shifted_rope, "length"),
    _refused(capacity_of_length, "length", expert_weights),
    _refused(mean_over_time, "time"),
    _refused(maximum_over_time, "time"),
    _refused(normalized_over_time, "time"),
    _refused(softmax_over_time, "time", softmax_weights),
    _refused(fourier_over_time, "fourier"),
    _refused(flipped, "rev", square_weights),
    _refused(scanned_in_reverse, "reverse", square_weights),
    _refused(summed_in_reverse, "reverse", square_weights),
    _refused(associatively_scanned_in_reverse, "reverse", square_weights),
    _refused(final_state_of_scan, "last state", square_weights),
    _refused(looking_ahead, "look"),
    _refused(rolled_ahead, ""),
    _refused(rolled_around, ""),
    _refused(gathered_ahead, ""),
    _refused(last_token_added, "not causal"),
    _refused(conv_ahead, "look", dense_kernel),
    _refused(conv_same, "look", dense_kernel),
    _refused(conv_cut_in_the_middle, "look", dense_kernel),
    _refused(experts_choose, "", expert_weights),
    _refused(scattered_ahead, "computed tokens", expert_weights),
    _refused(best_half_kept, "", expert_weights),
    _refused(above_median, "", expert_weights),
    _refused(averaged_by_block, "", length_multiple=4),
    _refused(attention_in_blocks, "", length_multiple=4, for_now=True),
    _refused(chunked_linear_attention, "", length_multiple=4, for_now=True),
    _refused(python_loop_over_time, "", square_weights, for_now=True),
    _refused(convolved_by_fourier, "fourier", filter_weights, for_now=True),
    _refused(experts_by_sorting, "sort", expert_weights, for_now=True),
)
