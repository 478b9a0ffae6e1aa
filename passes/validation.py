"""Translation validation: whether one rewrite, by itself, computes what it replaced.

Both graphs get the same random arguments, each operand drawn independently, and run in an interpreter that widens every
float dtype to float64, so that what is compared is the mathematics and not the rounding. An exact rewrite must also
agree bit for bit, operation by operation, in the dtypes as they are; one that states a budget, since it approximates or
is native code that knows no float64, is held in its own dtypes against the wide original, so that its rounding
counts.
Rewrites too large to run are made smaller (`passes.shrink`); what cannot be run is *unvalidated*, with the reason.

It runs with 64-bit types enabled, in a context of its own that nothing else sees.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from passes import compat
from passes.cost import graph_cost
from passes.cse import graph_key
from passes.drop_placement import drop_placement
from passes.expand import expand
from passes.extract import clone
from passes.graph import Graph
from passes.numerics import Numerics
from passes.random_inputs import NUM_TRIALS, narrow, random_arguments, representable
from passes.replay import Widening, evaluate
from passes.rewrite import Rewrite
from passes.shrink import CannotShrink, shrink

REASSOCIATED = 1e-9
"""Relative error of a rewrite that is right, in float64: some thousands of roundings."""
FOLDED = 1e-6
"""Of an exact one: a constant folded in float32 differs from its widened parts."""
MAX_FLOPS = 1_000_000_000
MAX_ELEMENTS = 1 << 25
"""Of all values together; above either limit an instance is made smaller, by this much below it:"""
SHRINKING = 32


@dataclass(frozen=True)
class Validation:
    """The verdict on one rewrite.

    Attributes:
      error: The largest relative error; None where nothing was compared.
      seconds: Time it took; 0 for a verdict that was known.
      where: The place of the largest error, or why nothing was compared; empty for a valid one.
    """

    status: Literal["valid", "invalid", "unvalidated"]
    error: float | None
    seconds: float
    where: str = ""


class InvalidRewrite(RuntimeError):
    """A rewrite computes something else than what it replaced; the message names its rule."""


def validate(before: Graph, after: Graph, numerics: Numerics, *, budget: float | None = None) -> Validation:
    """Runs two closed graphs on the same arguments and compares their outputs.

    Args:
      budget: The largest relative error that a rewrite may make in its own dtypes.

    Raises:
      ValueError: an approximate rewrite states no budget, or an exact one states one.
    """
    if (numerics is Numerics.APPROXIMATE and budget is None) or (numerics is Numerics.EXACT and budget is not None):
        raise ValueError(f"an approximate rewrite states its budget and no exact one does, got {budget} for {numerics}")
    start = time.perf_counter()
    tolerance = budget or (FOLDED if numerics is Numerics.EXACT else REASSOCIATED)
    found = _validate(before, after, numerics, tolerance, is_narrow=budget is not None)
    return Validation(found.status, found.error, time.perf_counter() - start, found.where)


class Validator:
    """Validates each distinct rewrite once: layers that are alike are one.

    Invariant: equal keys mean equal programs, constants compared by their bits; what a key knows by identity it keeps
    alive.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Validation, Rewrite]] = {}

    def check(self, rewrite: Rewrite) -> Validation:
        """The verdict on a rewrite, looked up where its like has been checked."""
        key = (rewrite.numerics, rewrite.budget, graph_key(rewrite.before), graph_key(rewrite.after))
        if key not in self._known:
            found = validate(rewrite.before, rewrite.after, rewrite.numerics, budget=rewrite.budget)
            self._known[key] = found, rewrite
            return found
        found = self._known[key][0]
        return Validation(found.status, found.error, 0.0, found.where)


class Reference:
    """A graph of JAX's own operations with every float widened to float64, compiled once for all trials."""

    def __init__(self, graph: Graph):
        wide = Widening(jnp.float64)
        self._run = compat.quick_jit(lambda *args: evaluate(graph, args, wide))

    def __call__(self, arguments: Sequence[Any]) -> list[np.ndarray]:
        """The outputs; float64 where the graph has a float."""
        with jax.enable_x64(True), jax.ensure_compile_time_eval():
            return [np.asarray(x) for x in self._run(*arguments)]


# ------------------------------------------------------------------------------------------------- the comparison
def _validate(before: Graph, after: Graph, numerics: Numerics, tolerance: float, *, is_narrow: bool) -> Validation:
    if _signature(before) != _signature(after):
        return Validation("invalid", None, 0.0, f"it takes {_signature(before)} and became {_signature(after)}")
    before, after = _runnable(before), _runnable(after)
    reason = _obstacle(before) or _obstacle(after)
    if reason is not None:
        return Validation("unvalidated", None, 0.0, reason)
    try:
        plain = expand(before), expand(after)
        if not _is_small(*plain):
            plain = before, after = shrink(*plain, lambda *pair: _is_small(*pair, share=SHRINKING))
    except CannotShrink as error:
        return Validation("unvalidated", None, 0.0, str(error))
    return _compare(before, after, plain, numerics, tolerance, is_narrow=is_narrow)


