"""The cut: at the sizes of real models, from shapes alone; bytes against FLOPs; windows shared by taps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.compiler.capture import capture
from passes.incremental.cut import CutProblem, minimum_cut
from passes.incremental.derive import derive
from passes.incremental.errors import NotServable
from passes.incremental.expansion import expansion_flops
from passes.incremental.plan import Plan
from tests.passes.incremental.programs import kept, program

BF16 = jnp.bfloat16
CAPACITY = 1024


def shape(*sizes: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def plan_of(fn: Any, params: Any) -> Plan:
    captured = capture(fn, params, CAPACITY)
    return derive(captured.graph, captured.times, captured.token_input)


def bytes_of_a_token(plan: Plan) -> int:
    assert {state.kind for state in plan.states} == {"kv"}
    return sum(state.nbytes for state in plan.states)


def attend(q: Any, k: Any, v: Any) -> Any:
    """[B, T, N, H] each; causal softmax attention, in float32 as models have it."""
    i = jnp.arange(q.shape[1])
    s = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(jnp.where(i[:, None] >= i, s, -1e9), axis=-1).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", probs, v)


def rotate(x: Any) -> Any:
    size = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None, None] * 10000.0 ** (-jnp.arange(0, size, 2) / size)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def deepseek(p: Any, tokens: Any) -> Any:
    """Multi-head latent attention (arXiv:2405.04434): 128 heads of 128 + 64, latents of 512."""
    x = p["embed"][tokens]
    latent, rope = x @ p["down"], rotate((x @ p["k_rope"])[:, :, None])
    latent = latent * jax.lax.rsqrt(jnp.mean(jnp.square(latent), -1, keepdims=True) + 1e-6)
    k, v = jnp.einsum("bsc,cnh->bsnh", latent, p["up_k"]), jnp.einsum("bsc,cnh->bsnh", latent, p["up_v"])
    k = jnp.concatenate([k, jnp.broadcast_to(rope, (*k.shape[:3], 64))], axis=-1)
    q = jnp.einsum("btd,dnh->btnh", x, p["q"])
    q = jnp.concatenate([q[..., :128], rotate(q[..., 128:])], axis=-1)
    return jnp.einsum("btnh,nhd->btd", attend(q, k, v), p["o"]) @ p["embed"].T


def test_latents_of_deepseek_are_cached_and_not_what_they_expand_to():
    width, heads, latent = 5120, 128, 512
    params = {
        "embed": shape(1000, width),
        "down": shape(width, latent),
        "k_rope": shape(width, 64),
        "up_k": shape(latent, heads, 128),
        "up_v": shape(latent, heads, 128),
        "q": shape(width, heads, 192),
        "o": shape(heads, 128, width),
    }
    plan = plan_of(deepseek, params)
    assert bytes_of_a_token(plan) == (512 + 64) * 2
    assert expansion_flops(plan) == 2 * (2 * CAPACITY * latent * heads * 128)  # of keys and of values


def grouped(p: Any, tokens: Any) -> Any:
    """Grouped-query attention of Llama 3 8B: 32 query heads, 8 key/value heads of 128, repeated for the product."""
    x = p["embed"][tokens]
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")
    k, v = (jnp.repeat(y, 4, axis=2) for y in (rotate(k), v))
    return jnp.einsum("btnh,nhd->btd", attend(rotate(q), k, v), p["o"]) @ p["embed"].T


def test_grouped_keys_and_values_are_cached_before_their_repeat():
    kv = shape(4096, 8, 128)
    params = {"embed": shape(1000, 4096), "q": shape(4096, 32, 128), "k": kv, "v": kv, "o": shape(32, 128, 4096)}
    plan = plan_of(grouped, params)
    assert bytes_of_a_token(plan) == 4096
    assert expansion_flops(plan) == 0


def test_rows_are_cached_before_they_are_widened():
    def fn(p, tokens):
        x = p["embed"][tokens]
        k = (x @ p["k"]).astype(jnp.float32)
        i = jnp.arange(tokens.shape[1])
        s = jnp.where(i[:, None] >= i, jnp.einsum("btd,bsd->bts", x.astype(jnp.float32), k), -1e9)
        return jax.nn.softmax(s) @ k @ p["embed"].T.astype(jnp.float32)

    plan = plan_of(fn, {"embed": shape(50, 64), "k": shape(64, 64)})
    (state,) = plan.states  # keys and values are one product
    assert state.dtype == BF16 and state.nbytes == 64 * 2


# ------------------------------------------------------------------------------------------ small programs
def test_taps_of_a_shift_share_one_window():
    def fn(embed, tokens):
        x = jnp.pad(embed[tokens], ((0, 0), (3, 0), (0, 0)))
        return sum(x[:, 3 - i : 3 - i + tokens.shape[1]] * (i + 1.0) for i in range(4))

    assert kept(program(fn, (shape(7, 5, dtype=jnp.float32),)).derive()) == [("window", (3, 1, 5))]


def test_a_narrow_value_is_kept_instead_of_a_wide_one_made_from_it():
    """All rows of a sine of eight copies of a token cost four bytes each to keep, not thirty-two."""

    def fn(tokens):
        x = jnp.sin(tokens[..., None] * jnp.ones(8))
        i = jnp.arange(tokens.shape[1])
        return jnp.where(i[:, None] >= i, x @ jnp.swapaxes(x, 1, 2), 0.0) @ x

    ((kind, row),) = kept(program(fn).derive())
    assert kind == "kv" and int(np.prod(row)) == 1


def test_what_a_loop_takes_from_outside_is_cached_there_once():
    """Each layer scales the same keys; kept behind the scaling they would be kept once a layer."""

    def fn(embed, scales, tokens):
        x = embed[tokens]
        i = jnp.arange(tokens.shape[1])

        def layer(h, scale):
            s = jnp.where(i[:, None] >= i, h @ jnp.swapaxes(x * scale, 1, 2), -1e9)
            return h + jax.nn.softmax(s) @ x, None

        return jax.lax.scan(layer, x, scales)[0]

    params = (shape(7, 5, dtype=jnp.float32), shape(3, 5, dtype=jnp.float32))
    (state,) = program(fn, params).derive().states
    assert state.lead == () and state.shape == (1, 5)


def test_a_value_of_pairs_of_tokens_is_refused():
    read = program(lambda tokens: jnp.sin(tokens[0, :, None] - tokens[0])[None])
    (pairs,) = read.graph.outputs
    with pytest.raises(NotServable, match="something of every pair of tokens"):
        minimum_cut(CutProblem(read.graph, read.times, [pairs], set(), lambda value: False))


def test_the_first_cut_that_can_be_made_again_stops_where_nothing_pulls_through():
    read = program(lambda tokens: jnp.cos(jnp.sin(tokens)))
    (wanted,) = read.graph.outputs
    sine = wanted.op.operands[0]
    assert minimum_cut(CutProblem(read.graph, read.times, [wanted], set(), lambda value: False)) == {wanted}
    assert minimum_cut(CutProblem(read.graph, read.times, [wanted, sine], set(), lambda value: True)) == {sine}
