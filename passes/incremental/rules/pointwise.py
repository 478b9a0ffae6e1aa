"""Elementwise operations: row t of the result needs row t of the operands.

Operands may be scalars or have dimensions of size one where the result has time; those have no role.
"""

from __future__ import annotations

from types import MappingProxyType

from passes.incremental.plan import Recipe
from passes.incremental.site import Site

SAME = frozenset(
    {"optimization_barrier", "sharding_constraint", "layout_constraint", "mesh_cast", "reshard", "device_put"}
)

POINTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igammac imag integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul mulhi name ne neg nextafter not
    one_minus_square or polygamma population_count pow pvary random_fold_in real reduce_precision rem round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    xor
    """.split()
)


def _pointwise(site: Site) -> Recipe:
    return Recipe([site.same(u) for u in site.op.operands], lambda ctx, xs: ctx.bind(site, xs))


def _same(site: Site) -> Recipe:
    return Recipe([site.same(site.op.operands[site.value.index])], lambda ctx, xs: xs[0])


def _bitcast(site: Site) -> Recipe:
    if len(site.op.operands[0].shape) != len(site.value.shape):
        raise site.refuse("reinterprets bytes as another number of dimensions")
    return _pointwise(site)


RULES = MappingProxyType(
    {**dict.fromkeys(POINTWISE, _pointwise), **dict.fromkeys(SAME, _same), "bitcast_convert_type": _bitcast}
)
