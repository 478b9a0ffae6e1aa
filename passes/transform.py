"""`passes.apply`: a pipeline as a transformation of functions, to be composed with `jit`, `grad` and `vmap`.

The function is traced once for each abstract signature, its graph rewritten, and every call replays the graph through
JAX; what JAX sees are ordinary operations on ordinary tracers. Functions with derivative rules of their own
(`jax.custom_jvp`, `jax.custom_vjp`) stay whole, so that a gradient is what the user wrote; passes do not look into
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
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
) -> Callable[..., Any]:
    """Returns `fn` rewritten by a pipeline.

    Args:
      fn: A function of pytrees of arrays; it must not close over values that are being traced.
      pipeline: Names of passes separated by commas, in order.

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
            program = programs[key] = _rewrite(fn, manager, abstract_args, abstract_kwargs)
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


def _rewrite(fn: Callable[..., Any], manager: PassManager, args: Any, kwargs: Any) -> _Program:
    graph, out_tree = trace(lambda args, kwargs: fn(*args, **kwargs), args, kwargs, keep=compat.CUSTOM_DERIVATIVES)
    is_weak = tuple(getattr(value.aval, "weak_type", False) for value in graph.outputs)
    manager.run(graph)
    return _Program(graph, is_weak, out_tree)
