"""How many pages the caches get: what is left of a device's memory beside weights, carried values and temporaries.

Knows no scheduler. The one idea: temporaries are asked of XLA and not estimated: the largest entry points are compiled
with the fewest pages that can serve, since steps change pools in place and need no more memory for larger ones.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from fastgpt_jax.artifact.cache_layout import SNAPSHOTS_PER_REQUEST
from fastgpt_jax.artifact.device_memory import device_memory_bytes
from fastgpt_jax.artifact.entry_points import Buckets, EntryPointKey
from fastgpt_jax.artifact.manifest import EntryPointRecord
from fastgpt_jax.compiler.entry_point import compile_entry_point
from fastgpt_jax.errors import UserError

if TYPE_CHECKING:
    from fastgpt_jax.compiler.compile import Compiled

SLACK = 0.05
"""Share of the temporaries that is left for entry points that turn out to take more than those that were asked."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device.

    Attributes:
      limit_bytes: What the device has.
      share: The part of it that may be used.
      weights_bytes: Of all weights that a step reads.
      carried_bytes: Of windows and carried values of `max_num_seqs` requests.
      temporary_bytes: What the largest entry point takes besides, its inputs included; 0 before that is known.
      page_bytes: Of a page in all pools.
      request_pages: Pages of a request of full length.
      snapshot_bytes: Of copies of windows and carried values that are kept for prompts to come.
    """

    limit_bytes: int
    share: float
    weights_bytes: int
    carried_bytes: int
    temporary_bytes: int
    page_bytes: int
    request_pages: int
    snapshot_bytes: int = 0

    @property
    def room_bytes(self) -> int:
        """What is left for pages; negative where the rest does not fit."""
        used = self.weights_bytes + self.carried_bytes + self.snapshot_bytes + self.temporary_bytes
        return int(self.limit_bytes * self.share) - used

    def num_pages(self) -> int:
        """Pages that fit.

        Raises:
          UserError: Not even one request of full length does.
        """
        self.check(self.request_pages)
        return self.room_bytes // self.page_bytes

    def check(self, num_pages: int) -> None:
        """Raises UserError where so many pages do not fit."""
        if num_pages * self.page_bytes <= self.room_bytes:
            return
        pages = f"{num_pages} pages of {format_bytes(self.page_bytes)}"
        if num_pages == self.request_pages:
            pages += ", which one request of full length takes,"
        raise UserError(
            f"{pages} and {self.rest} do not fit into {100 * self.share:g}% of {format_bytes(self.limit_bytes)}, the "
            "memory of a device; raise gpu_memory_utilization or lower memory_pool_size, or lower max_model_len, "
            "max_num_seqs or max_num_batched_tokens, or quantize"
        )

    def with_peak(self, peak_bytes: int, num_pages: int) -> MemoryPlan:
        """The plan once it is known what a step takes that has all weights and so many pages."""
        given = self.weights_bytes + self.carried_bytes + num_pages * self.page_bytes
        return dataclasses.replace(self, temporary_bytes=max(0, peak_bytes - given))

    @property
    def rest(self) -> str:
        """What there is besides pages, in words."""
        carried_bytes = self.carried_bytes + self.snapshot_bytes
        return (
            f"{format_bytes(self.weights_bytes)} of weights, {format_bytes(carried_bytes)} of carried values and "
            f"{format_bytes(self.temporary_bytes)} of temporaries"
        )


def plan_pages(compiled: Compiled) -> int:
    """Pages for `memory_pool_size` or `gpu_memory_utilization`.

    Compiles the largest entry points where temporaries have to be known.

    Raises:
      UserError: Not even one request of full length fits.
    """
    config, request_pages = compiled.config, compiled.layout.pages_per_request(compiled.max_model_len)
    compiled.program = dataclasses.replace(compiled.program, num_pages=request_pages)
    traced = [compiled.trace(key) for key in _largest(compiled.buckets)]
    plan = _plan(compiled, dict.fromkeys(name for step in traced for name in step.weights))
    if not plan.page_bytes:  # nothing but carried values, which requests have whatever their length
        plan.check(0)
        return request_pages * compiled.max_num_seqs
    if config.memory_pool_size is not None:
        num_pages = config.memory_pool_size // plan.page_bytes
        if num_pages < request_pages:
            least = format_bytes(request_pages * plan.page_bytes)
            raise UserError(
                f"memory_pool_size={format_bytes(config.memory_pool_size)} holds {num_pages} pages of "
                f"{format_bytes(plan.page_bytes)} and one request of {compiled.max_model_len} tokens takes "
                f"{request_pages}; give at least {least}, or lower max_model_len"
            )
        plan.check(num_pages)
        return num_pages
    plan.num_pages()  # refuses before the work
    peaks = [peak_bytes(compile_entry_point(step).compiled) + _unread(compiled, plan, step.weights) for step in traced]
    plan = plan.with_peak(max(peaks), request_pages)
    return dataclasses.replace(plan, temporary_bytes=int(plan.temporary_bytes * (1 + SLACK))).num_pages()


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory of a device while a program runs, arguments and results included; 0 where the backend does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(given + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)


def check_built(compiled: Compiled, entries: Sequence[EntryPointRecord], weight_names: Sequence[str]) -> None:
    """Raises UserError where what was compiled does not fit after all; of a model whose pages were not planned, never.

    Args:
      weight_names: Of all weights that an entry point reads.
    """
    config = compiled.config
    if config.gpu_memory_utilization is None and config.memory_pool_size is None:
        return
    plan, num_pages = _plan(compiled, weight_names), compiled.layout.num_pages
    peaks = [
        entry.program.peak_bytes + _unread(compiled, plan, [weight_names[i] for i in entry.weights])
        for entry in entries
    ]
    plan.with_peak(max(peaks), num_pages).check(num_pages)


def _plan(compiled: Compiled, weight_names: Iterable[str]) -> MemoryPlan:
    """What is known before anything is compiled."""
    layout, state = compiled.layout, compiled.distribution.state_shapes(compiled.program)
    pools, own = state[: layout.num_pool_arrays], state[layout.num_pool_arrays :]
    return MemoryPlan(
        limit_bytes=device_memory_bytes(compiled.distribution.num_devices),
        share=compiled.config.gpu_memory_utilization or 1.0,
        weights_bytes=sum(_device_bytes(compiled.store[name]) for name in weight_names),
        carried_bytes=sum(map(_device_bytes, own)),
        temporary_bytes=0,
        page_bytes=sum(map(_device_bytes, pools)) // layout.num_pages,
        request_pages=layout.pages_per_request(compiled.max_model_len),
        snapshot_bytes=SNAPSHOTS_PER_REQUEST * sum(map(_device_bytes, own)),
    )


def _largest(buckets: Buckets) -> list[EntryPointKey]:
    """The entry points with the largest temporaries: of the most tokens, with logits of all of them where there are
    such, and of the most requests that are sampled for."""

    def num_tokens(key: EntryPointKey) -> tuple[int, bool, bool]:
        return key.num_tokens, key.score, key.variant == "full"

    def num_samples(key: EntryPointKey) -> tuple[int, bool, int]:
        return key.num_requests, key.variant == "full", key.num_tokens

    keys = list(buckets.keys())
    chosen = [key for size in (num_tokens, num_samples) for key in keys if size(key) == max(map(size, keys))]
    return list(dict.fromkeys(chosen))


def _unread(compiled: Compiled, plan: MemoryPlan, weight_names: Iterable[str]) -> int:
    """Bytes of the weights that a step does not read, and that are there all the same."""
    return plan.weights_bytes - sum(_device_bytes(compiled.store[name]) for name in weight_names)


def _device_bytes(x: Any) -> int:
    """Bytes of an array, or of what has its shape, on each device."""
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(tuple(x.shape))
    return math.prod(shape) * x.dtype.itemsize


def parse_bytes(text: str) -> int:
    """Bytes of a number with a unit, as in `2GiB`, `500 MB` and `1.5GB`.

    Raises:
      UserError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]) * unit >= 1:
        raise UserError(f"a size must be a number of bytes with a unit, as in 2GiB or 500MB, got {text!r}")
    return int(float(found[1]) * unit)


def format_bytes(num_bytes: int) -> str:
    """Such as `7 B` and `2.05 GiB`."""
    power = min(3, max(0, (max(abs(num_bytes), 1).bit_length() - 1) // 10))
    return f"{num_bytes / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
