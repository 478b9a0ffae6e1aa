import jax
import jax.numpy as jnp
import pytest
from jax import lax

from passes import compat
from passes.cost import Cost, graph_cost, step_cost
from passes.ops.dequantize import dequantize
from passes.ops.quantized_dot import quantized_dot
from passes.quantization.packing import XLA
from passes.quantization.schemes import SCHEMES, quantize
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


@pytest.mark.parametrize(
    ("scheme", "stored"),
    [
        ("w8a16", 48 * 64 + 48 * 4),  # a byte a weight, a float32 a channel
        ("w4a16", 48 * 32 + 48 * 2 * 2),  # half a byte a weight, a bfloat16 for 32 of them
        ("w4a8", 48 * 32 + 48 * 2 * 2),
    ],
)
def test_a_product_with_quantized_weights_moves_what_is_stored(scheme, stored):
    rows, size, channels = 8, 64, 48
    qvalue, scale = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in packed(channels, size, SCHEMES[scheme]))
    x, origin = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, size), (channels, size)))
    product = lambda x, q, s, *origin: quantized_dot(x, q, s, *origin, scheme=SCHEMES[scheme], packing=XLA)
    found = graph_cost(read(product, x, qvalue, scale))
    assert found.bytes == stored + 4 * rows * size + 4 * rows * channels
    assert graph_cost(read(product, x, qvalue, scale, origin)) == found, "only gradients read what was quantized"
    dot = 2 * rows * size * channels
    scaling = channels * size if SCHEMES[scheme].group_size else rows * channels
    assert found.flops >= dot + scaling
    assert found.flops < dot + 10 * (channels + rows) * size


def packed(channels, size, scheme):
    qvalue, scale = quantize(jnp.ones((channels, size)), scheme)
    return XLA.pack(qvalue, scheme), scale


def test_rows_that_are_looked_up_are_read_as_they_are_stored():
    scheme = SCHEMES["w4a16"]
    qvalue, scale = packed(3, 64, scheme)
    floats = lambda q, s: dequantize(q, s, scheme=scheme, packing=XLA, size=64, dtype=jnp.float32)
    assert graph_cost(read(floats, qvalue, scale)).bytes == 3 * (32 + 4) + 3 * 64 * 4


def test_a_step_does_not_pay_for_what_parameters_determine():
    graph = read(lambda w, x: x @ jnp.tanh(w.T), *[jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 2)
    assert step_cost(graph) == graph_cost(graph)
    graph.inputs[0].path = "w"
    assert step_cost(graph) == cost(jnp.matmul, (8, 8), (8, 8))
