"""What differs between JAX versions, in one place; nothing else in this package imports `jax.extend`.

The one idea: the rest of the code sees jaxprs through four questions (what are this equation's regions, how are a
scan's operands divided, which user frame made it, how is it bound again) and never looks at an equation's parameters to
learn them.
Supported: jax 0.10.2, 0.11.2, 0.12.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

Primitive = jex.Primitive
ClosedJaxpr = Any  # 0.11 made `ClosedJaxpr` and `Jaxpr` one class

CALL_PRIMITIVES = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
    "composite": "jaxpr",
}

CUSTOM_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


def is_literal(atom: Any) -> bool:
    """Whether a jaxpr operand is a constant written in place."""
    return isinstance(atom, jex.Literal)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Returns `(jaxpr, consts)` of a closed or an open jaxpr of any supported version."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def called_jaxpr(eqn: Any) -> Any | None:
    """The jaxpr that a call-like equation or operation (jit, remat, custom_jvp ...) stands for, else None."""
    key = CALL_PRIMITIVES.get(eqn.primitive.name)
    return None if key is None else eqn.params.get(key)


def region_jaxprs(eqn: Any) -> tuple[Any, ...]:
    """Bodies of `scan` (1), `while` (condition, body) and `cond` (branches); empty for every other equation."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return (params["jaxpr"],)
    if name == "while":
        return (params["cond_jaxpr"], params["body_jaxpr"])
    if name == "cond":
        return tuple(params["branches"])
    if name == "associative_scan":
        return (params["combine"],)
    return ()


def region_params(eqn: Any) -> dict[str, Any]:
    """Version-independent parameters of an equation with regions.

    Returns: For `scan` num_consts, num_carry, length, reverse, unroll; for `while` cond_nconsts, body_nconsts; else {}.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        if "num_consts" in params:
            num_consts, num_carry = params["num_consts"], params["num_carry"]
        else:
            consts, carry, _ = params["ft_in"].unpack()
            num_consts, num_carry = len(consts), len(carry)
        return {
            "num_consts": num_consts,
            "num_carry": num_carry,
            "length": params["length"],
            "reverse": params["reverse"],
            "unroll": params["unroll"],
        }
    if name == "while":
        return {key: params[key] for key in ("cond_nconsts", "body_nconsts")}
    if name == "associative_scan":
        return {key: params[key] for key in ("num_consts", "axes", "reverse")}
    return {}


def bind(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Applies a primitive with the parameters of an equation; returns its results as a list."""
    bound = primitive.get_bind_params(params)
    subfuns, bound = bound if isinstance(bound, tuple) else ((), bound)
    out = primitive.bind(*subfuns, *operands, **bound)
    return list(out) if primitive.multiple_results else [out]


def apply(primitive: Primitive, *operands: Any, **params: Any) -> Any:
    """What `bind` does, with the results as the primitive itself gives them."""
    out = bind(primitive, operands, params)
    return out if primitive.multiple_results else out[0]


def run_jaxpr(closed: Any, *args: Any) -> list[Any]:
    """Evaluates a closed jaxpr on arrays or tracers."""
    return jex.jaxpr_as_fun(closed)(*args)


def hoist_constants(fn: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]]:
    """Traces `fn` and turns what it closes over into leading arguments.

    Returns: A closed jaxpr without constants, whose first inputs are the constants, and those constants (perhaps
      tracers).
    """
    closed = jax.make_jaxpr(fn)(*args)
    consts = list(closed.consts)
    rest = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in consts]
    jaxpr = open_jaxpr(closed)[0]

    def explicit(*flat: Any) -> list[Any]:
        return jax.core.eval_jaxpr(jaxpr, flat[: len(consts)], *flat[len(consts) :])

    return jax.make_jaxpr(explicit)(*rest, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]), consts


def is_high(jaxpr: Any) -> bool:
    """Whether a jaxpr holds hijax types, which have no plain array form."""
    return bool(getattr(open_jaxpr(jaxpr)[0], "is_high", False))


# --------------------------------------------------------------------------------------- source lines
_LIBRARIES = ("jax", "jaxlib", "flax", "einops", "equinox", "haiku", "optax", "numpy", "jaxtyping", "beartype")


