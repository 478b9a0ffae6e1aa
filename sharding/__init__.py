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
    rules_of_templates,
    spec_from_json,
    spec_to_json,
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
    "spec_from_json",
    "spec_to_json",
]
