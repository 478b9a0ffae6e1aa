"""What stands in the place of a quantized product or look-up: functions of its other operand and what is stored.

Knows no rule and no graph. The one idea: activations are brought into the order of the stored weight, and the result
into that of the operation, so that all layouts are one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jax import lax

from passes.graph import Value
from passes.ops.dequantize import dequantize
from passes.ops.quantized_dot import quantized_dot
from passes.quantization.packing import Packing
from passes.quantization.schemes import Scheme
from passes.quantization.sites import Site
from passes.quantization.views import Factor, Part, in_root_order

Replacement = tuple[Callable[..., Any], Value]
"""A function of the operand that is no weight, followed by what is stored of the weight; and that operand."""


def product(site: Site, scheme: Scheme, packing: Packing) -> Replacement:
    """The product of a site as a `quantized_dot`."""
    return product_in_rows(site, partial(quantized_dot, scheme=scheme, packing=packing))


def product_in_rows(site: Site, multiply: Callable[..., Any]) -> Replacement:
    """The product of a site by `multiply(x [*batch, ..., K], *stored, num_batch=, precision=, dtype=)`."""
    op, view = site.op, site.view
    contracted, batch = op.params["dimension_numbers"]
    taken = (*contracted[site.operand], *batch[site.operand])
    channels = [view.operand_dims[d] for d in range(site.weight.aval.ndim) if d not in taken]
    to_rows, num_batch, num_free = activations_as_rows(site)
    to_result = _channels_to_result(
        op.result.shape,
        num_batch,
        num_free,
        in_root_order(view, Part.FREE),
        channels,
        is_weight_first=site.operand == 0,
    )
    dtype, precision = op.result.dtype, op.params["precision"]

    def fn(x: Any, *stored_weight: Any) -> Any:
        return to_result(multiply(to_rows(x), *stored_weight, num_batch=num_batch, precision=precision, dtype=dtype))

    return fn, op.operands[1 - site.operand]


def activations_as_rows(site: Site) -> tuple[Callable[[Any], Any], int, int]:
    """Brings the activations of a product into `[*batch, *free, K]`, K in the order of the stored weight.

    Returns: A function that does, and the numbers of batch and of free dimensions.
    """
    contracted, batch = site.op.params["dimension_numbers"]
    of_weight, of_x = contracted[site.operand], list(contracted[1 - site.operand])
    x, x_batch = site.op.operands[1 - site.operand], batch[1 - site.operand]
    x_free = [d for d in range(x.aval.ndim) if d not in of_x and d not in x_batch]
    wanted = in_root_order(site.view, Part.CONTRACTED)
    split: list[int] = []
    place: dict[Any, int] = {}
    for d, size in enumerate(x.shape):
        if d in of_x:
            for factor in site.view.operand_dims[of_weight[of_x.index(d)]]:
                place[factor] = len(split)
                split.append(factor.size)
        else:
            place[d] = len(split)
            split.append(size)
    order = [place[d] for d in (*x_batch, *x_free)] + [place[factor] for factor in wanted]
    shape = (*(x.shape[d] for d in (*x_batch, *x_free)), math.prod(f.size for f in wanted))
    return lambda x: _permuted(x, split, order, shape), len(x_batch), len(x_free)


def _channels_to_result(
    shape: Sequence[int],
    num_batch: int,
    num_free: int,
    found: Sequence[Factor],
    wanted: Sequence[Sequence[Factor]],
    *,
    is_weight_first: bool,
) -> Callable[[Any], Any]:
    """From `[*batch, *free, O]` to the result of the product, whose channels are dimensions of the weight."""
    before = num_batch + num_free
    channels = [before + list(found).index(factor) for factors in wanted for factor in factors]
    leading, free = list(range(num_batch)), list(range(num_batch, before))
    order = leading + (channels + free if is_weight_first else free + channels)

    def to_result(out: Any) -> Any:
        return _permuted(out, [*out.shape[:before], *(f.size for f in found)], order, shape)

    return to_result


def _permuted(x: Any, split: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Any:
    """Reshape, transpose, reshape; none of them where nothing changes."""
    x = x if tuple(split) == x.shape else x.reshape(tuple(split))
    x = x if list(order) == sorted(order) else lax.transpose(x, tuple(order))
    return x if tuple(shape) == x.shape else x.reshape(tuple(shape))


def rows_of_table(site: Site, scheme: Scheme, packing: Packing) -> Replacement:
    """The look-up as a function of its indices and what is stored of its table."""
    op, view = site.op, site.view
    numbers, params = op.params["dimension_numbers"], op.params
    (axis,) = numbers.start_index_map
    dims = [view.operand_dims[d] for d in range(op.operands[0].aval.ndim) if d != axis]
    found = in_root_order(view, Part.CONTRACTED)
    num_batch = op.result.aval.ndim - len(numbers.offset_dims)
    size, dtype, result_shape = math.prod(f.size for f in found), op.result.dtype, op.result.shape
    inner_shape = [math.prod(f.size for f in factors) for factors in dims]

    def rows(table: Any, indices: Any, fill_value: Any) -> Any:
        return lax.gather(
            table,
            indices,
            lax.GatherDimensionNumbers(offset_dims=(num_batch,), collapsed_slice_dims=(0,), start_index_map=(0,)),
            (1, table.shape[1]),
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=fill_value,
        )

    def fn(indices: Any, qvalue: Any, scale: Any, *origin: Any) -> Any:
        # Rows outside the table are finite numbers times the fill value, NaN or 0, which is that value again.
        fill = params["fill_value"]
        taken = [rows(qvalue, indices, 0), rows(scale, indices, fill), *(rows(w, indices, fill) for w in origin)]
        out = dequantize(*taken, scheme=scheme, packing=packing, size=size, dtype=dtype)
        order = [*range(num_batch), *(num_batch + found.index(f) for factors in dims for f in factors)]
        batch = out.shape[:num_batch]
        out = _permuted(out, [*batch, *(f.size for f in found)], order, (*batch, *inner_shape))
        rest = [d for d in range(len(result_shape)) if d not in numbers.offset_dims]
        at = {d: i for i, d in enumerate([*rest, *numbers.offset_dims])}
        return _permuted(out, out.shape, [at[d] for d in range(len(result_shape))], result_shape)

    return fn, op.operands[1]
