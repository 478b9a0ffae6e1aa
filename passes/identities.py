"""Local rules that are exact for every input: an operation that equals one of its operands, or a simpler operation.

Each rule looks at one operation and returns the value it equals, an operation to put in its place, or None. Exact is
bit for bit (the payload of a NaN aside), on NaN, infinities and signed zeros too: `x + 0.0` turns -0.0 into 0.0, so
only `x + -0.0` is `x`; complex products are left alone, for `inf * (1 + 0j)` is NaN. Whether a value may stand for the
result (shape, dtype) is checked by the caller. `RULES` names for each primitive the rules that are tried, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax import lax

from passes import compat
from passes.constants import is_splat, splat
from passes.graph import Op, Value

Rule = Callable[[Op], Value | Op | None]


def _is_complex(op: Op) -> bool:
    return jnp.issubdtype(op.operands[0].dtype, jnp.complexfloating)


def _is_integer(op: Op) -> bool:
    """Integers and booleans, where nothing rounds and zero has no sign."""
    return not compat.is_extended_dtype(op.operands[0].dtype) and not compat.is_inexact(op.operands[0].dtype)


def _other(op: Op, number: float) -> Value | None:
    """The other operand of a commutative operation one of whose operands is `number` everywhere."""
    left, right = op.operands
    if is_splat(right, number):
        return left
    return right if is_splat(left, number) else None


def _add(op: Op) -> Value | None:
    return None if _is_complex(op) else _other(op, 0 if _is_integer(op) else -0.0)


def _sub(op: Op) -> Value | None:
    return op.operands[0] if not _is_complex(op) and is_splat(op.operands[1], 0.0) else None


def _mul(op: Op) -> Value | None:
    return None if _is_complex(op) else _other(op, 1)


def _div(op: Op) -> Value | None:
    return op.operands[0] if not _is_complex(op) and is_splat(op.operands[1], 1) else None


def _max(op: Op) -> Value | None:
    return None if _is_complex(op) else _other(op, int(jnp.iinfo(op.result.dtype).min) if _is_number(op) else -np.inf)


def _min(op: Op) -> Value | None:
    return None if _is_complex(op) else _other(op, int(jnp.iinfo(op.result.dtype).max) if _is_number(op) else np.inf)


def _is_number(op: Op) -> bool:
    return _is_integer(op) and op.operands[0].dtype != np.bool_


def _ones(op: Op) -> int:
    """All bits set."""
    return 1 if op.result.dtype == np.bool_ else int(np.asarray(-1).astype(op.result.dtype))


def _and(op: Op) -> Value | None:
    return _other(op, _ones(op)) or _absorbing(op, 0)


def _or(op: Op) -> Value | None:
    return _other(op, 0) or _absorbing(op, _ones(op))


def _xor(op: Op) -> Value | None:
    return _other(op, 0)


def _absorbing(op: Op, number: int) -> Value | None:
    """The operand that is `number` everywhere, which is then the result."""
    return next((v for v in op.operands if is_splat(v, number) and v.shape == op.result.shape), None)


def _idempotent(op: Op) -> Value | None:
    left, right = op.operands
    return left if left is right else None


def _involution(op: Op) -> Value | None:
    inner = op.operands[0].op
    return inner.operands[0] if inner is not None and inner.name == op.name else None


def _operand(op: Op) -> Value | None:
    """The operand itself; the caller checks that shape and dtype are those of the result."""
    return op.operands[0]


def _select(op: Op) -> Value | None:
    which, *cases = op.operands
    if all(case is cases[0] for case in cases):
        return cases[0]
    choice = splat(which)
    return None if choice is None else cases[int(choice)]


def _convert(op: Op) -> Value | None:
    """A conversion to the same dtype, or to a wider one and back."""
    value = op.operands[0]
    if op.params.get("sharding") is not None:
        return None
    if value.dtype == op.result.dtype:
        return value
    inner = value.op
    if inner is None or inner.name != "convert_element_type" or inner.params.get("sharding") is not None:
        return None
    origin = inner.operands[0]
    return origin if origin.dtype == op.result.dtype and _holds(value.dtype, origin.dtype) else None


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether every value of dtype `narrow` has its own value in dtype `wide`."""
    if compat.is_extended_dtype(wide) or compat.is_extended_dtype(narrow):
        return False
    if jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating):
        w, n = jnp.finfo(wide), jnp.finfo(narrow)
        return w.nmant >= n.nmant and w.maxexp >= n.maxexp and w.minexp <= n.minexp
    for kind in (jnp.signedinteger, jnp.unsignedinteger):
        if jnp.issubdtype(wide, kind) and jnp.issubdtype(narrow, kind):
            return jnp.iinfo(wide).bits >= jnp.iinfo(narrow).bits
    return narrow == np.bool_


