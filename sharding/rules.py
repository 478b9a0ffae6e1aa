"""Path rules: from the name of a parameter to what its dimensions mean, and from that to a `PartitionSpec`.

Knows no model and no graph. The one idea: two small tables in sequence, path to logical axes and logical axis to mesh
axis, so that a family says once what its dimensions mean and a mesh decides alone what is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from jax.sharding import PartitionSpec

from sharding.axes import LogicalAxis, MeshAxis
from sharding.errors import DivisibilityError, ShardingError

Axes = tuple[LogicalAxis | None, ...]
"""What each dimension of an array means; None for one that must stay whole."""

TENSOR_PARALLEL: Mapping[LogicalAxis, MeshAxis | None] = MappingProxyType(
    {
        LogicalAxis.VOCAB: MeshAxis.TENSOR,
        LogicalAxis.HEADS: MeshAxis.TENSOR,
        LogicalAxis.KV_HEADS: MeshAxis.TENSOR,
        LogicalAxis.MLP: MeshAxis.TENSOR,
        LogicalAxis.EXPERTS: MeshAxis.TENSOR,
        LogicalAxis.EMBED: None,
        LogicalAxis.HEAD_DIM: None,
        LogicalAxis.LAYERS: None,
    }
)
"""Column-parallel into heads and MLP, row-parallel out of them: one all-reduce behind each."""


@dataclass(frozen=True)
class Assignment:
    """Where a set of arrays goes.

    Attributes:
      specs: The spec of every array, by its path.
      unmatched: Paths that no rule names; they are replicated.
    """

    specs: Mapping[str, PartitionSpec]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """How the arrays of one model are cut.

    Attributes:
      paths: Pairs of a regular expression, matched against the whole path (`layers.0.mlp.up.kernel`), and what the
        dimensions mean. The first that matches wins.
      units: How many units a logical axis holds, where a dimension must be cut between units: a dimension of N heads
        of H numbers has size N * H and divides by any divisor of N only.
      table: The mesh axis that a logical axis is cut along; None for whole.
    """

    paths: tuple[tuple[str, Axes], ...]
    units: Mapping[LogicalAxis, int] = field(default_factory=dict)
    table: Mapping[LogicalAxis, MeshAxis | None] = field(default_factory=lambda: TENSOR_PARALLEL)

    def axes_of(self, path: str) -> Axes | None:
        """What the dimensions of a parameter mean; None where no rule names it."""
        return next((axes for pattern, axes in self.paths if re.fullmatch(pattern, path)), None)

    def spec_of(self, path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
        """The spec of one parameter; replicated where no rule names it.

        Args:
          sizes: The size of each mesh axis.

        Raises:
          DivisibilityError: A dimension does not divide among the devices of its mesh axis.
          ShardingError: The rule is for another number of dimensions.
        """
        axes = self.axes_of(path)
        if axes is None:
            return PartitionSpec()
        if len(axes) != len(shape):
            raise ShardingError(
                f"the rule for {path} names {len(axes)} dimensions, and it has shape {tuple(shape)}; "
                "name every dimension, with None for one that stays whole"
            )
        return self._spec(path, shape, axes, sizes)

    def cache_spec(self, name: str, row: Sequence[int], num_leading: int, sizes: Mapping[str, int]) -> PartitionSpec:
        """The spec of a pool of cached rows: cut between KV heads where a row has them, else replicated.

        The KV heads are the first dimension of a row that is as large as their number, or one that holds them and
        their width merged.

        Args:
          row: Shape of one token's row.
          num_leading: Dimensions of the pool before the row: layers, pages, tokens of a page.
        """
        axes: list[LogicalAxis | None] = [None] * len(row)
        heads = self.units.get(LogicalAxis.KV_HEADS)
        if heads is not None:
            merged = heads * self.units.get(LogicalAxis.HEAD_DIM, 1)
            found = next((i for size in (heads, merged) for i, n in enumerate(row) if n == size), None)
            if found is not None:
                axes[found] = LogicalAxis.KV_HEADS
        if not any(axes):
            return PartitionSpec()
        spec = self._spec(name, row, axes, sizes)
        return PartitionSpec(*[None] * num_leading, *spec) if any(spec) else PartitionSpec()

    def assign(self, shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> Assignment:
        """The specs of all parameters, and which of them no rule names."""
        specs = {path: self.spec_of(path, shape, sizes) for path, shape in shapes.items()}
        return Assignment(specs, tuple(path for path in shapes if self.axes_of(path) is None))

    def _spec(self, path: str, shape: Sequence[int], axes: Iterable[LogicalAxis | None], sizes: Mapping[str, int]):
        entries: list[str | None] = []
        for axis, size in zip(axes, shape, strict=True):
            mesh_axis = None if axis is None else self.table.get(axis)
            if axis is None or mesh_axis is None or sizes.get(mesh_axis, 1) == 1:
                entries.append(None)
                continue
            self._check_divides(path, axis, size, mesh_axis, sizes[mesh_axis])
            entries.append(str(mesh_axis))
        if len(set(filter(None, entries))) < len(list(filter(None, entries))):
            raise ShardingError(f"two dimensions of {path} {tuple(shape)} would be cut along one mesh axis: {entries}")
        return PartitionSpec(*entries) if any(entries) else PartitionSpec()

    def _check_divides(self, path: str, axis: LogicalAxis, size: int, mesh_axis: MeshAxis, num_parts: int) -> None:
        units = self.units.get(axis, size)
        if size % units:
            raise ShardingError(f"{path} holds {units} {axis} in a dimension of {size}, which is no multiple")
        if units % num_parts == 0:
            return
        divisors = ", ".join(str(n) for n in range(1, min(units, num_parts) + 1) if units % n == 0)
        raise DivisibilityError(
            f"{axis} of {path} must divide among the {num_parts} devices of mesh axis {mesh_axis}, got {units}; "
            f"choose a size that divides it ({divisors})"
        )


def rules_of_templates(templates: Mapping[str, Axes], units: Mapping[LogicalAxis, int]) -> Rules:
    """Rules from paths in which `{}` stands for the number of a layer."""
    paths = tuple((re.escape(path).replace(r"\{\}", r"\d+"), axes) for path, axes in templates.items())
    return Rules(paths, units)


def names_of_spec(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """A spec as plain data: for each dimension the mesh axes it is cut along."""
    return tuple(
        () if entry is None else (str(entry),) if isinstance(entry, str) else tuple(map(str, entry)) for entry in spec
    )


def spec_of_names(names: Any) -> PartitionSpec:
    """The inverse of `names_of_spec`; takes lists too, as JSON gives them.

    Raises:
      ShardingError: This is no list of lists of mesh axes.
    """
    known = set(MeshAxis)
    for axes in names if isinstance(names, (list, tuple)) else [names]:
        if not isinstance(axes, (list, tuple)) or not all(isinstance(axis, str) and axis in known for axis in axes):
            raise ShardingError(f"a partition spec lists mesh axes ({', '.join(MeshAxis)}) by dimension, got {names!r}")
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else tuple(axes) for axes in names))
