"""What the loader must know about a family of models in the Hugging Face layout, as data.

Knows no family. The one idea: a parameter's path in the module, with layer numbers written `{}`, names its tensor in
the file; reading and writing are the same table in two directions. The table says what a parameter's dimensions mean,
too, for those who place it on several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from fastgpt_jax.json_fields import Fields
from sharding.axes import LogicalAxis


@dataclass(frozen=True)
class Tensor:
    """A tensor in the file: its name, with `{}` for the layer, and how the parameter is made of it.

    `axes` are what the dimensions of the parameter (not of the tensor) mean; None for one that must stay whole.
    `is_transposed`: torch's `nn.Linear` stores [out, in], ours [in, out]. Parameters that share a name are parts of one
    fused tensor: they lie along their last axis one after the other, by `part`.
    """

    name: str
    axes: tuple[LogicalAxis | None, ...]
    is_transposed: bool = False
    part: int = 0


@runtime_checkable
class ConfigParser(Protocol):
    """Reads config.json; `max_model_len` is the longest text that will be served, None for the model's own limit."""

    def __call__(self, config: Fields, dtype: str, max_model_len: int | None = None) -> Any: ...


@dataclass(frozen=True)
class Family:
    """One row of the registry.

    `ignored` are regular expressions (full matches) for tensors that a file may hold beside the parameters, such as
    buffers; anything else that is left over is an error. `prefix` may be absent from all names of a file.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config_class: type
    module: Callable[..., nnx.Module]
    parse_config: ConfigParser
    export_config: Callable[[Any], dict[str, Any]]
    tensors: Mapping[str, Tensor]
    ignored: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def axes(self) -> Mapping[str, tuple[LogicalAxis | None, ...]]:
        """The logical axes of every parameter, by its path with layer numbers written `{}`."""
        return {path: tensor.axes for path, tensor in self.tensors.items()}
