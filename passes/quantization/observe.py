"""Statistics of the activations that meet weights: what calibrated quantization needs to know of a model's data.

Knows no scheme. The one idea: every product with a weight gets further results, keyed by the path of its parameter, so
that a model is observed as it was written, before anything merges its weights.
Matches: `dot_general` with one operand that parameters alone determine, in the program and in bodies of `scan`, whose
statistics are stacked. Does not match: bodies of `while` and `cond`. Must run after: nothing. Numerics: exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from passes import compat
from passes.graph import Graph, Value
from passes.quantization.replacements import activations_as_rows
from passes.quantization.scopes import Scope
from passes.quantization.sites import Site, find_sites
from passes.reader import trace
from passes.replay import evaluate
from passes.splice import Splicer
from passes.transform import name_parameters


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SiteStatistics:
    """Of the activations of one product, float32; K runs as in the stored weight (`Canonical`), experts come first.

    Attributes:
      absmax: The largest absolute value.
      channel_absmax: The same of each of the K contracted channels.
      channel_mean_square: Of each channel, over all tokens.
    """

    absmax: Any
    channel_absmax: Any
    channel_mean_square: Any


def observe(fn: Callable[..., Any], parameters: Sequence[int] = (0,)) -> Callable[..., tuple[Any, Mapping]]:
    """A function that also says what the activations were.

    Args:
      fn: A function of pytrees of arrays.
      parameters: Positions of the arguments that hold parameters.

    Returns: A function of the same arguments that returns the result of `fn`, and `SiteStatistics` by `path:dot`; a
      weight that is used again adds `#2`. Inside a loop over layers statistics have a leading axis.
    """

    @functools.wraps(fn)
    def observed(*args: Any) -> tuple[Any, Mapping[str, SiteStatistics]]:
        graph, tree = trace(fn, *jax.tree.map(compat.abstract, args))
        name_parameters(graph, args, parameters)
        num_results = len(graph.outputs)
        keys = add_statistics(graph)
        results = evaluate(graph, jax.tree.leaves(args))
        found = iter(results[num_results:])
        statistics = {key: SiteStatistics(next(found), next(found), next(found)) for key in keys}
        return jax.tree.unflatten(tree, results[:num_results]), statistics

    return observed


def add_statistics(graph: Graph) -> list[str]:
    """Adds three outputs a site, as in `SiteStatistics`; returns the keys of the sites in order."""
    found = [site for site in find_sites(graph) if site.kind == "dot" and site.paths]
    sites = [site for site in found if site.scope.is_in_scans_alone]
    splicer, keys = Splicer(), []
    for site in sites:
        graph.outputs += _observed(site, splicer)
        name = f"{'+'.join(site.paths)}:{site.kind}"
        seen = sum(key == name or key.startswith(f"{name}#") for key in keys)
        keys.append(name if not seen else f"{name}#{seen + 1}")
    return keys


def _observed(site: Site, splicer: Splicer) -> list[Value]:
    """The statistics of one site as values of the program."""
    to_rows, num_batch, num_free = activations_as_rows(site)
    axes = tuple(range(num_batch, num_batch + num_free))

    def fn(x: Any) -> list[Any]:
        rows = to_rows(x).astype(jnp.float32)
        size = jnp.abs(rows)
        return [jnp.max(size), jnp.max(size, axis=axes), jnp.mean(rows * rows, axis=axes)]

    ops, values = splicer.splice(object(), fn, [site.op.operands[1 - site.operand]], site.op.source)
    place = site.scope.graph.ops.index(site.op)
    site.scope.graph.ops[place:place] = ops
    return _out_of_loops(site.scope, values)


def _out_of_loops(scope: Scope, values: list[Value]) -> list[Value]:
    """Values of a body as results of the loops around it, stacked."""
    while scope.owner is not None and scope.parent is not None:
        loop, length = scope.owner, scope.owner.params["length"]
        scope.graph.outputs += values
        first = len(loop.results)
        values = [Value(compat.shaped((length, *v.shape), v.dtype), loop, first + i) for i, v in enumerate(values)]
        loop.results += values
        scope = scope.parent
    return values
