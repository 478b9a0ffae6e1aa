"""The file behind `fastgpt serve --config`: a few keys in groups, each of which is a flag by another name.

Knows the keys and no server. The one idea: a value of the file stands where the command line gives none, so that a flag
always wins; a key that nobody knows is an error that names the nearest.

    service:      {port: 8000, batch_size: 32, max_length: 4096}
    hardware:     {gpu_id: 0, memory_pool_size: 24GB}
    optimization: {async_pipeline: true, precision: mixed}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from fastgpt_jax.cli.config_file import load_config
from fastgpt_jax.errors import UserError

KEYS: Mapping[str, tuple[str, tuple[type, ...]]] = MappingProxyType(
    {
        "service.port": ("port", (int,)),
        "service.batch_size": ("max_num_seqs", (int,)),
        "service.max_length": ("max_model_len", (int,)),
        "hardware.gpu_id": ("gpu_id", (int, str)),
        "hardware.memory_pool_size": ("memory_pool_size", (int, str)),
        "optimization.async_pipeline": ("async_pipeline", (bool,)),
        "optimization.precision": ("precision", (str,)),
    }
)
"""Key of the file -> flag, and what its values may be."""


def read_serve_config(path: str) -> dict[str, Any]:
    """Returns flags by name with the values that a YAML file, or a Python file with `get_config()`, gives them."""
    config = load_config(path) if path.endswith(".py") else _read_yaml(path)
    flags = {}
    for key, value in _flatten(config, path):
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(KEYS)}"
            raise UserError(f"{path}: unknown key {key!r}{hint}")
        flag, kinds = KEYS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            allowed = " or ".join({int: "a whole number", str: "text", bool: "true or false"}[kind] for kind in kinds)
            raise UserError(f"{path}: {key} must be {allowed}, got {value!r}")
        flags[flag] = value
    return flags


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML file: {error}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UserError(f"--config {path} must hold groups of keys, got a {type(config).__name__}")
    return config


def _flatten(config: Mapping[Any, Any], path: str) -> list[tuple[str, Any]]:
    """Returns `group.key` and value of all keys; a group that holds none is a key of its own, and unknown."""
    groups = {key.split(".")[0] for key in KEYS}
    flat: list[tuple[str, Any]] = []
    for name, group in config.items():
        if isinstance(group, Mapping):
            flat += [(f"{name}.{key}", value) for key, value in group.items()]
        elif name in groups and group is not None:
            raise UserError(f"{path}: {name} must be a group of keys, got {group!r}")
        elif name not in groups:
            flat.append((str(name), group))
    return flat
