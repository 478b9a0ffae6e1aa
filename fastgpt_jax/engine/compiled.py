"""What the engine asks of a compiled model: the whole of the seam between compiler and engine.

Whatever takes a state and gives one donates the first, and the returned one takes its place. A transfer moves
`layout.transfer_pages` pages; a page past the last names none.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from fastgpt_jax.artifact.cache_layout import CacheLayout
from fastgpt_jax.artifact.entry_points import Buckets, Variant
from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs


@runtime_checkable
class CompiledModel(Protocol):
    """A step function with its cache.

    Attributes:
      max_model_len: Tokens a request may reach, prompt and output together.
      max_num_seqs: Requests that run together: rows of windows and carried values, and of the widest decode step.
      vocab_size: Token ids lie below this.
      min_first_chunk: Prompt tokens the first step of a request must hold.
      buckets: Shapes of the steps there are; the longest chunk of prefill holds `min_first_chunk`.
      layout: What is kept between steps.
      hidden_size: Numbers of a row of `StepOutputs.hidden`; 0 where the model has none.
      tensor_parallel_size: Devices that share every layer.
      max_logprobs: Most likely tokens reported beside each sampled one.
      tokenizer: Text to ids and back; None for models that have none.
      generation: Facts of the checkpoint (`GenerationDefaults`); None where nothing is known.
    """

    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def min_first_chunk(self) -> int: ...
    @property
    def buckets(self) -> Buckets: ...
    @property
    def layout(self) -> CacheLayout: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_logprobs(self) -> int: ...
    @property
    def tensor_parallel_size(self) -> int: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def generation(self) -> Any: ...

    def init_state(self) -> Any:
        """Returns pools and carried states, on the device."""

    def step(
        self, state: Any, inputs: StepInputs, sampler: SamplerInputs | None, *, variant: Variant, score: bool = False
    ) -> tuple[StepOutputs, Any]:
        """Runs one step; `state` is donated, the returned one takes its place. Scores come with the full variant."""
        ...

    def copy_pages(self, state: Any, sources: Any, targets: Any) -> Any:
        """Copies pages within the pools."""
        ...

    def read_pages(self, state: Any, pages: Any) -> Any:
        """Copies of pages, on the device."""
        ...

    def write_pages(self, state: Any, pages: Any, values: Any) -> Any:
        """Writes what `read_pages` gave into pages."""
        ...

    def read_slot(self, state: Any, slot: Any) -> Any:
        """A copy of what the request in a slot carries, on the device."""
        ...

    def write_slot(self, state: Any, slot: Any, values: Any) -> Any:
        """Writes what `read_slot` gave into a slot."""
        ...


def end_ids(compiled: CompiledModel) -> tuple[int, ...]:
    """Returns the ids that end a text: the checkpoint's, or the tokenizer's where the checkpoint says nothing."""
    if compiled.generation is not None:
        return tuple(compiled.generation.eos_token_ids)
    return tuple(getattr(compiled.tokenizer, "eos_token_ids", ()))
