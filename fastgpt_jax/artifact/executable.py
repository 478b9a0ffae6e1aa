"""Compiled programs as bytes, and bytes as callable programs: no pickle, no tracing, no lowering, no compiling.

Knows what JAX keeps about a compiled program, in which versions differ; nothing else does. The one idea: the
backend serializes the machine code, and the little that JAX keeps beside it (types, shardings, what is donated, what is
kept) is plain data that the manifest holds, from which JAX's own callable is put together again. It is called through
the same fast path as a program compiled in this process.

Also the portable form: the program as StableHLO (`jax.export`), which any later version can compile.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax._src import compilation_cache, config, core
from jax._src.interpreters import pxla
from jax._src.lib import xla_client
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fastgpt_jax.artifact.step import FlatStep
from fastgpt_jax.errors import UserError

Spec = tuple[tuple[str, ...], ...]
"""For each dimension the mesh axes it is divided over."""


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """An argument or result.

    Attributes:
      dtype: As JAX spells it.
      spec: Mesh axes of each leading dimension; empty for an array that every device holds whole.
    """

    shape: tuple[int, ...]
    dtype: str
    spec: Spec = ()

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * jax.numpy.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Signature:
    """What JAX keeps beside the machine code of `(state, weights, inputs) -> (outputs, state)`.

    Attributes:
      kept: Positions of the flat arguments that the machine code takes; it may not need them all.
    """

    name: str
    state: tuple[ArrayType, ...]
    weights: tuple[ArrayType, ...]
    inputs: tuple[ArrayType, ...]
    outputs: tuple[ArrayType, ...]
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a program runs.

    Attributes:
      devices: In the order of the mesh, flat.
      mesh_axes: Name and size of each mesh axis; empty for a single device.
    """

    devices: tuple[Any, ...]
    mesh_axes: tuple[tuple[str, int], ...] = ()

    def sharding(self, spec: Spec = ()) -> Any:
        """The sharding of an array."""
        if not self.mesh_axes:
            return SingleDeviceSharding(self.devices[0])
        names, sizes = zip(*self.mesh_axes, strict=True)
        mesh = Mesh(np.array(self.devices).reshape(sizes), names)
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))


def serialize(compiled: jax.stages.Compiled) -> bytes:
    """The machine code of a compiled program.

    Raises:
      UserError: the program calls back into Python or has effects, which bytes cannot hold.
    """
    unloaded = _unloaded(compiled)
    if unloaded.unordered_effects or unloaded.ordered_effects or unloaded.keepalive or unloaded.host_callbacks:
        raise UserError("the model calls back into Python (jax.debug.print, pure_callback), which cannot be stored")
    executable = unloaded.xla_executable
    if hasattr(executable, "serialize"):
        return executable.serialize()
    return executable.client.serialize_executable(executable)


