"""What an engine counts, and when things happened to a request: plain numbers for whoever watches.

Knows no exporter. The one idea: counts only ever grow and gauges say how things stand, so that whoever reads them may
do so as rarely as they like. All times are seconds of the monotonic clock.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, for the first of its continuations that they happened to.

    Attributes:
      arrival: When it was added.
      first_scheduled: When its first step was given to the device; None while it waits.
      first_token: When its first token was known; None until then.
      finished: When the last of its continuations ended; None until then.
      num_cached_tokens: Prompt tokens whose rows were found in the prefix cache.
    """

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, but for the gauges.

    Attributes:
      num_running: Gauge: continuations that hold pages.
      num_waiting: Gauge: continuations that wait for their first step, or again after a preemption.
      num_swapped: Gauge: those of the waiting ones whose rows lie on the host.
      kv_cache_usage: Gauge, 0 to 1: pages that requests refer to, of all pages; cached pages that nobody refers to are
        free.
      kv_cache_waste: Gauge, 0 to 1: places for rows in the pages that requests refer to in which no row lies.
      prefix_cache_queries: Tokens that were looked up in the prefix cache.
      prefix_cache_hits: Tokens that were found there.
      num_preemptions: Times a running continuation lost its pages to another.
      num_swaps: Times that its rows went to the host, and were not computed again.
      prompt_tokens: Prompt tokens of the requests that got their first step; those of each continuation count.
      generation_tokens: Tokens generated.
      num_steps: Steps given to the device.
      num_failed_steps: Steps that raised.
      last_iteration_tokens: Gauge: tokens computed by the last step.
      padding_tokens: Tokens computed for nobody, since steps have fixed shapes.
      computed_tokens: Tokens computed for somebody.
      device_time_s: Seconds from a step's dispatch, or the end of the one before, to its end.
      idle_gap_s: Seconds the device waited for the host from the end of a step to the next, while there was work.
      num_compiles: Programs that XLA compiled in this process since the engine was made.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    kv_cache_usage: float = 0.0
    kv_cache_waste: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    last_iteration_tokens: int = 0
    padding_tokens: int = 0
    computed_tokens: int = 0
    device_time_s: float = 0.0
    idle_gap_s: float = 0.0
    num_compiles: int = 0
