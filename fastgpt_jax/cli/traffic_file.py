"""The file that `--traffic` names: histograms of prompt lengths and of concurrency.

    {"prompt_tokens": {"17": 120, "350": 4}, "concurrency": {"1": 900, "8": 30}}

Each may be left out. Weights are counts or shares; anything else in the file is a mistake, told in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgpt_jax.compiler.bucket_plan import Traffic
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields, read_json_object

HISTOGRAMS = ("prompt_tokens", "concurrency")
MAX_WEIGHT = 1e15


def read_traffic(path: str) -> Traffic:
    """Reads the histograms.

    Raises:
      UserError: The file cannot be read or is not of this form.
    """
    fields = read_json_object(Path(path))
    for name in fields.values:
        if name not in HISTOGRAMS:
            raise UserError(f"{path} may hold {' and '.join(HISTOGRAMS)} alone, got {name!r}")
    if not any(name in fields for name in HISTOGRAMS):
        raise UserError(f"{path} must hold {' or '.join(HISTOGRAMS)}; it is empty")
    return Traffic(**{name: _histogram(fields, name) for name in HISTOGRAMS if name in fields})


def _histogram(fields: Fields, name: str) -> dict[int, float]:
    found = fields.object(name)
    histogram = {}
    for key, weight in found.values.items():
        if not (len(key) < 10 and key.isascii() and key.isdigit() and int(key) > 0):
            raise UserError(f"{found.where} must have whole numbers from 1 as keys, in quotes, got {key!r}")
        if int(key) in histogram:
            raise UserError(f"{found.where} must name each number once, got {key!r} again")
        if not _is_weight(weight):
            raise UserError(f"{found.where} must have counts from 0 to {MAX_WEIGHT:.0e}, got {weight!r} for {key!r}")
        histogram[int(key)] = float(weight)
    if not any(histogram.values()):
        raise UserError(f"{found.where} must have a count above 0")
    return histogram


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT
