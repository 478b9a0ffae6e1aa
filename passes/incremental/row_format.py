"""How rows of a cache are stored when not as they are: rounded, each vector of the last axis with a scale beside it.

Knows no pages. The one idea: the scale is a row of a pool of its own, written and read with the row that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from passes.incremental.state import State
from passes.quantization import schemes
from passes.quantization.schemes import Scheme
from passes.quantization.views import is_float

MIN_VECTOR = 8
"""Numbers that share a scale, at least: for fewer the scales would take more than is saved."""


@dataclass(frozen=True)
class RowFormat:
    """Numbers that rows are rounded to.

    Attributes:
      dtype: As JAX spells it.
      scale_dtype: Of the scales; rows are rounded with the scale as it is stored.
    """

    name: str
    dtype: str
    scale_dtype: str = "bfloat16"

    @property
    def _scheme(self) -> Scheme:
        return Scheme(self.name, self.dtype, scale_dtype=self.scale_dtype)

    def holds(self, state: State) -> bool:
        """Whether rows of a state are stored so; integers, scalars and short vectors stay as they are."""
        return state.kind == "kv" and is_float(state.value) and bool(state.shape) and state.shape[-1] >= MIN_VECTOR

    def pack(self, rows: Any) -> tuple[Any, Any]:
        """Rows `[..., H]` as `(qvalue [..., H], scale [...])`."""
        qvalue, scale = schemes.quantize(rows, self._scheme)
        return qvalue, scale[..., 0]

    def unpack(self, qvalue: Any, scale: Any, dtype: Any) -> Any:
        return schemes.dequantize(qvalue, scale[..., None], self._scheme).astype(dtype)


ROW_FORMATS: Mapping[str, RowFormat] = MappingProxyType(
    {name: RowFormat(name, dtype) for name, dtype in (("int8", "int8"), ("fp8", "float8_e4m3fn"))}
)