@functools.cache
def _library_prefixes() -> tuple[str, ...]:
    site = {sysconfig.get_paths()[key] for key in ("purelib", "platlib", "stdlib")}
    return tuple(sorted(site)) + ("<",)


def source_scope(frames: Sequence[tuple[str, int]]) -> AbstractContextManager[Any]:
    """Within the block, operations traced from code of ours count as made by these frames of the user's.

    A name scope carries them: it is the one part of an equation's source that a caller may set.
    """
    if not frames:
        return nullcontext()
    return jax.named_scope("frames<" + "|".join(f"{file}:{line}" for file, line in frames[:_MAX_SCOPED_FRAMES]) + ">")


_MAX_SCOPED_FRAMES = 4
_SCOPE = re.compile(r"frames<([^<>]*)>")


def _scoped_frames(source_info: Any) -> list[tuple[str, int]]:
    found = _SCOPE.findall(str(getattr(source_info, "name_stack", "")))
    pairs = [frame.rpartition(":") for frame in found[-1].split("|")] if found else []
    return [(file, int(line)) for file, _, line in pairs]


def user_frames(source_info: Any) -> list[tuple[str, int]]:
    """Frames of the user's code that made an equation, innermost first, as (file, line).

    Frames of JAX, of the layer libraries, of anything else installed as a package and of this compiler are left out; a
    model that is itself installed keeps its frames (only the known libraries are skipped then).
    """
    found = getattr(source_info, "traceback", None)
    frames = [] if found is None else _of_the_user([(f.file_name, f.line_num) for f in found.frames])
    return frames or _scoped_frames(source_info)


def error_frames(error: BaseException) -> list[tuple[str, int]]:
    """Frames of the user's code that an exception came through, innermost first, as (file, line)."""
    return _of_the_user([(f.filename, f.lineno or 0) for f in reversed(traceback.extract_tb(error.__traceback__))])


def _of_the_user(frames: list[tuple[str, int]]) -> list[tuple[str, int]]:
    own = os.path.dirname(os.path.abspath(__file__))
    compiler = os.path.join(os.path.dirname(own), "fastgpt_jax", "compiler")
    inner = []
    for file, line in frames:
        if file.startswith(compiler):  # everything further out called the compiler, and did not write the model
            break
        inner.append((file, line))
    inner = [f for f in inner if not f[0].startswith(own + os.sep)]
    prefixes = _library_prefixes()
    users = [f for f in inner if not f[0].startswith(prefixes)]
    if users:
        return users
    parts = tuple(os.sep + name + os.sep for name in _LIBRARIES)
    return [f for f in inner if not f[0].startswith("<") and not any(p in f[0] for p in parts)]


# --------------------------------------------------------------------------------------- compiling for few runs
def quick_jit(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for programs that run a few times: on CPU without most of LLVM's work, which is most of a compile.

    The arithmetic stays the same operation by operation. Other backends compile as ever.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(fn)
    options: dict[str, bool | int | float | str] = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    if jax.__version_info__ < (0, 11):  # later releases know no other emitters
        options["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(fn, compiler_options=options)


# --------------------------------------------------------------------------------------- primitives of ours
def make_primitive(
    name: str,
    meaning: Callable[..., Any],
    abstract: Callable[..., Any],
    batch: Callable[..., Any] | None = None,
    *,
    multiple_results: bool = True,
) -> Primitive:
    """Makes an operation whose lowering is its meaning in plain `jnp`, with an optional batching rule of its own."""
    primitive = jex.Primitive(name)
    primitive.multiple_results = multiple_results
    setattr(primitive, "meaning", meaning)  # noqa: B010 - an attribute of ours on JAX's object
    primitive.def_impl(meaning)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(meaning, multiple_results=multiple_results))
    if batch is not None:
        batching.primitive_batchers[primitive] = batch
    return primitive


def run_natively(primitive: Primitive, run: Callable[..., Any]) -> Primitive:
    """Lowers an operation of ours, and runs it, as `run(*operands, **params)` in place of its meaning; returns it."""
    primitive.def_impl(lambda *operands, **params: jax.jit(functools.partial(run, **params))(*operands))
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=primitive.multiple_results))
    return primitive


