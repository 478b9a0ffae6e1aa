"""Widens a loaded model with zeros where a dimension does not divide among devices, and only where that is exact.

Knows families by their tables of axes, no mesh. The one idea: the padded model is an ordinary larger model, so nothing
behind it has to know. Two dimensions can be widened: the width of an MLP, whose new columns hold `act(0) = 0` and meet
rows of zeros, and the vocabulary, whose new rows no token names and whose new logits are cut off behind the forward.
Heads cannot: a head of zeros attends all the same, and query heads share KV heads in groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fastgpt_jax.checkpoint.family import Family
from fastgpt_jax.checkpoint.huggingface import LoadedModel
from fastgpt_jax.checkpoint.registry import family_of
from fastgpt_jax.errors import UserError
from sharding.axes import LogicalAxis

_WIDENED = {LogicalAxis.MLP: "intermediate_size", LogicalAxis.VOCAB: "vocab_size"}
_HEADS = {LogicalAxis.HEADS: "num_attention_heads", LogicalAxis.KV_HEADS: "num_key_value_heads"}


@dataclasses.dataclass(frozen=True)
class Padding:
    """What was widened: the axis, its size in the checkpoint and its size now."""

    axis: LogicalAxis
    size: int
    padded_size: int

    def __str__(self) -> str:
        return f"{self.axis} {self.size} -> {self.padded_size}"


def pad_model(loaded: LoadedModel, num_parts: int) -> tuple[LoadedModel, tuple[Padding, ...]]:
    """Widens a model until its MLPs and vocabulary divide into `num_parts`; its logits stay those of the checkpoint.

    Args:
      num_parts: Devices that share the model.

    Returns: The model, as it was where everything divides, and what was widened.

    Raises:
      UserError: The heads do not divide, or a dimension cannot be widened in this family.
    """
    family, config = family_of(loaded.config), loaded.config
    _check_heads(config, num_parts)
    padding = tuple(
        Padding(axis, size, -(-size // num_parts) * num_parts)
        for axis, field in _WIDENED.items()
        if (size := getattr(config, field)) % num_parts
    )
    if not padding:
        return loaded, ()
    padded_config = _widen(config, padding)
    model = _pad(family, loaded.model, padded_config, padding)
    return dataclasses.replace(loaded, model=model, config=padded_config), padding


def _check_heads(config: Any, num_parts: int) -> None:
    for axis, field in _HEADS.items():
        num_heads = getattr(config, field, num_parts)
        if num_heads % num_parts:
            divisors = [n for n in range(1, min(num_heads, num_parts) + 1) if num_heads % n == 0]
            raise UserError(
                f"{axis} must divide among the devices, got {field}={num_heads} and tensor_parallel_size={num_parts}; "
                f"choose one of {', '.join(map(str, divisors))}"
            )


def _widen(config: Any, padding: tuple[Padding, ...]) -> Any:
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    for change in padding:
        if _WIDENED[change.axis] not in fields:
            raise UserError(
                f"{change.axis} {change.size} does not divide and cannot be widened in a {type(config).__name__}; "
                "choose another tensor_parallel_size"
            )
    return dataclasses.replace(config, **{_WIDENED[change.axis]: change.padded_size for change in padding})


def _pad(family: Family, model: nnx.Module, config: Any, padding: tuple[Padding, ...]) -> nnx.Module:
    """The family's module at the larger sizes, each parameter the checkpoint's with zeros behind."""
    vocab = next((change.size for change in padding if change.axis is LogicalAxis.VOCAB), None)
    module = family.module if vocab is None else _cut_vocabulary(family.module, vocab)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    changes = {change.axis: change for change in padding}
    padded = []
    for path, variable in nnx.to_flat_state(state):
        template = ".".join("{}" if isinstance(key, int) else str(key) for key in path)
        leaf, wanted = leaves[path].get_value(), variable.get_value().shape
        padded.append((path, variable.replace(_pad_leaf(template, leaf, wanted, family.axes[template], changes))))
    return nnx.merge(graphdef, nnx.from_flat_state(padded))


def _pad_leaf(
    path: str,
    leaf: Any,
    wanted: tuple[int, ...],
    axes: tuple[LogicalAxis | None, ...],
    changes: Mapping[LogicalAxis, Padding],
) -> Any:
    for axis, size, padded_size in zip(axes, leaf.shape, wanted, strict=True):
        change = changes.get(axis) if axis is not None else None
        expected = (change.size, change.padded_size) if change is not None else (size, size)
        if (size, padded_size) != expected:  # several matrices fused into one, so zeros behind are not zeros of each
            raise UserError(
                f"{', '.join(map(str, changes.values()))}: {path} of shape {tuple(leaf.shape)} cannot be widened with "
                "zeros; choose a tensor_parallel_size that divides it"
            )
    return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, wanted, strict=True)])


def _cut_vocabulary(module: Any, vocab_size: int) -> Any:
    """The module with the logits of the first `vocab_size` tokens only; its parameters keep their paths."""

    class CutVocabulary(module):
        def __call__(self, tokens: Any) -> Any:
            return super().__call__(tokens)[..., :vocab_size]

    return CutVocabulary
