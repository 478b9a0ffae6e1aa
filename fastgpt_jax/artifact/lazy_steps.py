"""Steps that are made when they are first asked for, or in the background, each once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Program = TypeVar("Program")


class LazySteps(Generic[Key, Program]):
    """Steps, or other programs, by key. Invariant: each is made once, whoever asks first; the others wait for it."""

    def __init__(self, makers: Mapping[Key, Callable[[], Program]]):
        self._makers = dict(makers)
        self._locks = {key: threading.Lock() for key in makers}
        self._steps: dict[Key, Program] = {}
        self._thread: threading.Thread | None = None

    def get(self, key: Key) -> Program:
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
            # Begun by a thread that dies with the process, it would too, in the midst of code that must not.
            self._thread = threading.Thread(target=self._load_while_running, name="load-steps", daemon=False)
            self._thread.start()

    def _load_while_running(self) -> None:
        for key in self._makers:
            if not threading.main_thread().is_alive():
                return
            try:
                self.get(key)
            except Exception:  # whoever asks for the step is told
                continue
