"""Placement on several devices: names of axes, meshes, and rules from paths of parameters to partition specs."""

from sharding.axes import LOGICAL_AXES, MESH_AXES, LogicalAxis, MeshAxis
from sharding.collectives import count_collectives
from sharding.errors import DivisibilityError, ShardingError
from sharding.mesh import check_size, ensure_cpu_devices, make_mesh, mesh_of, mesh_sizes
from sharding.rules import (
    TENSOR_PARALLEL,
    Assignment,
    Axes,
    Rules,
    names_of_spec,
    rules_of_templates,
    spec_of_names,
)

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "TENSOR_PARALLEL",
    "Assignment",
    "Axes",
    "DivisibilityError",
    "LogicalAxis",
    "MeshAxis",
    "Rules",
    "ShardingError",
    "check_size",
    "count_collectives",
    "ensure_cpu_devices",
    "make_mesh",
    "mesh_of",
    "mesh_sizes",
    "rules_of_templates",
    "spec_of_names",
    "names_of_spec",
]
