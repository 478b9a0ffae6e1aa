"""How the core of the engine runs, as one frozen value."""

from __future__ import annotations

import dataclasses

from fastgpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CoreOptions:
    """Choices that no compiled program depends on.

    Attributes:
      max_batch: Most continuations that run together; None leaves it to the compiled model.
      min_batch: An idle engine waits until so many continuations are there,
      batch_timeout_ms: or until the oldest of them has waited so long.
      max_num_batched_tokens: Steps of more tokens, padding included, are not run, so that no answer waits long for its
        next token; None runs all there are.
      enable_prefix_caching: Whether prompts that begin alike share what was computed.
      pins_buckets: Whether all prompts run in steps of one shape and all single tokens in steps of another, by one
        sampler, and no prefix is shared, so that what runs beside a request does not change how its sums are made.
      max_snapshots: Most page ends at which what is carried from token to token is kept; None is twice the number of
        requests that run together.
      swap_bytes: Memory of the host for the rows of preempted requests; without room they are computed again.
      poison_freed_pages: Whether pages are overwritten when nobody may read them any more; for tests, as it costs time.
    """

    max_batch: int | None = None
    min_batch: int = 1
    batch_timeout_ms: float = 0.0
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    pins_buckets: bool = False
    max_snapshots: int | None = None
    swap_bytes: int = 0
    poison_freed_pages: bool = False

    def __post_init__(self):
        for name in ("max_batch", "min_batch", "max_num_batched_tokens", "max_snapshots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value!r}")
        for name in ("batch_timeout_ms", "swap_bytes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if self.min_batch > 1 and not self.batch_timeout_ms:
            raise UserError(f"min_batch={self.min_batch} needs batch_timeout_ms, after which fewer begin")
        if self.max_batch is not None and self.min_batch > self.max_batch:
            raise UserError(f"min_batch must be at most max_batch, got {self.min_batch} and {self.max_batch}")
