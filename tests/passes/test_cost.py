import jax
import jax.numpy as jnp
import pytest
from jax import lax

from passes import compat
from passes.cost import Cost, graph_cost
from passes.reader import trace
from passes.simplify import simplify
from tests.passes.graphs import names, read


def cost(fn, *shapes, dtype=jnp.float32) -> Cost:
    return graph_cost(read(fn, *[jax.ShapeDtypeStruct(s, dtype) for s in shapes]))


def test_products_count_two_per_multiply_add():
    assert cost(jnp.matmul, (3, 4), (4, 5)).flops == 2 * 3 * 4 * 5
    assert cost(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 4), (2, 4, 5)).flops == 2 * 2 * 3 * 4 * 5


def test_a_convolution_counts_its_window_and_its_input_channels():
    full = lambda x, k: lax.conv_general_dilated(x, k, (1,), ((2, 0),), dimension_numbers=("NWC", "WIO", "NWC"))
    assert cost(full, (1, 7, 4), (3, 4, 5)).flops == 2 * 7 * 5 * 3 * 4
    depthwise = lambda x, k: lax.conv_general_dilated(
        x, k, (1,), ((2, 0),), dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
    )
    assert cost(depthwise, (1, 7, 4), (3, 1, 4)).flops == 2 * 7 * 4 * 3


def test_elementwise_counts_one_per_output_and_movement_none():
    assert cost(jnp.sin, (3, 4)).flops == 12
    assert cost(lambda x, y: x * y, (3, 4), (1, 4)).flops == 12
    assert cost(lambda x: x.T.reshape(2, 6)[::-1, 1:], (3, 4)).flops == 0
    assert cost(lambda x: jnp.cumsum(x, 0), (3, 4)).flops == 12
    assert cost(lambda x: x.sum(), (3, 4)).flops == 12


def test_bytes_count_what_is_read_and_written():
    assert cost(jnp.sin, (3, 4)).bytes == 2 * 12 * 4
    assert cost(jnp.sin, (3, 4), dtype=jnp.bfloat16).bytes == 2 * 12 * 2
    write = lambda pool, row: lax.dynamic_update_slice(pool, row, (5, 0))
    assert cost(write, (1000, 4), (1, 4)).bytes < 100
    assert cost(lambda table: table[jnp.array([3, 7])], (1000, 4)).bytes < 1000


def test_bodies_are_multiplied_out():
    once = cost(lambda x: jnp.tanh(x @ x), (8, 8)).flops
    step = lambda x, _: (jnp.tanh(x @ x), None)
    assert cost(lambda x: lax.scan(step, x, length=7)[0], (8, 8)).flops == 7 * once
    nested = lambda x: lax.scan(lambda y, _: (lax.scan(step, y, length=3)[0], None), x, length=5)[0]
    assert cost(nested, (8, 8)).flops == 15 * once


@pytest.mark.parametrize(("start", "stop", "trips"), [(0, 7, 7), (2, 7, 5), (7, 2, 0)])
def test_counted_while_loops_are_multiplied_out(start, stop, trips):
    def fn(x):
        return lax.while_loop(lambda c: c[0] < stop, lambda c: (c[0] + 1, c[1] @ x), (start, x))

    graph = read(fn, jax.ShapeDtypeStruct((8, 8), jnp.float32))
    for _ in range(2):
        total = graph_cost(graph)
        assert total.flops == trips * (2 * 8**3 + 2) and not total.is_lower_bound
        simplify(graph)


def test_a_loop_of_unknown_length_is_a_lower_bound():
    total = cost(lambda x: lax.while_loop(lambda y: y.sum() < 10, lambda y: y * 2, x), (8,))
    assert total.is_lower_bound and total.flops == 8 + 1 + 8
    total = cost(lambda x: lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] - 1, c[2]), (0, 9, x)), (8,))
    assert total.is_lower_bound


def test_a_conditional_costs_its_dearest_branch():
    fn = lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x + 1, x)
    assert cost(fn, (8, 8)).flops == 2 * 8**3 + 1


def test_functions_with_derivatives_of_their_own_cost_what_they_do():
    product = jax.custom_jvp(lambda x: x @ x)
    product.defjvp(lambda primals, tangents: (product(*primals), tangents[0]))
    kept, _ = trace(product, jax.ShapeDtypeStruct((8, 8), jnp.float32), keep=compat.CUSTOM_DERIVATIVES)
    assert names(kept) == {"custom_jvp_call": 1}
    assert graph_cost(kept) == cost(lambda x: x @ x, (8, 8))
