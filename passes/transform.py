"""`passes.apply`: a pipeline as a transformation of functions, to be composed with `jit`, `grad` and `vmap`.

The function is traced once for each abstract signature, its graph rewritten, and every call replays the graph through
JAX; what JAX sees are ordinary operations on ordinary tracers. Functions with derivative rules of their own
(`jax.custom_jvp`, `jax.custom_vjp`) stay whole, so that a gradient is what the user wrote; passes do not look into
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from passes import compat
from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.reader import trace
from passes.registry import PASSES, Pass, parse_pipeline
from passes.replay import evaluate


def apply(
    fn: Callable[..., Any],
    pipeline: str,
    *,
    registry: Mapping[str, Pass] = PASSES,
    options: PassOptions = PassOptions(),
    parameters: Sequence[int] = (0,),
) -> Callable[..., Any]:
    """Returns `fn` rewritten by a pipeline.

    Args:
      fn: A function of pytrees of arrays; it must not close over values that are being traced.
      pipeline: Names of passes separated by commas, in order.
      parameters: Positions of the arguments that hold parameters, for passes that treat these apart; their leaves are
        known by their paths in the argument.

    Returns: A function of the same signature and result.

    Raises:
      ValueError: `pipeline` names an unknown pass.
    """
    manager = PassManager(parse_pipeline(pipeline, registry), options)
    programs: dict[Hashable, _Program] = {}

    @functools.wraps(fn)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        avals = [compat.abstract(leaf) for leaf in leaves]
        key = (tree, tuple((a.shape, a.dtype, a.weak_type) for a in avals))
        program = programs.get(key)
        if program is None:
            abstract_args, abstract_kwargs = jax.tree.unflatten(tree, avals)
            program = programs[key] = _rewrite(fn, manager, parameters, abstract_args, abstract_kwargs)
        outputs = zip(evaluate(program.graph, leaves), program.is_weak, strict=True)
        return jax.tree.unflatten(
            program.out_tree, [compat.with_weak_type(jnp.asarray(x), weak) for x, weak in outputs]
        )

    return rewritten


@dataclass(frozen=True)
class _Program:
    """A rewritten graph, the structure of its result, and which leaves of it are weakly typed."""

    graph: Graph
    is_weak: tuple[bool, ...]
    out_tree: Any


def _rewrite(
    fn: Callable[..., Any], manager: PassManager, parameters: Sequence[int], args: Any, kwargs: Any
) -> _Program:
    graph, out_tree = trace(lambda args, kwargs: fn(*args, **kwargs), args, kwargs, keep=compat.CUSTOM_DERIVATIVES)
    name_parameters(graph, args, parameters)
    is_weak = tuple(getattr(value.aval, "weak_type", False) for value in graph.outputs)
    manager.run(graph)
    return _Program(graph, is_weak, out_tree)


def name_parameters(graph: Graph, args: Sequence[Any], parameters: Sequence[int]) -> None:
    """Gives the inputs of a traced `fn(*args, ...)` that are leaves of its parameters their paths."""
    inputs = iter(graph.inputs)
    for number, arg in enumerate(args):
        for path, value in zip(leaf_paths(arg), inputs, strict=False):
            value.path = path if number in parameters else None


def leaf_paths(tree: Any) -> list[str]:
    """The name of each leaf, such as `layers.0.attention.query.kernel`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
