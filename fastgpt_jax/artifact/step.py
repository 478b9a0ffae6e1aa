"""The calling convention of a compiled step, and a step with its weights, ready to be called.

Knows no compiler and no engine. The one idea: an executable takes and gives flat lists of arrays (state, weights,
inputs; outputs, state), so that calling it needs no pytree of anybody's classes and the order is written down once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.sampling.inputs import SamplerInputs, init_sampler_inputs
from fastgpt_jax.sampling.step_io import ScoreOutputs, StepInputs, StepOutputs

FlatStep = Callable[[list[Any], list[Any], list[Any]], tuple[list[Any], list[Any]]]
"""`(state, weights, inputs) -> (outputs, state)`; the state passed in is donated."""

_INPUTS = tuple(f.name for f in dataclasses.fields(StepInputs) if f.name != "targets")
_SAMPLER = tuple(f.name for f in dataclasses.fields(SamplerInputs))
_OUTPUTS = tuple(f.name for f in dataclasses.fields(StepOutputs) if f.name != "score")
_SCORE = tuple(f.name for f in dataclasses.fields(ScoreOutputs))


def flatten_inputs(key: EntryPointKey, inputs: StepInputs, sampler: SamplerInputs | None) -> list[Any]:
    """The arrays a step reads, in order: the greedy variant reads no sampler, and only scoring reads targets."""
    flat = [getattr(inputs, name) for name in _INPUTS]
    if key.score:
        flat.append(inputs.targets)
    if key.variant == "full":
        flat += [getattr(sampler, name) for name in _SAMPLER]
    return flat


def unflatten_inputs(key: EntryPointKey, flat: Sequence[Any]) -> tuple[StepInputs, SamplerInputs | None]:
    """The inverse of `flatten_inputs`; targets that are not read are the tokens."""
    values = dict(zip(_INPUTS, flat, strict=False))
    rest = list(flat[len(_INPUTS) :])
    targets = rest.pop(0) if key.score else values["tokens"]
    sampler = SamplerInputs(**dict(zip(_SAMPLER, rest, strict=True))) if key.variant == "full" else None
    return StepInputs(**values, targets=targets), sampler


def flatten_outputs(outputs: StepOutputs) -> list[Any]:
    """The arrays a step gives, in order."""
    flat = [getattr(outputs, name) for name in _OUTPUTS]
    return flat if outputs.score is None else flat + [getattr(outputs.score, name) for name in _SCORE]


def unflatten_outputs(flat: Sequence[Any]) -> StepOutputs:
    """The inverse of `flatten_outputs`."""
    score = None
    if len(flat) > len(_OUTPUTS):
        score = ScoreOutputs(**dict(zip(_SCORE, flat[len(_OUTPUTS) :], strict=True)))
    return StepOutputs(**dict(zip(_OUTPUTS, flat, strict=False)), score=score)


def input_shapes(
    key: EntryPointKey, vocab_size: int, max_model_len: int, pages_per_request: int
) -> list[jax.ShapeDtypeStruct]:
    """Shapes of `flatten_inputs` for an entry point."""
    int32 = np.dtype(np.int32)
    tokens = np.zeros(key.num_tokens, int32)
    rows = np.zeros(key.num_requests, int32)
    page_table = np.zeros((key.num_requests, pages_per_request), int32)
    inputs = StepInputs(tokens, rows, page_table, rows, rows, tokens)
    sampler = init_sampler_inputs(key.num_requests, vocab_size, max_model_len) if key.variant == "full" else None
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flatten_inputs(key, inputs, sampler)]


@dataclasses.dataclass(frozen=True)
class Step:
    """One entry point with the weights it reads."""

    key: EntryPointKey
    run: FlatStep
    weights: list[Any]

    def __call__(
        self, state: list[Any], inputs: StepInputs, sampler: SamplerInputs | None
    ) -> tuple[StepOutputs, list[Any]]:
        """Runs the step; `state` is donated."""
        outputs, state = self.run(state, self.weights, flatten_inputs(self.key, inputs, sampler))
        return unflatten_outputs(outputs), state