def _compare(
    before: Graph, after: Graph, plain: tuple[Graph, Graph], numerics: Numerics, tolerance: float, *, is_narrow: bool
) -> Validation:
    worst, where, num_defined = 0.0, "", 0
    wide_before, wide_after = map(Reference, plain)
    for trial in range(NUM_TRIALS):
        arguments = random_arguments(plain[0], trial)
        if is_narrow:
            arguments = representable(arguments, plain[0])  # what counts is how a rewrite rounds, not its operands
        try:
            expected = wide_before(arguments)
            found = None if is_narrow else wide_after(arguments)
        except Exception as error:  # whatever an operation raises in dtypes it was not written for
            return Validation("unvalidated", None, 0.0, f"does not run in float64: {_one_line(error)}")
        try:
            found = found or _run_narrow(after, arguments)
            place = _differing_bits(before, after, arguments) if numerics is Numerics.EXACT else None
        except Exception as error:
            return Validation("invalid", None, 0.0, f"it does not run: {_one_line(error)}")
        if place is not None:
            return Validation("invalid", None, 0.0, place)
        for i, (want, have) in enumerate(zip(expected, found, strict=True)):
            num_defined += int(np.sum(~_is_nan(want)))
            error, index = relative_error(want, have)
            if not error <= worst:
                worst, where = error, f"output {i} at {list(index)}: {want[index]:.9g} became {have[index]:.9g}"
    if not num_defined:
        return Validation("unvalidated", None, 0.0, "the original gives no number on random arguments")
    if not worst <= tolerance:
        return Validation("invalid", worst, 0.0, f"{where}, a relative error of {worst:.1e} and not {tolerance:.0e}")
    return Validation("valid", worst, 0.0)


def relative_error(want: np.ndarray, have: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """The largest error, in parts of the wanted number or of the usual size of its array, and where it is.

    The usual size leaves out fills such as -1e9, which would hide every error. What was not a number may become one.
    """
    if want.shape != have.shape:
        return np.inf, ()
    if not want.size:
        return 0.0, ()
    a, b = want.astype(np.complex128), have.astype(np.complex128)
    is_float = np.issubdtype(want.dtype, np.inexact) or compat.is_inexact(want.dtype)
    with np.errstate(all="ignore"):
        size = np.abs(a)
        finite = size[np.isfinite(size) & (size > 0)]
        usual = finite[finite <= 1e4 * np.median(finite)] if finite.size else finite
        scale = np.sqrt(np.mean(usual**2)) if usual.size else 1.0
        error = np.where(a == b, 0.0, np.abs(a - b) / np.maximum(size, scale) if is_float else 1.0)
        error = np.where(np.isnan(a), 0.0, np.where(np.isfinite(a) & np.isfinite(b) | (a == b), error, np.inf))
    index = np.unravel_index(int(np.argmax(error)), error.shape)
    return float(error[index]), tuple(int(i) for i in index)


def _differing_bits(before: Graph, after: Graph, arguments: Sequence[Any]) -> str | None:
    """Where two graphs, run operation by operation in their own dtypes, give different bits; NaNs are alike."""
    wanted, found = _run_narrow(before, arguments), _run_narrow(after, arguments)
    for i, (want, have) in enumerate(zip(wanted, found, strict=True)):
        if want.dtype != have.dtype:
            return f"output {i} of {want.dtype} became {have.dtype}"
        if want.tobytes() == have.tobytes():
            continue
        same = _bits(want) == _bits(have)
        same |= _is_nan(want) & _is_nan(have)
        if not same.all():
            index = tuple(int(x) for x in np.argwhere(~same)[0])
            return f"output {i} at {list(index)}: {want[index]} became {have[index]}, and it is called exact"
    return None


def _run_narrow(graph: Graph, arguments: Sequence[Any]) -> list[np.ndarray]:
    """The outputs in the dtypes as they are, operation by operation, at once even while a caller is being traced."""
    with jax.ensure_compile_time_eval():
        return [np.asarray(x) for x in evaluate(graph, narrow(arguments, graph))]


def _bits(x: np.ndarray) -> np.ndarray:
    """Unsigned integers of an array's bits; for complex numbers the array, since they have no such integer."""
    if x.dtype.kind == "c" or x.dtype == bool:
        return x
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(x.shape)


def _is_nan(x: np.ndarray) -> np.ndarray:
    return np.isnan(x.astype(np.complex128)) if compat.is_inexact(x.dtype) else np.zeros(x.shape, bool)


# ------------------------------------------------------------------------------------------------- what can be run
def _signature(graph: Graph) -> str:
    return f"({', '.join(map(repr, graph.inputs))}) -> ({', '.join(map(repr, graph.outputs))})"


def _runnable(graph: Graph) -> Graph:
    copy = clone(graph)
    drop_placement(copy)
    return copy


def _obstacle(graph: Graph) -> str | None:
    """Why a graph cannot be run on made-up numbers, or None."""
    values = [*graph.inputs, *graph.outputs, *(v for _, op in graph.walk() for v in (*op.operands, *op.results))]
    if any(compat.is_extended_dtype(v.dtype) for v in values):
        return "PRNG keys have no wide form"
    for _, op in graph.walk():
        if op.effects or op.name.endswith("callback") or op.name in ("shard_map", "ffi_call"):
            return f"{op.name} cannot be run apart from its program"
        floats = [v for v in (*op.operands, *op.results) if compat.is_inexact(v.dtype)]
        if op.name == "bitcast_convert_type" and floats:
            return "the bits of a float are read, and widening changes them"
    return None


def _is_small(before: Graph, after: Graph, share: int = 1) -> bool:
    for graph in (before, after):
        elements = sum(v.size for v in graph.inputs) + sum(r.size for op in graph.ops for r in op.results)
        if graph_cost(graph).flops > MAX_FLOPS // share or elements > MAX_ELEMENTS // share:
            return False
    return True


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
