"""How many programs XLA compiled in this process: what a server that compiles nothing while serving can prove it by."""

from __future__ import annotations

import functools
from typing import Any

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts compilations from when it was made."""

    def __init__(self):
        self.num_compiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.num_compiles += event == COMPILE_EVENT


@functools.cache
def compile_counter() -> CompileCounter:
    """The counter of this process; JAX keeps listeners for as long as it lives, so there is only one."""
    return CompileCounter()
