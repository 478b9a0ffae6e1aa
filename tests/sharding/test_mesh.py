import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType

from sharding import MESH_AXES, MeshAxis, ShardingError, check_size, ensure_cpu_devices, make_mesh, mesh_of, mesh_sizes


def test_a_mesh_has_all_axes_of_type_auto_and_the_first_devices():
    mesh = make_mesh(4)
    assert mesh.axis_names == MESH_AXES
    assert mesh_sizes(mesh) == dict.fromkeys(MESH_AXES, 1) | {"tensor": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


def test_sizes_written_down_make_the_same_mesh_again():
    mesh = make_mesh(2)
    assert mesh_of(mesh_sizes(mesh), jax.devices()[:2]) == mesh


def test_devices_can_be_chosen():
    assert set(make_mesh(2, jax.devices()[4:]).devices.flat) == set(jax.devices()[4:6])


def test_too_few_devices_are_told_with_both_numbers_and_the_way_out():
    with pytest.raises(ShardingError, match=r"tensor_parallel_size=16 needs .*found 8 \(cpu\).*jax_num_cpu_devices"):
        make_mesh(16)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2"])
def test_what_is_no_number_of_devices_is_refused(size):
    with pytest.raises(ShardingError, match="whole number of at least 1"):
        check_size(size)


def test_devices_that_exist_already_are_enough():
    ensure_cpu_devices(8)
    assert jax.device_count() == 8


def test_too_late_for_more_devices_is_told():
    assert jax.device_count() == 8
    with pytest.raises(ShardingError, match="tensor_parallel_size=9 .*runs already with 8; before anything else"):
        ensure_cpu_devices(9)


@pytest.mark.parametrize(
    ("xla_flags", "expected"),
    [
        ("", "3 devices along tensor"),
        ("--xla_force_host_platform_device_count=5", "5 devices"),
        ("--xla_force_host_platform_device_count=2", "needs as many devices, and XLA_FLAGS asks for 2"),
    ],
)
def test_devices_are_made_before_jax_runs_and_a_number_in_xla_flags_is_respected(xla_flags, expected):
    code = (
        "import os, jax, sharding\n"
        "try:\n"
        "    sharding.ensure_cpu_devices(3, xla_flags=os.environ['XLA_FLAGS'])\n"
        "    print(jax.device_count(), 'devices along', *sharding.make_mesh(3).axis_names[4:])\n"
        "except sharding.ShardingError as error:\n"
        "    print(error)\n"
    )
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert expected in done.stdout


def test_only_the_tensor_axis_is_in_use():
    assert [axis for axis, size in mesh_sizes(make_mesh(8)).items() if size > 1] == [MeshAxis.TENSOR]
