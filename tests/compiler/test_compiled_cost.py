"""The walk of compiled modules against closed forms: of programs that JAX compiles here, and of modules as text."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastgpt_jax.compiler.compiled_cost import CompiledCost, compiled_cost
from fastgpt_jax.errors import UserError
from fastgpt_jax.kernels.attention.spec import AttentionSpec
from fastgpt_jax.kernels.cpu import library
from fastgpt_jax.kernels.cpu.attention import paged_attention
from passes.masks import KeyLength
from passes.ops.quantized_dot import quantized_dot
from passes.quantization.packing import XLA
from passes.quantization.schemes import SCHEMES

INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def text_of(fn, *args, donate=()) -> str:
    return jax.jit(fn, donate_argnums=donate).lower(*args).compile().as_text() or ""


def cost(fn, *args, donate=()) -> CompiledCost:
    return compiled_cost(text_of(fn, *args, donate=donate))


def test_a_product_counts_its_contraction_and_reads_and_writes_each_array_once():
    found = cost(lambda a, b: a @ b, floats(64, 128), floats(128, 256))
    assert (found.dot_flops, found.elementwise_flops) == (2 * 64 * 128 * 256, 0)
    assert (found.bytes_read, found.bytes_written) == (4 * (64 * 128 + 128 * 256), 4 * 64 * 256)
    assert sum(found.libraries.values()) == 1, "a product is named by what runs it"
    batched = cost(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), floats(3, 8, 16), floats(3, 16, 32))
    assert batched.dot_flops == 2 * 3 * 8 * 16 * 32


def test_a_convolution_counts_its_window_and_its_input_channels():
    convolve = lambda x, k: lax.conv_general_dilated(x, k, (1,), ((2, 0),), dimension_numbers=("NWC", "WIO", "NWC"))
    assert cost(convolve, floats(2, 64, 4), floats(3, 4, 5)).dot_flops == 2 * (2 * 64 * 5) * (3 * 4)


def layers(x, weights):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_loop_counts_its_body_as_often_as_it_runs():
    found = cost(layers, floats(8, 64), floats(12, 64, 64))
    weights = 4 * 12 * 64 * 64
    assert found.dot_flops == 12 * 2 * 8 * 64 * 64 and not found.unknown_loops
    assert found.elementwise_flops >= 12 * 8 * 64
    assert weights <= found.bytes_read < 3 * weights, "a trip reads the layer it takes, not all of them"
    assert sum(found.libraries.values()) == 12


def nested(x, weights):
    return lax.scan(lambda x, w: (lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ w), x), None), x, weights)[0]


def test_nested_loops_multiply():
    assert cost(nested, floats(8, 64), floats(12, 64, 64)).dot_flops == 12 * 5 * 2 * 8 * 64 * 64


def test_trips_are_inferred_where_xla_does_not_say_them():
    text = text_of(nested, floats(8, 64), floats(12, 64, 64))
    bare = re.sub(r', backend_config=\{[^\n]*"known_trip_count"[^\n]*', "", text)
    assert "known_trip_count" in text and "known_trip_count" not in bare
    assert compiled_cost(bare) == compiled_cost(text)


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    loop = lambda n, x: lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]
    found = cost(loop, INDEX, floats(16, 16))
    assert found.dot_flops == 2 * 16**3 and len(found.unknown_loops) == 1 and "while" in found.unknown_loops[0]


def test_a_look_up_reads_the_rows_it_takes():
    found = cost(lambda table, i: table[i] * 2, floats(10_000, 64), jax.ShapeDtypeStruct((3,), jnp.int32))
    assert found.bytes_read == 3 * 64 * 4 + 3 * 4 and found.bytes_written == 3 * 64 * 4


def test_a_fusion_that_reads_through_a_slice_reads_the_slice():
    take = lambda x, i: jnp.sin(lax.dynamic_slice(x, (i, 0), (2, 64))) + 1
    found = cost(take, floats(10_000, 64), INDEX)
    assert found.bytes_read == 2 * 64 * 4 + 4 and found.bytes_written == 2 * 64 * 4
    whole = cost(lambda x, i: take(x, i) + x.sum(), floats(10_000, 64), INDEX)
    assert whole.bytes_read >= 10_000 * 64 * 4


def test_an_update_of_a_donated_buffer_writes_the_update_alone():
    write = lambda pool, row, i: lax.dynamic_update_slice(pool, row, (i, 0))
    shapes = floats(10_000, 64), floats(1, 64), INDEX
    found = cost(write, *shapes, donate=0)
    assert (found.bytes_read, found.bytes_written) == (64 * 4 + 4, 64 * 4)
    kept = cost(write, *shapes)
    assert kept.bytes_written >= 10_000 * 64 * 4, "without donation the pool is copied"


def test_a_scatter_writes_its_updates_and_reads_what_it_adds_to():
    shapes = floats(10_000, 64), floats(3, 64), jax.ShapeDtypeStruct((3,), jnp.int32)
    rows = 3 * 64 * 4
    put = cost(lambda pool, new, i: pool.at[i].set(new), *shapes, donate=0)
    assert rows <= put.bytes_written < 2 * rows and rows <= put.bytes_read < 2 * rows
    add = cost(lambda pool, new, i: pool.at[i].add(new), *shapes, donate=0)
    assert add.bytes_read == put.bytes_read + rows and add.bytes_written == put.bytes_written
    assert add.elementwise_flops == put.elementwise_flops + 3 * 64


def test_a_conditional_costs_its_dearest_branch():
    found = cost(
        lambda p, x: lax.cond(p, lambda x: x @ x, lambda x: x + 1, x),
        jax.ShapeDtypeStruct((), jnp.bool_),
        floats(64, 64),
    )
    assert found.dot_flops == 2 * 64**3


def attend(q, k, v, mask):
    scores = jnp.where(mask, q @ k.T, -jnp.inf)
    return jax.nn.softmax(scores) @ v


def test_a_mask_over_full_scores_saves_nothing():
    length, width, window = 256, 32, 16
    apart = jnp.arange(length)[:, None] - jnp.arange(length)
    shapes = [floats(length, width)] * 3
    full = cost(lambda q, k, v: attend(q, k, v, apart >= 0), *shapes)
    masked = cost(lambda q, k, v: attend(q, k, v, (apart >= 0) & (apart < window)), *shapes)
    assert masked.dot_flops == full.dot_flops == 2 * 2 * length**2 * width
    assert masked.bytes_read >= 0.95 * full.bytes_read


def test_blocks_that_a_loop_visits_count_and_those_it_skips_do_not():
    length, width, block = 256, 32, 32

    def row(q, k, v, i, first, count):
        def visit(j, total):
            start = (first + j) * block
            keys, values = (lax.dynamic_slice(x, (start, 0), (block, width)) for x in (k, v))
            return total + jnp.tanh(q @ keys.T) @ values

        return lax.fori_loop(0, count, visit, jnp.zeros_like(q))

    def blocked(count):
        def fn(q, k, v):
            step = lambda _, i: (None, row(lax.dynamic_slice(q, (i * block, 0), (block, width)), k, v, i, 0, count))
            return lax.scan(step, None, jnp.arange(length // block))[1]

        return cost(fn, *[floats(length, width)] * 3)

    every, two = blocked(length // block), blocked(2)
    assert every.dot_flops == 2 * 2 * length**2 * width
    assert two.dot_flops == every.dot_flops // 4
    assert two.bytes_read < every.bytes_read / 3


def test_collectives_count_their_bytes_by_kind():
    mesh = jax.make_mesh((8,), ("tensor",))
    summed = jax.shard_map(lambda x: lax.psum(x, "tensor"), mesh=mesh, in_specs=P("tensor"), out_specs=P())
    sharded = jax.ShapeDtypeStruct((8, 512), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    found = cost(summed, sharded)
    assert found.collectives == {"all-reduce": 512 * 4}


STARTED = """HloModule started, is_scheduled=true

