"""Fills a module's parameters from named tensors, and names a module's parameters for writing.

Knows no family: the table is handed in. The one idea: the module is built abstractly, so no random initialisation ever
runs, and one leaf at a time is read, turned, cast and put in its place, so that host memory holds one leaf beside the
model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastgpt_jax.checkpoint.family import Family, Tensor
from fastgpt_jax.checkpoint.tensors import NamedTensors
from fastgpt_jax.errors import UserError

Leaf = TypeVar("Leaf")
_NUM_NAMED = 3  # How many tensors an error names before it counts the rest.


def load_module(family: Family, config: Any, tensors: NamedTensors, where: str) -> nnx.Module:
    """Builds the family's module with parameters from the file, each cast to the module's dtype.

    Args:
      where: The folder, for messages.

    Raises:
      UserError: Tensors are missing, left over or of another shape.
    """
    abstract = nnx.eval_shape(lambda: family.module(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    wanted = list(named_leaves(family.tensors, nnx.to_flat_state(state)))
    names = _names_in_file(family, [tensor.name for _, tensor, _ in wanted], tensors, where)
    parts = parts_of_tensors((tensor, variable.get_value()) for _, tensor, variable in wanted)
    loaded = []
    for path, tensor, variable in wanted:
        widths = [leaf.shape[-1] for leaf in parts[tensor.name]]
        leaf = _read_leaf(tensors, names[tensor.name], tensor, variable.get_value(), widths, where)
        loaded.append((path, variable.replace(leaf)))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def named_leaves(
    table: Mapping[str, Tensor], flat_state: Iterable[tuple[tuple[Any, ...], Any]]
) -> Iterator[tuple[tuple[Any, ...], Tensor, Any]]:
    """Yields the path, the tensor (with its layer filled in) and the variable of every parameter."""
    for path, variable in flat_state:
        template = ".".join("{}" if isinstance(key, int) else str(key) for key in path)
        entry = table[template]
        layers = [key for key in path if isinstance(key, int)]
        yield path, dataclasses.replace(entry, name=entry.name.format(*layers)), variable


def parts_of_tensors(parameters: Iterable[tuple[Tensor, Leaf]]) -> dict[str, list[Leaf]]:
    """The parameters that make up each tensor of the file, in their order there; most tensors are one parameter."""
    found: dict[str, dict[int, Leaf]] = {}
    for tensor, leaf in parameters:
        found.setdefault(tensor.name, {})[tensor.part] = leaf
    return {name: [parts[part] for part in sorted(parts)] for name, parts in found.items()}


def _names_in_file(family: Family, wanted: list[str], tensors: NamedTensors, where: str) -> dict[str, str]:
    """The spelling in the file of each wanted name; every other tensor must be one that the family ignores."""
    has_prefix = any(name.startswith(family.prefix) for name in tensors.names)
    strip: Callable[[str], str] = (lambda name: name) if has_prefix else (lambda n: n.removeprefix(family.prefix))
    names = {name: strip(name) for name in wanted}
    missing = sorted(set(names.values()) - tensors.names)
    if missing:
        raise UserError(f"{where} lacks {_list(missing)}; its weights do not belong to its config.json")
    prefix = "" if has_prefix else family.prefix
    ignored = re.compile("|".join(family.ignored))
    extra = tensors.names - set(names.values())
    extra = sorted(name for name in extra if not ignored.fullmatch(name) and not ignored.fullmatch(prefix + name))
    if extra:
        raise UserError(
            f"{where} holds {_list(extra)}, which {family.architectures[0]} with this config.json does not have"
        )
    return names


def _read_leaf(
    tensors: NamedTensors, name: str, tensor: Tensor, leaf: jax.ShapeDtypeStruct, widths: Sequence[int], where: str
) -> jax.Array:
    """Args: widths: The last dimension of each of the parameters that the tensor holds."""
    values = tensors.read(name)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise UserError(
            f"{where}: tensor {name} has dtype {tensors.dtype_name(name)}; only float tensors can be loaded, "
            "so dequantize the checkpoint first"
        )
    expected = (*leaf.shape[:-1], sum(widths))
    expected = expected[::-1] if tensor.is_transposed else expected
    if values.shape != expected:
        raise UserError(f"{where}: config.json asks for {name} of shape {expected}, the file has {values.shape}")
    values = values.T if tensor.is_transposed else values
    start = sum(widths[: tensor.part])
    values = values[..., start : start + widths[tensor.part]]
    # Always a copy: an alias of the mapped file would crash the process if the file were cut short later.
    return jnp.asarray(np.array(values, dtype=leaf.dtype, order="C"))


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    rest = len(names) - _NUM_NAMED
    return f"{shown} and {rest} more tensors" if rest > 0 else f"{'tensor' if len(names) == 1 else 'tensors'} {shown}"
