"""Attention over cached rows as one operation: what is fused, what is left, and which rows queries are known to see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.attend_pages import attend_pages
from passes.attention.rewrite import attention
from passes.incremental.row_format import ROW_FORMATS
from passes.ops.kv_update_read import kv_update_read
from passes.simplify import simplify
from passes.validation import Validator
from passes.verify import verify
from tests.passes.graphs import names, read, run

R, Z, M, N, K, H, S = 2, 4, 5, 4, 2, 8, 18


def step(num_new, *, mask="causal", row_of="row 0", extra=False, rounded=False):
    """A step of a derived program: `fn(query, rows_k, rows_v, start, count, pages, pool_k, pool_v)`.

    With `rounded`, pools are pairs of int8 and scales.
    """

    def one(query, rows_k, rows_v, start, count, pages, pool_k, pool_v):
        index = jnp.arange(num_new, dtype=jnp.int32)
        positions = jnp.where(index < count, start + index, jnp.iinfo(jnp.int32).max)

        def cached(pool, rows):
            if rounded:
                through = lambda pool, rows: kv_update_read(pool, (), rows, positions, pages, length=S)
                number, scale = ROW_FORMATS["int8"].pack(rows)
                (view, pool), (scales, scale_pool) = through(pool[0], number), through(pool[1], scale)
                view, pool = ROW_FORMATS["int8"].unpack(view, scales, rows.dtype), (pool, scale_pool)
            else:
                view, pool = kv_update_read(pool, (), rows, positions, pages, length=S)
            written = (jnp.arange(S) < start + count).reshape(-1, 1, 1)
            other = view[:1] if row_of == "row 0" else jnp.zeros_like(view[:1])
            return jnp.where(written, view, other), pool

        (key, pool_k), (value, pool_v) = cached(pool_k, rows_k), cached(pool_v, rows_v)
        q, k = start + index[:, None], jnp.arange(S)[None]
        seen = {"causal": k <= q, "window": (k <= q) & (k > q - 5), "anything": k <= q + 3}[mask]
        scores = jnp.einsum("tnh,snh->nts", query, jnp.repeat(key, N // K, 1)) * H**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
        out = jnp.einsum("nts,snh->tnh", weights, jnp.repeat(value, N // K, 1))
        return out + (key.sum() if extra else 0), pool_k, pool_v

    return jax.vmap(one, in_axes=(0, 0, 0, 0, 0, 0, None, None), out_axes=(0, None, None))


def arrays(num_new, rounded=False):
    rng = np.random.default_rng(num_new)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    pages = jnp.asarray(rng.permutation(R * M).reshape(R, M), jnp.int32)
    start, count = jnp.asarray([3, 0], jnp.int32), jnp.asarray([num_new, max(1, num_new - 2)], jnp.int32)
    rows = [draw(R, num_new, K, H) for _ in range(2)]
    pools = [draw(R * M, Z, K, H), draw(R * M, Z, K, H)]
    pools = [ROW_FORMATS["int8"].pack(pool) for pool in pools] if rounded else pools
    return [draw(R, num_new, N, H), *rows, start, count, pages, *pools]


def fused(fn, args):
    graph = read(fn, *args)
    simplify(graph)
    attention(graph)
    result = attend_pages(graph)
    verify(graph)
    return graph, result


@pytest.mark.parametrize("num_new", [1, 6])
@pytest.mark.parametrize("mask, rounded", [("causal", False), ("window", False), ("causal", True)])
def test_a_step_of_a_derived_program_becomes_one_operation(num_new, mask, rounded):
    fn, args = step(num_new, mask=mask, rounded=rounded), arrays(num_new, rounded)
    graph, result = fused(fn, args)
    assert result.matched == 1 and "kv_update_read" not in names(graph) and "attention" not in names(graph)
    (op,) = [op for op in graph.ops if op.name == "paged_attention"]
    assert op.params["sees_written_only"] and op.operands[0].shape == (R, num_new, N, H)
    for have, want in zip(run(graph, *args), jax.tree.leaves(fn(*args)), strict=True):
        np.testing.assert_allclose(np.float32(have), np.float32(want), rtol=1e-5, atol=1e-5)
    assert Validator().check(result.rewrites[0]).status == "valid"


def test_a_mask_that_shows_rows_ahead_is_not_taken_for_one_that_hides_them():
    graph, result = fused(step(6, mask="anything"), arrays(6))
    assert result.matched == 1
    (op,) = [op for op in graph.ops if op.name == "paged_attention"]
    assert not op.params["sees_written_only"]


@pytest.mark.parametrize(
    "how, reason", [({"row_of": "zeros"}, "not read as row 0"), ({"extra": True}, "read elsewhere too")]
)
def test_what_is_left_says_why(how, reason):
    graph, result = fused(step(6, **how), arrays(6))
    assert result.matched == 0 and "attention" in names(graph)
    assert any(reason in str(remark) for remark in result.remarks), result.remarks


def test_again_changes_nothing():
    graph, _ = fused(step(6), arrays(6))
    assert attend_pages(graph).matched == 0
