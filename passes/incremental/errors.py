"""The refusal: what a model does that has no exact cached step, with the operation and the user's source line."""

from __future__ import annotations

from passes.graph import Op, Source


class NotServable(ValueError):
    """A model has no exact incremental form.

    Attributes:
      op_name: Name of the operation that stopped the derivation, or None.
      source: The user's source line of it.
    """

    def __init__(self, reason: str, op: Op | None = None, source: Source | None = None, detail: str = ""):
        self.reason = reason
        self.op_name = op.name if op is not None else None
        self.source = source if source is not None else (op.source if op is not None else Source())
        where = (
            f"{self.op_name or 'the model'} at {self.source}" if self.source.frames else (self.op_name or "the model")
        )
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))