ENTRY %main (x: bf16[16,128]) -> bf16[128,128] {
  %x = bf16[16,128]{1,0} parameter(0)
  %gather-start = (bf16[16,128]{1,0}, bf16[128,128]{1,0}) all-gather-start(%x), \
replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %gather-done = bf16[128,128]{1,0} all-gather-done(%gather-start)
}
"""

LIBRARY = """HloModule library

ENTRY %main (a: f32[32,64], b: f32[64,16]) -> (f32[32,16], s8[1024]) {
  %a = f32[32,64]{1,0} parameter(0)
  %b = f32[64,16]{1,0} parameter(1)
  ROOT %call = (f32[32,16]{1,0}, /*index=1*/s8[1024]{0}) custom-call(%a, f32[64,16]{1,0} %b), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""


def test_an_asynchronous_collective_counts_once():
    found = compiled_cost(STARTED)
    assert found.collectives == {"all-gather": 128 * 128 * 2} and found.bytes_written == 128 * 128 * 2


def test_a_product_by_a_library_counts_and_is_named():
    found = compiled_cost(LIBRARY)
    assert found.dot_flops == 2 * 32 * 64 * 16 and found.libraries == {"__cublas$gemm": 1}


@pytest.mark.parametrize("text", ["", "module @jit {}", STARTED[:120], STARTED.replace("bf16[16,128]{1,0} ", "what ")])
def test_what_is_no_module_is_refused(text):
    with pytest.raises(UserError, match="HLO module"):
        compiled_cost(text)


def test_a_product_in_int8_reads_what_is_stored():
    """Of the schemes XLA keeps this one narrow on a CPU: the others it widens to float32 in memory."""
    rows, size, channels = 8, 1024, 1024
    scheme = SCHEMES["w8a8"]
    product = lambda x, q, s: quantized_dot(x, q, s, scheme=scheme, packing=XLA)
    weights = jax.ShapeDtypeStruct((channels, size), jnp.int8), floats(channels, 1)
    found = cost(product, floats(rows, size), *weights)
    assert found.dot_flops == 2 * rows * size * channels
    assert found.nbytes < 1.5 * channels * size, "a byte a weight, and little more"


@pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))
def test_native_attention_reads_the_rows_of_its_requests_and_not_the_pools():
    library.register()
    R, T, N, K, H, P, Z, M, S = 2, 1, 4, 2, 8, 64, 4, 5, 18
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    spec = AttentionSpec(0.5, KeyLength(0))

    def fn(query, rows_k, rows_v, positions, pages, pool_k, pool_v, lengths):
        made = (query, rows_k, rows_v, positions, pages, pool_k, pool_v)
        return paged_attention(spec, *made, num_keys=S, leaves=[lengths])

    rows, pools = [floats(R, T, K, H)] * 2, [floats(P, Z, K, H)] * 2
    found = cost(fn, floats(R, T, N, H), *rows, ints(R, T), ints(R, M), *pools, ints(R), donate=(5, 6))
    assert found.dot_flops == 2 * R * T * N * S * (H + H)
    given = 4 * (R * T * N * H + 2 * R * T * K * H + R * T + R * M + R)
    assert found.bytes_read == given + 4 * 2 * R * S * K * H
    assert found.bytes_written == 4 * (R * T * N * H + 2 * R * T * K * H)
    assert found.libraries == {"fastgpt_paged_attention": 1}
