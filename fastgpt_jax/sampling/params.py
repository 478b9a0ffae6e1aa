"""What a request may ask of the sampler, in vLLM's names, and the ranges that are accepted.

Knows no model: what depends on the vocabulary, the context or the tokenizer is checked by the engine. The one idea:
every value is checked when it is set, so that nothing downstream meets a NaN or a negative count.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeGuard, no_type_check

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.inputs import MAX_LOGIT_BIAS
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams, as_structured_outputs


@no_type_check  # a wrong type is the user's mistake, and answered as one below, not by the test suite's type checks
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    Invariants: every number is finite and within the range its error message names; `stop` and `stop_token_ids` are
    tuples and `logit_bias` is a dict, whatever they were given as (a string, a list, None); a seed of -1 is None.

    Attributes:
      n: Continuations of the prompt, each with a seed of its own.
      temperature: 0 is greedy.
      top_p, top_k, min_p, typical_p: Truncations; `top_k` of -1 or 0 keeps all.
      presence_penalty, frequency_penalty: Subtracted from the logits of generated tokens.
      repetition_penalty: Divides the logits of tokens seen in prompt or output.
      seed: Makes the continuation the same in every run and batch; drawn from the engine's seed when None.
      stop: Strings that end the text.
      stop_token_ids: Tokens that end it.
      ignore_eos: Continue past the model's end-of-sequence tokens.
      max_tokens: Most tokens to generate; None means until the context is full.
      min_tokens: No end before this many.
      logprobs: Log-probabilities of this many most likely tokens beside each generated one.
      prompt_logprobs: The same for the prompt.
      logit_bias: Added to the logits of the tokens named.
      skip_special_tokens: Leave special tokens out of the text.
      include_stop_str_in_output: Keep the stop string in the text.
      structured_outputs: The form that the text must have (`StructuredOutputsParams`, or a mapping of its arguments).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        _check_collections(self)
        _set(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        _set(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _set(self, "logit_bias", dict(self.logit_bias or {}))
        _set(self, "seed", None if self.seed == -1 else self.seed)
        for name, (low, high, allowed) in _NUMBERS.items():
            _check_number(name, getattr(self, name), low, high, allowed)
        for name, (low, optional) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), low, optional)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _require(
                isinstance(getattr(self, name), bool), f"{name} must be True or False, got {getattr(self, name)!r}"
            )
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens must not exceed max_tokens, got {self.min_tokens} and {self.max_tokens}",
        )
        _check_entries(self)
        _set(self, "structured_outputs", as_structured_outputs(self.structured_outputs))
        _require(
            self.structured_outputs is None or not self.ignore_eos,
            "ignore_eos has no meaning with structured_outputs, whose form says where the text ends; leave one out",
        )

    @property
    def has_penalties(self) -> bool:
        """Whether tokens are drawn with an eye on those before them."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def needs_full_sampler(self) -> bool:
        """Whether anything but the most likely token may be asked for."""
        neutral = SamplingParams(temperature=0)
        names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens")
        is_moved = any(getattr(self, name) != getattr(neutral, name) for name in names)
        return self.temperature > 0 or is_moved or self.structured_outputs is not None


_NUMBERS = {
    "temperature": (0.0, 1e6, "between 0 and 1000000"),
    "top_p": (math.ulp(0.0), 1.0, "above 0 and at most 1"),
    "min_p": (0.0, 1.0, "between 0 and 1"),
    "typical_p": (math.ulp(0.0), 1.0, "above 0 and at most 1"),
    "presence_penalty": (-2.0, 2.0, "between -2 and 2"),
    "frequency_penalty": (-2.0, 2.0, "between -2 and 2"),
    "repetition_penalty": (1e-3, 1e3, "between 0.001 and 1000"),
}
"""Name -> lowest value, highest value, the range in words.

Past these, float32 makes infinities of logits and NaN of forbidden ones, which were then drawn.
"""

_INTEGERS = {
    "n": (1, False),
    "top_k": (-1, False),
    "max_tokens": (1, True),
    "min_tokens": (0, False),
    "logprobs": (0, True),
    "prompt_logprobs": (0, True),
    "seed": (-(2**63), True),
}
"""Name -> lowest value, whether None is allowed."""


def _set(params: SamplingParams, name: str, value: Any) -> None:
    object.__setattr__(params, name, value)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_number(name: str, value: Any, low: float, high: float, allowed: str) -> None:
    _require(_is_number(value) and low <= value <= high, f"{name} must be {allowed}, got {value!r}")


def _check_integer(name: str, value: Any, low: int, optional: bool) -> None:
    if value is None and optional:
        return
    allowed = f"an integer of at least {low}" if low > -(2**63) else "a 64-bit integer"
    suffix = " or None" if optional else ""
    _require(_is_integer(value) and low <= value < 2**63, f"{name} must be {allowed}{suffix}, got {value!r}")


def _check_collections(params: SamplingParams) -> None:
    """Checks that `stop`, `stop_token_ids` and `logit_bias` hold entries at all."""
    for name, kinds, allowed in (
        ("stop", (str, Sequence, Set), "a string or a list of strings"),
        ("stop_token_ids", (Sequence, Set), "a list of token ids"),
        ("logit_bias", (Mapping,), "a mapping of token ids to numbers"),
    ):
        value = getattr(params, name)
        _require(value is None or isinstance(value, kinds), f"{name} must be {allowed}, got {value!r}")


def _check_entries(params: SamplingParams) -> None:
    """Checks what `stop`, `stop_token_ids` and `logit_bias` hold."""
    for text in params.stop:
        _require(isinstance(text, str) and text != "", f"stop must hold non-empty strings, got {text!r}")
    for token_id in (*params.stop_token_ids, *params.logit_bias):
        _require(
            _is_integer(token_id) and token_id >= 0,
            f"stop_token_ids and the keys of logit_bias must be token ids of at least 0, got {token_id!r}",
        )
    for value in params.logit_bias.values():
        _check_number("a value of logit_bias", value, -100.0, 100.0, "between -100 and 100")
    _require(
        len(params.logit_bias) <= MAX_LOGIT_BIAS,
        f"logit_bias may name at most {MAX_LOGIT_BIAS} tokens, got {len(params.logit_bias)}",
    )
