"""Steps that are made when they are first asked for, or in the background, each once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.artifact.step import Step


class LazySteps:
    """Steps by key. Invariant: each is made once, whoever asks first; the others wait for it."""

    def __init__(self, makers: Mapping[EntryPointKey, Callable[[], Step]]):
        self._makers = dict(makers)
        self._locks = {key: threading.Lock() for key in makers}
        self._steps: dict[EntryPointKey, Step] = {}
        self._thread: threading.Thread | None = None

    def get(self, key: EntryPointKey) -> Step:
        """The step, made now if need be."""
        step = self._steps.get(key)
        if step is not None:
            return step
        with self._locks[key]:
            if key not in self._steps:
                self._steps[key] = self._makers[key]()
            return self._steps[key]

    def load_all(self) -> None:
        """Makes all of them."""
        for key in self._makers:
            self.get(key)

    def load_rest_in_background(self) -> None:
        """Begins to make the rest, once; the thread ends early where the process does."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._load_while_running, name="load-steps")
            self._thread.start()

    def _load_while_running(self) -> None:
        for key in self._makers:
            if not threading.main_thread().is_alive():
                return
            try:
                self.get(key)
            except Exception:  # whoever asks for the step is told
                continue
