"""Virtual devices for programs that are divided over several: one processor plays them all."""

from __future__ import annotations

import os

from fastgpt_jax.errors import UserError
from sharding import ShardingError, ensure_cpu_devices


def make_virtual_devices(count: int) -> None:
    """Lets the CPU count as so many devices; accelerators are as they are.

    Raises:
      UserError: JAX has started with fewer, or XLA_FLAGS asks for fewer.
    """
    try:
        ensure_cpu_devices(count, xla_flags=os.environ.get("XLA_FLAGS", ""))
    except ShardingError as error:
        raise UserError(str(error)) from error
