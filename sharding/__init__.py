"""Names of mesh axes and logical axes; later meshes, partition specs and the reading of graphs for them."""

from sharding.axes import LOGICAL_AXES, MESH_AXES, LogicalAxis, MeshAxis

__all__ = ["LOGICAL_AXES", "MESH_AXES", "LogicalAxis", "MeshAxis"]
