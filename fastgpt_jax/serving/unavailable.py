"""Why a request that is right in itself is not answered: too much to do, going away, or broken."""

from __future__ import annotations


class Unavailable(RuntimeError):
    """The server cannot answer now; a message for the client, never a traceback."""


class Overloaded(Unavailable):
    """Too much is waiting.

    Attributes:
      retry_after_s: When a place is expected, in whole seconds.
    """

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Unavailable):
    """The server finishes what it has and takes nothing new."""


class Aborted(Unavailable):
    """The request was ended before it had any output."""


class StepFailed(Unavailable):
    """A step of the model failed, and with it the requests that ran."""


class EngineDead(Unavailable):
    """The engine has stopped; only a new process helps."""
