"""Programs that move pages and carried values: copies on the device, and ways to the host and back.

Knows no model and no policy. The one idea: what moves follows from the cache layout and the types of the state alone,
so the programs are written here once, for the compiler, which stores their machine code, and for a loader that has to
compile them anew.

A call moves `layout.transfer_pages` pages; an entry of `num_pages` or more names none: nothing is written there, and
what is read there is not to be used.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.artifact.cache_layout import CacheLayout
from fastgpt_jax.artifact.executable import ArrayType, Signature, Spec
from fastgpt_jax.artifact.step import FlatStep

COPY_PAGES, READ_PAGES, WRITE_PAGES = "copy-pages", "read-pages", "write-pages"
READ_SLOT, WRITE_SLOT = "read-slot", "write-slot"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A program `(state, weights, inputs) -> (outputs, state)`; what is only read stands where a step has weights.

    Attributes:
      state: Arrays that are replaced and donated.
      read: Arrays that are read and stay.
    """

    name: str
    run: FlatStep
    state: tuple[ArrayType, ...]
    read: tuple[ArrayType, ...]
    inputs: tuple[ArrayType, ...]
    outputs: tuple[ArrayType, ...]

    def signature(self, kept: tuple[int, ...]) -> Signature:
        """Args: kept: Positions of the flat arguments that the machine code takes."""
        return Signature(self.name, self.state, self.read, self.inputs, self.outputs, kept)

    def lower(self, sharding: Callable[[Spec], Any]) -> jax.stages.Lowered:
        """Args: sharding: Of a spec; None where nothing is placed."""
        groups = (self.state, self.read, self.inputs)
        arguments = [
            [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x.spec)) for x in group] for group in groups
        ]
        results = ([sharding(x.spec) for x in self.outputs], [sharding(x.spec) for x in self.state])
        return jax.jit(self.run, donate_argnums=0, out_shardings=results, keep_unused=True).lower(*arguments)


def make_transfers(layout: CacheLayout, state: Sequence[ArrayType]) -> Mapping[str, Transfer]:
    """The programs that move anything; those of pages are missing where there are no pools, those of slots likewise.

    Args:
      state: Types of the arrays that live between steps.
    """
    pools, own = tuple(state[: layout.num_pool_arrays]), tuple(state[layout.num_pool_arrays :])
    axes = _page_axes(layout, pools)
    pages, slot = ArrayType((layout.transfer_pages,), "int32"), ArrayType((), "int32")
    moved_pages = tuple(_resized(x, axis, layout.transfer_pages) for x, axis in zip(pools, axes, strict=True))
    moved_slot = tuple(dataclasses.replace(x, shape=x.shape[1:]) for x in own)

    def copy_pages(state: list[Any], read: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        sources, targets = inputs
        return [], [_write(x, axis, targets, _read(x, axis, sources)) for x, axis in zip(state, axes, strict=True)]

    def read_pages(state: list[Any], read: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        return [_read(x, axis, inputs[0]) for x, axis in zip(read, axes, strict=True)], []

    def write_pages(state: list[Any], read: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        pages, *values = inputs
        return [], [_write(x, axis, pages, v) for x, axis, v in zip(state, axes, values, strict=True)]

    def read_slot(state: list[Any], read: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        return [x[inputs[0]] for x in read], []

    def write_slot(state: list[Any], read: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        slot, *values = inputs
        return [], [x.at[slot].set(v, mode="drop") for x, v in zip(state, values, strict=True)]

    made = []
    if pools:
        made.append(Transfer(COPY_PAGES, copy_pages, pools, (), (pages, pages), ()))
        made.append(Transfer(READ_PAGES, read_pages, (), pools, (pages,), moved_pages))
        made.append(Transfer(WRITE_PAGES, write_pages, pools, (), (pages, *moved_pages), ()))
    if own:
        made.append(Transfer(READ_SLOT, read_slot, (), own, (slot,), moved_slot))
        made.append(Transfer(WRITE_SLOT, write_slot, own, (), (slot, *moved_slot), ()))
    return {transfer.name: transfer for transfer in made}


class MovesPages(abc.ABC):
    """A served model whose pages and carried values can be moved.

    Whatever takes a state and gives one donates the first; nothing is traced or compiled by a model that was loaded.
    """

    @property
    @abc.abstractmethod
    def layout(self) -> CacheLayout:
        """What is kept between steps."""

    @abc.abstractmethod
    def transfer(self, name: str) -> FlatStep:
        """The program of this name."""

    def copy_pages(self, state: list[Any], sources: Any, targets: Any) -> list[Any]:
        """Copies pages, all read before any is written.

        Args:
          sources: i32 [K], `layout.transfer_pages` of them.
          targets: i32 [K]; no page twice.
        """
        count = self.layout.num_pool_arrays
        if not count:
            return state
        _, pools = self.transfer(COPY_PAGES)(state[:count], [], [sources, targets])
        return [*pools, *state[count:]]

    def read_pages(self, state: list[Any], pages: Any) -> list[Any]:
        """Copies of pages i32 [K], on the device."""
        count = self.layout.num_pool_arrays
        return self.transfer(READ_PAGES)([], state[:count], [pages])[0] if count else []

    def write_pages(self, state: list[Any], pages: Any, values: Sequence[Any]) -> list[Any]:
        """Writes what `read_pages` gave into pages i32 [K], no page twice."""
        count = self.layout.num_pool_arrays
        if not count:
            return state
        _, pools = self.transfer(WRITE_PAGES)(state[:count], [], [pages, *values])
        return [*pools, *state[count:]]

    def read_slot(self, state: list[Any], slot: Any) -> list[Any]:
        """A copy of what the request in a slot i32 [] carries, on the device."""
        own = state[self.layout.num_pool_arrays :]
        return self.transfer(READ_SLOT)([], own, [np.asarray(slot, np.int32)])[0] if own else []

    def write_slot(self, state: list[Any], slot: Any, values: Sequence[Any]) -> list[Any]:
        """Writes what `read_slot` gave into a slot i32 []."""
        count = self.layout.num_pool_arrays
        if len(state) == count:
            return state
        _, own = self.transfer(WRITE_SLOT)(state[count:], [], [np.asarray(slot, np.int32), *values])
        return [*state[:count], *own]


def _page_axes(layout: CacheLayout, pools: Sequence[ArrayType]) -> list[int]:
    """Where each array of the pools counts pages: behind the loops over layers."""
    row_dims = []
    for entry in layout.entries:
        if entry.kind == "kv":
            row_dims.append(len(entry.shape))
            row_dims += [len(entry.shape) - 1] if entry.scale_dtype is not None else []
    return [len(x.shape) - dims - 2 for x, dims in zip(pools, row_dims, strict=True)]


def _resized(x: ArrayType, axis: int, size: int) -> ArrayType:
    return dataclasses.replace(x, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))


def _read(x: Any, axis: int, pages: Any) -> Any:
    return jnp.take(x, pages, axis=axis, mode="clip")


def _write(x: Any, axis: int, pages: Any, values: Any) -> Any:
    return x.at[(*[slice(None)] * axis, pages)].set(values, mode="drop")
