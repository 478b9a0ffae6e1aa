"""Grids of devices: a mesh with every axis of ours, and virtual CPU devices where there is nothing else to try it on.

Knows no parameter and no rule. The one idea: a mesh always has all mesh axes, those not in use with size 1, so that
a partition spec means the same whatever is switched on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sharding.axes import MESH_AXES, MeshAxis
from sharding.errors import ShardingError

_FORCED_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def make_mesh(tensor_parallel_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the first `tensor_parallel_size` devices along the axis `tensor`.

    XLA propagates shardings through programs on this mesh (axes of type Auto), so that a derived program needs no
    annotation inside.

    Args:
      devices: To choose from; by default all of JAX's default backend.

    Raises:
      ShardingError: The size is no positive number, or there are fewer devices.
    """
    check_size(tensor_parallel_size)
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) < tensor_parallel_size:
        platform = devices[0].platform if devices else "none"
        way_out = "lower it" if platform != "cpu" else f"lower it, or first {_virtual(tensor_parallel_size)}"
        raise ShardingError(
            f"tensor_parallel_size={tensor_parallel_size} needs as many devices, found {len(devices)} ({platform}); "
            f"{way_out}"
        )
    sizes = {str(axis): tensor_parallel_size if axis is MeshAxis.TENSOR else 1 for axis in MESH_AXES}
    return mesh_of(sizes, devices[:tensor_parallel_size])


def mesh_of(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh of named axis sizes over exactly these devices, every axis of type Auto."""
    # Explicit is the default of jax.make_mesh, under which every operation inside would need a sharding of its own.
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=list(devices))


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    """The size of every mesh axis by name, for a manifest; `mesh_of` takes it back."""
    return {str(name): int(size) for name, size in mesh.shape.items()}


def ensure_cpu_devices(num_devices: int, *, xla_flags: str = "") -> None:
    """Makes JAX's CPU backend start with at least this many virtual devices; changes nothing for other backends.

    A setting of the whole process, so only a command may call it, before the first use of JAX.

    Args:
      xla_flags: The value of the environment variable XLA_FLAGS, which can set the number too.

    Raises:
      ShardingError: JAX runs already and has fewer devices, or `xla_flags` asks for fewer.
    """
    check_size(num_devices)
    forced = _FORCED_DEVICES.findall(xla_flags)
    configured = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # negative where nobody set it
    if num_devices <= max(configured, 1):
        return
    if configured < 0 and forced:
        if int(forced[-1]) < num_devices:
            raise ShardingError(
                f"tensor_parallel_size={num_devices} needs as many devices, and XLA_FLAGS asks for {forced[-1]} with "
                "--xla_force_host_platform_device_count; raise that number or leave it out"
            )
        return
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:  # the backends are made; whoever made them may have made enough
        if jax.default_backend() == "cpu" and jax.device_count() < num_devices:
            raise ShardingError(
                f"tensor_parallel_size={num_devices} needs as many devices, and JAX runs already with "
                f"{jax.device_count()}; before anything else {_virtual(num_devices)}"
            ) from error


def _virtual(num_devices: int) -> str:
    return f"call jax.config.update('jax_num_cpu_devices', {num_devices})"


def check_size(size: Any) -> None:
    """Raises ShardingError for what cannot be `tensor_parallel_size`."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ShardingError(f"tensor_parallel_size must be a whole number of at least 1, got {size!r}")
