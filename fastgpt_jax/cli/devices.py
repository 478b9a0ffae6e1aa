"""Virtual devices for programs that are divided over several: one processor plays them all."""

from __future__ import annotations

import contextlib

import jax


def make_virtual_devices(count: int) -> None:
    """Lets the CPU count as so many devices, unless JAX has started; accelerators are as they are."""
    if count > max(1, jax.config.jax_num_cpu_devices):  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)
