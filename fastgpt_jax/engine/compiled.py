"""What the engine asks of a compiled model: the whole of the seam between compiler and engine."""

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


def end_ids(compiled: CompiledModel) -> tuple[int, ...]:
    """Returns the ids that end a text: the checkpoint's, or the tokenizer's where the checkpoint says nothing."""
    if compiled.generation is not None:
        return tuple(compiled.generation.eos_token_ids)
    return tuple(getattr(compiled.tokenizer, "eos_token_ids", ()))
