"""Parameters that lie elsewhere: a safetensors file or an Orbax checkpoint put in place of a model's own, by path.

The one idea: the path of a leaf (`layers.0.wq`) is its name in the file; every leaf must be found, with its shape, and
nothing may be left over, so that a checkpoint of another model is never loaded in part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fastgpt_jax.checkpoint.safetensors_io import SafetensorsFile
from fastgpt_jax.errors import UserError


def replace_params(params: Any, path: str) -> Any:
    """Returns `params` with every leaf replaced by the array of its path, in the leaf's own dtype."""
    found = read_arrays(Path(path))
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(key_path, simple=True, separator=".") for key_path, _ in leaves]
    _check_names(path, set(names), set(found))
    return structure.unflatten(
        _convert(path, name, leaf, found[name]) for name, (_, leaf) in zip(names, leaves, strict=True)
    )


def read_arrays(path: Path) -> dict[str, Any]:
    """Reads all arrays of a safetensors file or an Orbax checkpoint folder, by path joined with dots."""
    if path.is_file():
        file = SafetensorsFile(path)
        return {name.replace("/", "."): file.read(name) for name in file.entries}
    if not path.is_dir():
        raise UserError(f"no such parameters: {path} is neither a safetensors file nor an Orbax checkpoint folder")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path.resolve())
    except (ValueError, OSError, KeyError) as error:
        first_line = str(error).strip().splitlines()[:1]
        raise UserError(f"{path} cannot be read as an Orbax checkpoint: {' '.join(first_line)}") from error
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(key_path, simple=True, separator="."): leaf for key_path, leaf in leaves}


def _check_names(path: str, expected: set[str], found: set[str]) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        parts = [f"{what} {_abbreviate(names)}" for what, names in (("lacks", missing), ("adds", unknown)) if names]
        raise UserError(f"{path} does not hold this model's parameters: it {' and '.join(parts)}")


def _abbreviate(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _convert(path: str, name: str, leaf: Any, array: Any) -> jax.Array:
    """Returns the array in the leaf's dtype; a shape or kind of dtype that differs is a UserError."""
    if jnp.shape(leaf) != array.shape:
        raise UserError(f"{path}: {name} has shape {tuple(array.shape)}, the model's has {jnp.shape(leaf)}")
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(array.dtype, jnp.floating) != jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"{path}: {name} has dtype {array.dtype}, the model's has {dtype}")
    return jnp.asarray(array, dtype)
