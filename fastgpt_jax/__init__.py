"""FastGPT-JAX: you write the training forward; the compiler writes the serving engine.

The public names are handed on lazily (PEP 562), so that importing the package costs nothing and serving what is
compiled already imports no compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt_jax.checkpoint import load_model
    from fastgpt_jax.compiler.compile import compile
    from fastgpt_jax.compiler.config import CompileConfig
    from fastgpt_jax.engine.args import EngineArgs
    from fastgpt_jax.engine.engine import LLMEngine
    from fastgpt_jax.engine.llm import LLM
    from fastgpt_jax.kernels.attention.flash import flash_attn_func
    from fastgpt_jax.sampling.params import SamplingParams
    from fastgpt_jax.sampling.structured_params import StructuredOutputsParams
    from passes.incremental.errors import NotServable

__all__ = [
    "LLM",
    "CompileConfig",
    "EngineArgs",
    "LLMEngine",
    "NotServable",
    "SamplingParams",
    "StructuredOutputsParams",
    "compile",
    "flash_attn_func",
    "load_model",
]

_MODULE_OF: Mapping[str, str] = MappingProxyType(
    {
        "LLM": "fastgpt_jax.engine.llm",
        "CompileConfig": "fastgpt_jax.compiler.config",
        "EngineArgs": "fastgpt_jax.engine.args",
        "LLMEngine": "fastgpt_jax.engine.engine",
        "NotServable": "passes.incremental.errors",
        "SamplingParams": "fastgpt_jax.sampling.params",
        "StructuredOutputsParams": "fastgpt_jax.sampling.structured_params",
        "compile": "fastgpt_jax.compiler.compile",
        "flash_attn_func": "fastgpt_jax.kernels.attention.flash",
        "load_model": "fastgpt_jax.checkpoint",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastgpt_jax' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _check_siblings() -> None:
    """Raises ImportError where another module has the name of a package of ours, and says where it lies."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("passes", "sharding"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
        if not any(Path(place).resolve().is_relative_to(ours / name) for place in places):
            raise ImportError(
                f"fastgpt_jax needs its own package {name!r}, beside it in {ours}, but another module of that name "
                f"comes first: {', '.join(map(str, places))}; rename it, or remove its folder from sys.path"
            )


_check_siblings()