def derive_rules(primitive: Primitive) -> Primitive:
    """Gives an operation of ours the derivative of its meaning, and maps it by mapping its meaning; returns it."""
    meaning = meaning_of(primitive)
    if meaning is None:
        raise ValueError(f"{primitive} has no meaning to derive its rules from")

    def differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
        given = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(functools.partial(meaning, **params), tuple(primals), tuple(given))

    def batch(args: Any, dims: Any, **params: Any) -> Any:
        out = jax.vmap(functools.partial(meaning, **params), in_axes=tuple(dims))(*args)
        return out, jax.tree.map(lambda _: 0, out)

    ad.primitive_jvps[primitive] = differentiate
    batching.primitive_batchers[primitive] = batch
    return primitive


def shaped(shape: Sequence[int], dtype: Any) -> Any:
    """An abstract array, as primitives return from their abstract evaluation."""
    return jax.core.ShapedArray(tuple(shape), dtype)


@contextmanager
def captured_associative_scan() -> Iterator[None]:
    """Within the block `jax.lax.associative_scan` is one operation of ours, however the caller imported it.

    Its log-depth tree of slices hides the recurrence in a jaxpr, so the call itself has to be seen: for the time of a
    capture the function's code is that of `_call_our_associative_scan`. JAX keeps what it traced of a jitted function;
    the block has a context of its own, so that it neither finds what was traced outside nor leaves its own there.
    """
    function = inspect.unwrap(lax.associative_scan)
    stand_in = inspect.unwrap(
        _call_our_associative_scan
    )  # run-time type checks wrap it in a closure, which has no plain code
    original = function.__code__, function.__defaults__, function.__kwdefaults__
    function.__code__, function.__defaults__, function.__kwdefaults__ = (
        stand_in.__code__,
        stand_in.__defaults__,
        stand_in.__kwdefaults__,
    )
    try:
        with _capturing(True):
            yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = original


_capturing = jax.make_user_context(default_value=False)


def _call_our_associative_scan(fn, elems, reverse=False, axis=0):
    # The code runs with the globals of another module, so the name has to be found here.
    from passes.ops.associative_scan import associative_scan  # noqa: PLC0415

    return associative_scan(fn, elems, reverse=reverse, axis=axis)


def is_extended_dtype(dtype: Any) -> bool:
    """Whether a dtype is one of JAX's extended ones (PRNG keys), which NumPy cannot hold."""
    return jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def wrap_key_data(data: Any, dtype: Any) -> Any:
    """PRNG keys of a dtype from the numbers they are made of; other arrays as they are."""
    return jax.random.wrap_key_data(data, impl=dtype._impl.name) if is_extended_dtype(dtype) else data


def literal_array(atom: Any) -> Any:
    """The value of a literal as a NumPy array of its abstract dtype."""
    return np.asarray(atom.val, atom.aval.dtype)


def infer_types(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any] | None:
    """The abstract results of a primitive on abstract operands; None where it has no such rule (`shard_map`).

    Raises:
      TypeError, ValueError: the operands do not fit the primitive.
    """
    try:
        out, _ = primitive.abstract_eval(*operands, **params)
    except NotImplementedError:
        return None
    return list(out) if primitive.multiple_results else [out]


def is_inexact(dtype: Any) -> bool:
    """Whether a dtype is a float or complex one; bfloat16 and float8 are, though their NumPy kind says otherwise."""
    return jax.dtypes.issubdtype(dtype, np.inexact)


def meaning_of(primitive: Primitive) -> Callable[..., Any] | None:
    """The plain `jnp` function that an operation of ours stands for; None for JAX's own."""
    return getattr(primitive, "meaning", None)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type of an array, a tracer or a Python scalar."""
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def with_weak_type(x: Any, is_weak: bool) -> Any:
    """An array with its weak type set; weakly typed arrays give way in dtype promotion."""
    if is_extended_dtype(x.dtype) or abstract(x).weak_type == is_weak:
        return x
    return lax.convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=is_weak, sharding=None)
