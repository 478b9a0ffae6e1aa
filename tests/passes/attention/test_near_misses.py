"""What looks like attention and is none stays as it is; what is attention keeps its meaning where sizes tell nothing.

All axes have the same size, so that only their roles can tell them apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.attention.rewrite import attention
from passes.attention.simplify_mask import decompose
from passes.graph import Graph
from passes.masks import All, Offset
from passes.reader import trace
from passes.replay import evaluate
from passes.simplify import simplify
from tests.passes.attention.checking import assert_found, count

softmax = jax.nn.softmax


def _operands(*shapes):
    random = np.random.RandomState(0)
    return [random.randn(*shape).astype(np.float32) for shape in shapes]


def _scores(q, k):
    return jnp.einsum("bnth,bnsh->bnts", q, k)


def _weigh(weights, v):
    return jnp.einsum("bnts,bnsh->bnth", weights, v)


def _parts(scores, top, total):
    """Numerator and denominator with the maximum and the sum over axes of their own."""
    numerator = jnp.exp(scores - scores.max(top, keepdims=True))
    return numerator, numerator.sum(total, keepdims=True)


def _quotient(scores, top, total):
    numerator, denominator = _parts(scores, top, total)
    return numerator / denominator


def _two_exponentials(q, k, v):
    scores = _scores(q, k)
    return _weigh(jnp.exp(scores) / jnp.exp(scores * 1.5).sum(-1, keepdims=True), v)


def _other_fill_in_the_sum(q, k, v):
    scores = _scores(q, k)
    hidden = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), scores, -jnp.inf)
    return _weigh(jnp.exp(hidden) / jnp.exp(scores).sum(-1, keepdims=True), v)


def _divided_after_by_another_sum(q, k, v):
    numerator = jnp.exp(_scores(q, k))
    return _weigh(numerator, v) / numerator.sum(-2)[..., None]


def _divided_after_in_another_order(q, k, v):
    """The sum of each query divides the column of the same number."""
    numerator = jnp.exp(_scores(q, k))
    return _weigh(numerator, v) / numerator.sum(-1)[..., None, :]


def _max_of_other_scores(q, k, v):
    scores = _scores(q, k)
    shifted = jnp.exp(scores - _scores(k, q).max(-2, keepdims=True).swapaxes(-1, -2) * jnp.arange(4))
    return _weigh(shifted / jnp.exp(scores).sum(-1, keepdims=True), v)


def _sink_of_another_shift(q, k, v):
    scores = _scores(q, k)
    top = scores.max(-1, keepdims=True)
    numerator = jnp.exp(scores - top)
    return _weigh(numerator / (numerator.sum(-1, keepdims=True) + jnp.exp(0.5 - 2 * top)), v)


def _half_the_column(q, k, v):
    """A column is joined on, and another one is cut off."""
    scores = _scores(q, k)
    joined = jnp.concatenate([scores, jnp.zeros((4, 4, 4, 1))], axis=-1)
    return _weigh(softmax(joined, axis=-1)[..., 1:], v)


def _two_columns(q, k, v):
    joined = jnp.concatenate([_scores(q, k), jnp.zeros((4, 4, 4, 2))], axis=-1)
    return _weigh(softmax(joined, axis=-1)[..., :-2], v)


def _column_among_queries(q, k, v):
    joined = jnp.concatenate([_scores(q, k), jnp.zeros((4, 4, 1, 4))], axis=-2)
    return _weigh(softmax(joined, axis=-1)[..., :-1, :], v)


NEAR_MISSES = {
    "softmax over queries": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-2), v),
    "softmax over heads": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=1), v),
    "softmax over keys and queries": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=(-2, -1)), v),
    "maximum over queries": lambda q, k, v: _weigh(_quotient(_scores(q, k), -2, -1), v),
    "sum over queries": lambda q, k, v: _weigh(_quotient(_scores(q, k), -1, -2), v),
    "sum over heads": lambda q, k, v: _weigh(_quotient(_scores(q, k), -1, 1), v),
    "maximum of other scores": _max_of_other_scores,
    "two exponentials": _two_exponentials,
    "a sum of other scores": _other_fill_in_the_sum,
    "divided after by another sum": _divided_after_by_another_sum,
    "divided after in another order": _divided_after_in_another_order,
    "divided twice": lambda q, k, v: _weigh(_quotient(softmax(_scores(q, k)), -1, -1) / 3.0, v),
    "probabilities returned": lambda q, k, v: (lambda w: (_weigh(w, v), w))(softmax(_scores(q, k), axis=-1)),
    "scores returned": lambda q, k, v: (lambda s: (_weigh(softmax(s, axis=-1), v), s.sum()))(_scores(q, k)),
    "scores used twice": lambda q, k, v: (lambda s: _weigh(softmax(s, axis=-1), v) + jnp.tanh(s) @ v)(_scores(q, k)),
    "values along the queries": lambda q, k, v: jnp.einsum("bnts,bnth->bnsh", softmax(_scores(q, k), axis=-1), v),
    "values along the heads": lambda q, k, v: jnp.einsum("bnts,bnuh->btsh", softmax(_scores(q, k), axis=-1), v),
    "values summed over two axes": lambda q, k, v: jnp.einsum("bnts,bnsh->bth", softmax(_scores(q, k), axis=-1), v),
    "no product of queries and keys": lambda q, k, v: _weigh(softmax(q + k, axis=-1), v),
    "a linear layer": lambda q, k, v: _weigh(softmax(q * 2.0, axis=-1), v),
    "scores by a table": lambda q, k, v: _weigh(softmax(jnp.take(q, jnp.arange(4) % 3, axis=-1) * k, axis=-1), v),
    "queries from keys' axis": lambda q, k, v: _weigh(softmax(q @ q[:, :, :1].swapaxes(-1, -2) + k, axis=-1), v),
    "activation behind": lambda q, k, v: _weigh(jax.nn.relu(softmax(_scores(q, k), axis=-1) - 0.1), v),
    "power of the weights": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1) ** 2, v),
    "masked behind": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1) * jnp.tril(jnp.ones((4, 4))), v),
    "unnormalised": lambda q, k, v: _weigh(jnp.exp(_scores(q, k)), v),
    "unnormalised, shifted": lambda q, k, v: _weigh(_parts(_scores(q, k), -1, -1)[0], v),
    "sigmoid": lambda q, k, v: _weigh(jax.nn.sigmoid(_scores(q, k)), v),
    "linear attention": lambda q, k, v: (lambda s: _weigh(s / s.sum(-1, keepdims=True), v))(_scores(q, k) ** 2),
    "a larger sum": lambda q, k, v: (lambda e: _weigh(e / (e.sum(-1, keepdims=True) * 2), v))(jnp.exp(_scores(q, k))),
    "sink of another shift": _sink_of_another_shift,
    "another column cut off": _half_the_column,
    "two columns": _two_columns,
    "a column among queries": _column_among_queries,
    "rolled weights": lambda q, k, v: _weigh(jnp.roll(softmax(_scores(q, k), axis=-1), 1, axis=-1), v),
    "transposed weights": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1).swapaxes(-1, -2), v),
    "sum of another sequence": lambda q, k, v: (lambda e: _weigh(e / e.sum(-1, keepdims=True).swapaxes(0, 1), v))(
        jnp.exp(_scores(q, k))
    ),
    "sum of another query": lambda q, k, v: (lambda e: _weigh(e / e.sum(-1, keepdims=True)[:, :, ::-1], v))(
        jnp.exp(_scores(q, k))
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_does_not_fire(name):
    graph, _ = trace(NEAR_MISSES[name], *_operands(*[(4, 4, 4, 4)] * 3))
    simplify(graph)
    before = _shape_of(graph)
    result = attention(graph)
    assert result.matched == 0
    assert count(graph) == 0
    assert _shape_of(graph) == before, "a refused match changed the program"


def _shape_of(graph: Graph) -> list[str]:
    return [op.name for _, op in graph.walk()]


def test_a_near_miss_says_why_and_where():
    graph, _ = trace(NEAR_MISSES["sum over queries"], *_operands(*[(4, 4, 4, 4)] * 3))
    simplify(graph)
    (remark,) = attention(graph).remarks
    assert "the sum runs along other axes than the values" in str(remark)
    assert "test_near_misses.py" in str(remark.source)


_CAUSAL = jnp.tril(jnp.ones((4, 4), bool))
STRANGE = {
    "keys of another sequence": lambda q, k, v: _weigh(softmax(_scores(q, k.swapaxes(0, 1)), axis=-1), v),
    "keys in reverse": lambda q, k, v: _weigh(softmax(_scores(q, k[:, :, ::-1]), axis=-1), v),
    "values of another head": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1), v.swapaxes(0, 1)),
    "batches rolled": lambda q, k, v: _weigh(softmax(_scores(q, jnp.roll(k, 1, axis=0)), axis=-1), v),
    "turned mask": lambda q, k, v: _weigh(
        softmax(jnp.where(jnp.tril(jnp.ones((4, 4), bool), 2), -1e9, _scores(q, k)), axis=-1), v
    ),
    "mask of keys by queries": lambda q, k, v: _weigh(
        softmax(jnp.where(jnp.triu(jnp.ones((4, 4), bool)), _scores(q, k), -jnp.inf), axis=-1), v
    ),
    "mask of heads": lambda q, k, v: _weigh(
        softmax(jnp.where(jnp.tril(jnp.ones((4, 4), bool))[None, :, None], _scores(q, k), -1e9), axis=-1), v
    ),
    "keys are the queries": lambda q, k, v: _weigh(softmax(_scores(q, q), axis=-1), q),
    "result turned over": lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1), v).transpose(3, 1, 0, 2),
    "keys are the heads": lambda q, k, v: jnp.einsum(
        "bnts,bsnh->bnth", softmax(jnp.einsum("bnth,bsnh->bnts", q, k), axis=-1), v
    ),
    "no head is the batch": lambda q, k, v: jnp.einsum(
        "abts,bash->atbh", softmax(jnp.einsum("abth,bash->abts", q, k), axis=-1), v
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_attention_keeps_its_meaning(name):
    assert_found(name, STRANGE[name], _operands(*[(4, 4, 4, 4)] * 3))


PLAIN = {
    "turned mask": (
        lambda q, k, v: _weigh(softmax(jnp.where(_CAUSAL, _scores(q, k), -1e9), axis=-1), v),
        Offset(None, -3),
    ),
    "mask of keys by queries": (
        lambda q, k, v: _weigh(softmax(jnp.where(_CAUSAL, _scores(q, k), -jnp.inf), axis=-1), v),
        Offset(None, 0),
    ),
    "keys of another sequence": (lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1), v), All()),
    "batches rolled": (lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1), v), All()),
    "values of another head": (lambda q, k, v: _weigh(softmax(_scores(q, k), axis=-1), v), All()),
}
"""What they would be taken for by a reader who overlooks the twist, and the mask that they have."""


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_nearly_ordinary_attention_is_not_taken_for_it(name):
    """Its rewrite computes what it computed, which is far from what the ordinary spelling gives."""
    args = _operands(*[(4, 4, 4, 4)] * 3)
    after = assert_found(name, STRANGE[name], args)
    plain, mask = PLAIN[name]
    (found,) = evaluate(after, args)
    ordinary = np.asarray(jax.jit(plain)(*args))
    assert np.abs(np.asarray(found) - np.asarray(jax.jit(STRANGE[name])(*args))).max() < 1e-5
    assert np.abs(np.asarray(found) - ordinary).max() > 0.1
    (op,) = [op for op in after.ops if op.name == "attention"]
    form = decompose(op.params["score"])
    assert form is not None and form.mask == mask


def test_keys_permuted_across_the_batch_by_a_gather_stay_so():
    order = np.int32([2, 0, 1])

    def fn(q, k, v, order):
        return _weigh(softmax(_scores(q, k[order]), axis=-1), v)

    assert_found("gathered keys", fn, (*_operands((3, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 6)), order))
