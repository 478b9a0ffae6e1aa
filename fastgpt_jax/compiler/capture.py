"""Captures a user's training forward: one request, at capacity and at a shorter length; time is what moves.

Knows how a forward is handed over (a function, a Flax NNX or linen module), which extra arguments it may take, and
that some models accept only certain lengths. What it does not know is what the model computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fastgpt_jax.errors import UserError
from passes import compat
from passes.graph import Graph, Value
from passes.incremental.branches import inline_branches
from passes.incremental.time import Times, mark_dependent, read_times
from passes.reader import trace

Forward = Callable[[Any, Any], Any]

_ARGUMENTS: Mapping[str, str] = {
    "positions": "positions",
    "position_ids": "positions",
    "segment_ids": "segment_ids",
    "segment_positions": "positions",
    "attention_mask": "attention_mask",
    "padding_mask": "attention_mask",
}
_MULTIPLES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Captured:
    """A forward as graphs.

    Attributes:
      forward: `forward(params, tokens) -> logits [1, T, V]`.
      params: Leaves as arrays or `ShapeDtypeStruct`s, in the structure the forward takes.
      graph: The program at capacity; its inputs are the leaves, then the tokens.
      capacity: The length it was traced at, at least the one asked for.
      graph_at: Traces the forward at another length, as it is; raises what the forward raises.
    """

    forward: Forward
    params: Any
    graph: Graph
    times: Times
    capacity: int
    graph_at: Callable[[int], Graph]

    @property
    def token_input(self) -> Value:
        return self.graph.inputs[-1]

    @property
    def vocab_size(self) -> int:
        """Number of logits of a row."""
        return self.graph.outputs[0].shape[-1]


def as_forward(model: Any, params: Any, arguments: Mapping[str, str] | None = None) -> tuple[Forward, Any]:
    """Turns what a user hands over into `(forward(params, tokens), params)`.

    Args:
      model: A function `fn(params, tokens)`, a Flax NNX module called with tokens, or a linen module with `params`.
      params: A pytree of arrays; None for an NNX module, which holds its own.
      arguments: Further argument names of the forward mapped to what they mean: 'positions', 'segment_ids',
        'attention_mask'. The usual names are known.

    Raises:
      UserError: the model is none of these.
    """
    meanings = {**_ARGUMENTS, **(arguments or {})}
    unknown = sorted(set(meanings.values()) - set(_ARGUMENTS.values()))
    if unknown:
        raise UserError(f"arguments must mean one of {sorted(set(_ARGUMENTS.values()))}, got {unknown[0]!r}")
    if isinstance(model, nnx.Module):
        if params is not None:
            raise UserError("an NNX module holds its own parameters; leave params out")
        graphdef, state = nnx.split(model)
        extra = _extra_arguments(type(model).__call__, 2, meanings)
        return lambda p, t: _logits(nnx.merge(graphdef, p)(t, **_fill(extra, t))), nnx.to_pure_dict(state)
    if isinstance(model, linen.Module):
        if params is None:
            raise UserError("a linen module needs its parameters: compile(module, params)")
        extra = _extra_arguments(type(model).__call__, 2, meanings)
        variables = params if isinstance(params, Mapping) and "params" in params else {"params": params}
        return lambda p, t: _logits(model.apply(p, t, **_fill(extra, t))), variables
    if callable(model):
        if params is None:
            raise UserError("a function needs its parameters: compile(fn, params)")
        extra = _extra_arguments(model, 2, meanings)
        return lambda p, t: _logits(model(p, t, **_fill(extra, t))), params
    raise UserError(f"a model is a function fn(params, tokens) or a Flax module, got {type(model).__name__}")


def _extra_arguments(fn: Callable[..., Any], given: int, meanings: Mapping[str, str]) -> dict[str, str]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())[given:]
    except (TypeError, ValueError):
        return {}
    return {p.name: meanings[p.name] for p in parameters if p.name in meanings and p.kind is not p.VAR_KEYWORD}


def _fill(extra: Mapping[str, str], tokens: Any) -> dict[str, Any]:
    """One unpadded request: positions count up, every token is of segment 1 and attended to."""
    values = {
        "positions": lambda: jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape),
        "segment_ids": lambda: jnp.ones(tokens.shape, jnp.int32),
        "attention_mask": lambda: jnp.ones(tokens.shape, jnp.int32),
    }
    return {name: values[meaning]() for name, meaning in extra.items()}


def _logits(out: Any) -> Any:
    """The logits among what a forward returns: an attribute or key `logits`, else the first array."""
    if hasattr(out, "logits"):
        return out.logits
    if isinstance(out, Mapping) and "logits" in out:
        return out["logits"]
    return jax.tree.leaves(out)[0]


def capture(forward: Forward, params: Any, max_model_len: int) -> Captured:
    """Traces a forward at its capacity and at a shorter length.

    Args:
      params: Arrays or `ShapeDtypeStruct`s.
      max_model_len: Longest request in tokens; a model that refuses it is traced at the next multiple it takes.

    Raises:
      NotServable: the program changes with the length.
      UserError: the forward fails at every length tried, or does not return logits [1, T, V].
    """
    flat, tree = jax.tree.flatten(params)
    leaves = [_abstract(x) for x in flat]

    def graph_at(length: int) -> Graph:
        def flat_forward(leaves: Sequence[Any], tokens: Any) -> Any:
            return forward(jax.tree.unflatten(tree, leaves), tokens)

        with compat.captured_associative_scan():
            return trace(flat_forward, leaves, jax.ShapeDtypeStruct((1, length), jnp.int32))[0]

    long_graph, capacity = _first_that_traces(graph_at, _capacities(max_model_len))
    _check_logits(long_graph, capacity)
    taken = {n for x in leaves for n in x.shape}
    short_graph, short = _shorter(graph_at, capacity, taken)
    if short_graph is None:
        short_graph, short = graph_at(capacity), capacity
    times = read_times(short_graph, long_graph, short, capacity)
    mark_dependent(times, long_graph, [False] * len(leaves) + [True])
    inline_branches(long_graph, times)
    return Captured(forward, params, long_graph, times, capacity, graph_at)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    dtype = getattr(x, "dtype", None)
    if dtype is None and not isinstance(x, (bool, int, float, complex)):
        raise UserError(f"parameters must be arrays and numbers, got a {type(x).__name__} among them: {x!r:.80}")
    if dtype is None:  # a Python number, which gives way in dtype promotion
        return jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(jnp.result_type(x)), weak_type=True)
    if not compat.is_extended_dtype(dtype):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(jnp.shape(x), dtype)


def _capacities(max_model_len: int) -> list[int]:
    return list(dict.fromkeys([max_model_len, *(-(-max_model_len // m) * m for m in _MULTIPLES)]))


def _first_that_traces(graph_at: Callable[[int], Graph], lengths: Sequence[int]) -> tuple[Graph, int]:
    first: Exception | None = None
    for length in lengths:
        try:
            return graph_at(length), length
        except Exception as error:  # whatever the user's code raises
            first = first or error
    if first is None:
        raise RuntimeError("no length to trace at")
    raise UserError(f"the forward fails on tokens [1, {lengths[0]}]: {_one_line(first)}") from first


def _one_line(error: Exception) -> str:
    """The exception's type and text, and the user's line it came from."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = text if len(text) <= 300 else text[:300] + " ..."
    frames = compat.error_frames(error)
    return f"{text} ({frames[0][0]}:{frames[0][1]})" if frames else text


def _shorter(graph_at: Callable[[int], Graph], capacity: int, taken: set[int]) -> tuple[Graph | None, int]:
    """A shorter length that the forward takes and that no parameter has as a dimension."""
    wanted = [capacity * 3 // 4, capacity - 1, capacity * 5 // 8, capacity // 2, capacity // 4]
    rounded = [n // m * m for m in (1, *_MULTIPLES) for n in wanted]
    candidates = [n for n in dict.fromkeys(rounded) if 0 < n < capacity]
    candidates.sort(key=lambda n: n in taken)
    for length in candidates[:24]:
        try:
            return graph_at(length), length
        except Exception:  # a length the model refuses; the next one may do
            continue
    return None, capacity


def _check_logits(graph: Graph, length: int) -> None:
    shape = graph.outputs[0].shape
    if len(shape) != 3 or shape[0] != 1 or shape[1] != length:
        raise UserError(f"the forward must return logits [1, T, V] for tokens [1, {length}], got {list(shape)}")
