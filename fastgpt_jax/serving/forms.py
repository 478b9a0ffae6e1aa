"""Forms of text, compiled off the event loop and apart from what makes tokens of other requests.

Knows no grammar. The one idea: a form that is compiled costs nothing, one that compiles is awaited by all who ask for
it, and only so many others wait for their turn; a slow form holds up requests that have one to compile, and no more.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastgpt_jax.sampling.structured import CompilersBusy
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams
from fastgpt_jax.serving.unavailable import Overloaded

MAX_COMPILING = 16
"""Different forms that compile or wait for it; one more is refused with 429."""


class Forms:
    """What the compiler of an engine does for requests.

    Invariants: each form of `_compiling` has a thread of `_pool`, which compiles it or waits for its turn.
    """

    def __init__(self, engine: Any):
        """Args: engine: Its `forms` are compiled; an engine without them takes no request that has one."""
        self._engine = engine
        self._lock = threading.Lock()
        self._compiling: dict[StructuredOutputsParams, Future[None]] = {}
        self._pool = ThreadPoolExecutor(MAX_COMPILING, "form")

    async def compile(self, form: StructuredOutputsParams) -> None:
        """Compiles a form unless that was done.

        Raises:
          UserError: It cannot be enforced, or took too long.
          Overloaded: Too many others compile.
        """
        if self._engine.forms.is_compiled(form):
            return
        try:
            # Who leaves does not end it for the others.
            await asyncio.shield(asyncio.wrap_future(self._start(form)))
        except CompilersBusy as error:
            raise Overloaded(str(error), error.retry_after_s) from None

    def close(self) -> None:
        """Takes no form any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, form: StructuredOutputsParams) -> Future[None]:
        with self._lock:
            if form in self._compiling:
                return self._compiling[form]
            if len(self._compiling) >= MAX_COMPILING:
                raise Overloaded(f"the server is busy: {MAX_COMPILING} forms of text compile; try again in 1 s", 1)
            future = self._compiling[form] = self._pool.submit(self._compile, form)
            return future

    def _compile(self, form: StructuredOutputsParams) -> None:
        try:
            self._engine.forms.compile(form)
        finally:
            with self._lock:
                del self._compiling[form]
