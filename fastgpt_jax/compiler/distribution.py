"""Where the arrays of a served model lie: on one device, or on a mesh with weights and caches cut by path rules.

Knows no graph. The one idea: only what lives between steps is placed (weights and state); a step's inputs and outputs
are whole on every device, and XLA carries the placement through the derived program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from fastgpt_jax.artifact.executable import ArrayType, Placement, Spec
from fastgpt_jax.checkpoint.registry import family_of
from fastgpt_jax.compiler.program import Program
from fastgpt_jax.errors import UserError
from sharding import LogicalAxis, Rules, ShardingError, make_mesh, mesh_sizes, names_of_spec, rules_of_templates

_UNITS = {
    LogicalAxis.HEADS: "num_attention_heads",
    LogicalAxis.KV_HEADS: "num_key_value_heads",
    LogicalAxis.HEAD_DIM: "head_dim",
}


@dataclass(frozen=True)
class Distribution:
    """A placement of all arrays of a model.

    Attributes:
      placement: None for JAX's default device, to which nothing is committed.
    """

    placement: Placement | None = None
    rules: Rules = Rules(())

    @property
    def mesh_axes(self) -> tuple[tuple[str, int], ...]:
        """Name and size of each mesh axis; empty on the default device."""
        return () if self.placement is None else self.placement.mesh_axes

    @property
    def num_devices(self) -> int:
        return 1 if self.placement is None else len(self.placement.devices)

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(self.mesh_axes)

    def sharding(self, spec: Spec = ()) -> Any:
        """The sharding of a spec, of whole arrays by default; None on the default device."""
        return None if self.placement is None else self.placement.sharding(spec)

    def place_weights(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
        """The parameters where the rules want them.

        Raises:
          UserError: A dimension does not divide among the devices, or a rule does not fit its parameter.
        """
        if self.placement is None:
            # On the device once, since what stays NumPy would travel there in every step.
            return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
        try:
            specs = [self.rules.spec_of(path, x.shape, self._sizes) for path, x in zip(paths, leaves, strict=True)]
        except ShardingError as error:
            raise UserError(str(error)) from error
        return [jax.device_put(x, self.sharding(names_of_spec(s))) for x, s in zip(leaves, specs, strict=True)]

    def cut_of(self, path: str, shape: tuple[int, ...]) -> int | None:
        """The dimension of a parameter that devices share; None for one that each holds whole."""
        spec = names_of_spec(self.rules.spec_of(path, shape, self._sizes))
        return next((d for d, axes in enumerate(spec) if axes), None)

    def notes(self, paths: Sequence[str]) -> dict[str, str]:
        """What a user should know: parameters that no rule names, which every device holds whole."""
        unmatched = [path for path in paths if self.rules.axes_of(path) is None]
        if self.placement is None or not unmatched:
            return {}
        more = f" and {len(unmatched) - 1} more parameters" if len(unmatched) > 1 else ""
        return {"sharding_rules": f"no rule names {unmatched[0]}{more}, so every device holds it whole"}

    def state_specs(self, program: Program) -> list[Spec]:
        """The specs of a program's state, in the order of its leaves: pools by KV heads, what a request owns whole.

        Raises:
          UserError: The KV heads of a pool do not divide among the devices.
        """
        try:
            pools = [
                names_of_spec(self.rules.cache_spec(f"kv{i}", row, len(state.lead) + 2, self._sizes))
                for i, state in enumerate(program.kv_states)
                for row, _ in program.rows(state)
            ]
        except ShardingError as error:
            raise UserError(str(error)) from error
        return [*pools, *[()] * len(program.own_states)]

    def state_shapes(self, program: Program) -> list[jax.ShapeDtypeStruct]:
        """Shapes of a program's state with their shardings."""
        shapes = jax.tree.leaves(jax.eval_shape(program.init_state))
        specs = self.state_specs(program)
        return [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding(spec))
            for x, spec in zip(shapes, specs, strict=True)
        ]

    def init_state(self, program: Program) -> list[Any]:
        """Empty caches, made where they belong."""
        return [jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in self.state_shapes(program)]

    def placed(self, arrays: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """Shapes of arrays, as they lie."""
        return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding(spec_of_array(x))) for x in arrays]

    def whole(self, shapes: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """Shapes of arrays that every device holds whole."""
        return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding()) for x in shapes]


def spec_of_array(array: Any) -> Spec:
    """How an array is cut, as plain data; empty for one that is whole."""
    sharding = getattr(array, "sharding", None)
    return names_of_spec(sharding.spec) if isinstance(sharding, NamedSharding) else ()


def array_type(array: Any) -> ArrayType:
    """Of an array or its shape, as plain data."""
    return ArrayType(tuple(array.shape), str(array.dtype), spec_of_array(array))


def make_distribution(tensor_parallel_size: int, rules: Rules | None) -> Distribution:
    """Takes the first devices there are.

    Raises:
      UserError: There are too few, or no rules say what may be cut.
    """
    if tensor_parallel_size == 1:
        return Distribution()
    mesh = check_devices(tensor_parallel_size)
    if rules is None:
        raise UserError(
            f"tensor_parallel_size={tensor_parallel_size} needs to know what the dimensions of the parameters mean; "
            "give CompileConfig sharding_rules for a model of your own"
        )
    return Distribution(Placement(tuple(mesh.devices.flat), tuple(mesh_sizes(mesh).items())), rules)


def check_devices(tensor_parallel_size: int) -> Mesh:
    """The mesh of so many devices.

    Raises:
      UserError: There are too few.
    """
    try:
        return make_mesh(tensor_parallel_size)
    except ShardingError as error:
        raise UserError(str(error)) from error


def family_rules(model_config: Any) -> Rules:
    """The rules of a model that was loaded from a checkpoint."""
    units = {axis: getattr(model_config, name) for axis, name in _UNITS.items() if hasattr(model_config, name)}
    units.setdefault(LogicalAxis.KV_HEADS, units[LogicalAxis.HEADS])
    units.setdefault(LogicalAxis.HEAD_DIM, model_config.hidden_size // units[LogicalAxis.HEADS])
    return rules_of_templates(family_of(model_config).axes, units)