def compile_afresh(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles without JAX's persistent cache: what comes out of that cannot be serialized again on a CPU."""
    compilation_cache.reset_cache()  # whether it is used is remembered from the first compile on
    try:
        with config.enable_compilation_cache(False):
            return lowered.compile()
    finally:
        compilation_cache.reset_cache()


def kept_arguments(compiled: jax.stages.Compiled) -> tuple[int, ...]:
    """Positions of the flat arguments that the machine code takes."""
    return tuple(sorted(_unloaded(compiled).kept_var_idx))


def deserialize(code: bytes, signature: Signature, placement: Placement) -> FlatStep:
    """Makes machine code callable.

    Args:
      code: From `serialize`, made by this jaxlib for devices of this kind: other code may crash the process.

    Raises:
      UserError: The backend refuses the code.
    """
    client = placement.devices[0].client
    devices = xla_client.DeviceList(tuple(placement.devices))
    try:
        executable = client.deserialize_executable(code, executable_devices=devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the machine code of {signature.name} cannot be loaded here: {error}; compile the model again"
        ) from error
    flat = (*signature.state, *signature.weights, *signature.inputs)
    avals = [_aval(x) for x in flat]
    kept = [flat[i] for i in signature.kept]
    results = (*signature.outputs, *signature.state)
    unloaded = pxla.UnloadedMeshExecutable(
        xla_executable=executable,
        device_list=devices,
        backend=client,
        input_avals=[avals[i] for i in signature.kept],
        input_shardings=[placement.sharding(x.spec) for x in kept],
        output_avals=[_aval(x) for x in results],
        output_shardings=[placement.sharding(x.spec) for x in results],
        committed=bool(placement.mesh_axes),
        name=signature.name,
        unordered_effects=[],
        ordered_effects=[],
        keepalive=[],
        host_callbacks=[],
        kept_var_idx=set(signature.kept),
        mut=None,
        xla_in_layouts=[None] * len(kept),
        dispatch_in_layouts=[None] * len(kept),
        xla_out_layouts=[None] * len(results),
        all_args_info=None,
        pgle_profiler=None,
    )
    donated = len(signature.state)
    infos = iter([jax.stages.ArgInfo(aval, i < donated) for i, aval in enumerate(avals)])
    groups = (signature.state, signature.weights, signature.inputs)
    args_info = (tuple([next(infos) for _ in group] for group in groups), {})
    out_tree = jax.tree.structure(([0] * len(signature.outputs), [0] * len(signature.state)))
    return jax.stages.Compiled(unloaded.load(), [], args_info, out_tree, no_kwargs=True)


def export_portable(step: Any, arguments: Sequence[Any], platforms: Sequence[str]) -> bytes:
    """The program as StableHLO with its types, without source lines: the same program gives the same bytes.

    Args:
      step: A jitted function.
      arguments: Arrays or `ShapeDtypeStruct`s, with shardings where they have any.
    """
    with config.traceback_in_locations_limit(0):
        return bytes(export.export(step, platforms=platforms)(*arguments).serialize())


def compile_portable(program: bytes, signature: Signature, placement: Placement) -> FlatStep:
    """Compiles a portable program for the devices of this process.

    Raises:
      UserError: the program cannot be read, or was exported for other platforms.
    """
    try:
        exported = export.deserialize(bytearray(program))
    except ValueError as error:
        raise UserError(f"the portable program of {signature.name} cannot be read: {error}") from error
    platform = placement.devices[0].platform
    if platform not in exported.platforms:
        raise UserError(
            f"the portable program of {signature.name} is for {', '.join(exported.platforms)} and this is {platform}; "
            "compile the model again here"
        )
    groups = (signature.state, signature.weights, signature.inputs)
    arguments = [
        [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.sharding(x.spec)) for x in group] for group in groups
    ]
    results = ([placement.sharding(x.spec) for x in signature.outputs], [*map(_sharding(placement), signature.state)])
    step = jax.jit(exported.call, donate_argnums=0, out_shardings=results)
    return step.lower(*arguments).compile()


def init_zeros(state: Sequence[ArrayType], placement: Placement) -> FlatStep:
    """Compiles a program that takes nothing and gives arrays of zeros as its outputs."""
    shardings = ([placement.sharding(x.spec) for x in state], [])
    make = jax.jit(lambda *groups: ([jax.numpy.zeros(x.shape, x.dtype) for x in state], []), out_shardings=shardings)
    return make.lower([], [], []).compile()


def compiler_versions() -> Mapping[str, str]:
    """Versions of what machine code depends on; starts JAX's backend."""
    platform = " ".join(jax.devices()[0].client.platform_version.split())
    return {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "platform_version": platform}


def compiler_options() -> Mapping[str, str]:
    """Options that the backend's compiler reads from the environment by itself, and machine code depends on."""
    return {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}


def _sharding(placement: Placement) -> Callable[[ArrayType], Any]:
    return lambda x: placement.sharding(x.spec)


def _unloaded(compiled: jax.stages.Compiled) -> Any:
    return compiled._executable._unloaded_executable  # pyright: ignore[reportAttributeAccessIssue]


def _aval(x: ArrayType) -> Any:
    return core.ShapedArray(x.shape, jax.numpy.dtype(x.dtype))