def _no_sharding(op: Op) -> bool:
    return op.params.get("sharding") is None


def _transpose(op: Op) -> Value | Op | None:
    permutation, inner = op.params["permutation"], op.operands[0].op
    if tuple(permutation) == tuple(range(len(permutation))):
        return op.operands[0]
    if inner is None or inner.name != "transpose":
        return None
    merged = tuple(inner.params["permutation"][axis] for axis in permutation)
    return _same(op, inner.operands[0], permutation=merged)


def _reshape(op: Op) -> Value | Op | None:
    inner = op.operands[0].op
    if not _no_sharding(op) or op.params.get("dimensions") is not None:
        return None
    if op.operands[0].shape == op.result.shape:
        return op.operands[0]
    if (
        inner is None
        or inner.name != "reshape"
        or not _no_sharding(inner)
        or inner.params.get("dimensions") is not None
    ):
        return None
    return _same(op, inner.operands[0])


def _broadcast(op: Op) -> Value | Op | None:
    inner, dims = op.operands[0].op, op.params["broadcast_dimensions"]
    if not _no_sharding(op) or len(op.operands) != 1:
        return None
    if op.operands[0].shape == op.result.shape and tuple(dims) == tuple(range(len(dims))):
        return op.operands[0]
    if inner is None or inner.name != "broadcast_in_dim" or not _no_sharding(inner) or len(inner.operands) != 1:
        return None
    merged = tuple(dims[d] for d in inner.params["broadcast_dimensions"])
    return _same(op, inner.operands[0], broadcast_dimensions=merged)


def _integer_pow(op: Op) -> Value | None:
    return op.operands[0] if op.params["y"] == 1 else None


def _rev(op: Op) -> Value | None:
    return op.operands[0] if not op.params["dimensions"] else None


def _reduce(op: Op) -> Value | None:
    return op.operands[0] if not op.params["axes"] else None


def _pad(op: Op) -> Value | None:
    return op.operands[0] if all(tuple(config) == (0, 0, 0) for config in op.params["padding_config"]) else None


def _whole_slice(op: Op) -> Value | None:
    """A slice of everything: with the shape equal, starts and strides are trivial; dynamic starts clamp to 0."""
    return op.operands[0] if op.operands[0].shape == op.result.shape else None


def _same(op: Op, operand: Value, **params: object) -> Op:
    """`op` on another operand, with some parameters changed."""
    return Op(op.primitive, [operand], op.params | params, [op.result.aval], source=op.source)


_MIRROR = {"lt": lax.gt_p, "gt": lax.lt_p, "le": lax.ge_p, "ge": lax.le_p}


def mirrored(op: Op) -> Op | None:
    """A comparison with its operands exchanged (`a < b` as `b > a`); None for any other operation."""
    primitive = _MIRROR.get(op.name)
    return None if primitive is None else Op(primitive, op.operands[::-1], op.params, [op.result.aval], (), op.source)


RULES: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {
        "add": (_add,),
        "sub": (_sub,),
        "mul": (_mul,),
        "div": (_div,),
        "max": (_max, _idempotent),
        "min": (_min, _idempotent),
        "and": (_and, _idempotent),
        "or": (_or, _idempotent),
        "xor": (_xor,),
        "neg": (_involution,),
        "not": (_involution,),
        "integer_pow": (_integer_pow,),
        "select_n": (_select,),
        "convert_element_type": (_convert,),
        "copy": (_operand,),
        "copy_p": (_operand,),
        "squeeze": (_whole_slice,),
        "transpose": (_transpose,),
        "reshape": (_reshape,),
        "broadcast_in_dim": (_broadcast,),
        "rev": (_rev,),
        "pad": (_pad,),
        "slice": (_whole_slice,),
        "dynamic_slice": (_whole_slice,),
        "reduce_sum": (_reduce,),
        "reduce_max": (_reduce,),
        "reduce_min": (_reduce,),
        "reduce_prod": (_reduce,),
    }
)
