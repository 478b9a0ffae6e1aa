"""Config files: Python with a `get_config()` that returns an `ml_collections.ConfigDict`.

Knows no tool. The one idea: the file is read into a plain nested mapping at once, and whatever is wrong with it is one
line that names the file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fastgpt_jax.errors import UserError


def load_config(path: str | Path) -> dict[str, Any]:
    """Runs a config file; returns what it configures as nested dicts."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such config file: {path}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"the config {path} must be a Python file with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise UserError(f"the config {path} failed with {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() in {path} must return a ConfigDict, got {type(config).__name__}")
    return config.to_dict()


def merge(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested `config` with the values of dotted keys put in place; groups that are missing are made."""
    merged = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in config.items()}
    for key, value in overrides.items():
        *groups, name = key.split(".")
        group = merged
        for part in groups:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise UserError(f"config key {part} must be a group of settings, got {group!r}")
        group[name] = value
    return merged
