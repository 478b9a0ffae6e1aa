import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import LOGICAL_AXES, MESH_AXES, LogicalAxis, MeshAxis


def test_mesh_axes_run_from_the_slowest_links_to_the_fastest():
    assert MESH_AXES == ("data", "stage", "expert", "context", "tensor")


def test_no_word_names_both_a_mesh_axis_and_a_logical_axis():
    assert not set(MESH_AXES) & set(LOGICAL_AXES)
    assert len(set(LOGICAL_AXES)) == len(LogicalAxis)


def test_names_stand_directly_in_meshes_and_partition_specs():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 1, 1, 2, 4), MESH_AXES)
    placed = jax.device_put(np.ones((4, 8)), NamedSharding(mesh, PartitionSpec(MeshAxis.CONTEXT, MeshAxis.TENSOR)))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
