"""What a zoo model is, and the questions tests ask of one.

Knows nothing of the compiler: a model is a training forward, its parameters and a few plain facts (which lengths it
accepts, how many tokens its first chunk must hold). The one idea: everything a test needs besides the forward itself
is derived here, so that the models read as their authors would have written them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Forward = Callable[..., Any]
MARK = "# refused here"


@dataclass(frozen=True)
class ZooModel:
    """A small causal language model, or one that only looks like it.

    Attributes:
      name: Unique over the zoo.
      make: Builds `(fn, params)`; `fn(params, tokens i32[B, T], ...)` returns logits f[B, T, V], or a tuple whose first
        or a dict whose `"logits"` entry they are.
      capacity: The `max_model_len` to derive at, in tokens.
      first_chunk: Fewest tokens at which a prefix already has its final logits (more than 1 for a prefix-LM).
      length_multiple: The forward raises unless T is a multiple of it.
      only_length: The forward raises at every other T.
      test_length: Tokens in `tokens_of(model)`.
      tolerance: Largest error allowed, relative to the largest logit.
      arguments: Per-token arguments that `fn` takes by name beside the tokens, each i32[B, T].
      optional: Causal, but hard to derive: may be served or refused, never wrong.
      notes: What is special about it.
      reason: Refused models: words expected in the message, whatever their case.
      guilty: Refused models: the function whose source holds the line(s) marked `# refused here`.
      for_now: Refused although causal: the derivation does not handle it yet.
    """

    name: str
    make: Callable[[], tuple[Forward, Any]]
    capacity: int = 32
    first_chunk: int = 1
    length_multiple: int = 1
    only_length: int | None = None
    test_length: int = 24
    tolerance: float = 2e-5
    arguments: tuple[str, ...] = ()
    optional: bool = False
    notes: str = ""
    reason: str | None = None
    guilty: Callable[..., Any] | None = None
    for_now: bool = False

    def accepts(self, length: int) -> bool:
        """Whether the forward runs at this length."""
        if self.only_length is not None:
            return length == self.only_length
        return length % self.length_multiple == 0


@contextlib.contextmanager
def jax_defaults() -> Iterator[None]:
    """Runs models as their authors would: with JAX's own promotion rules, whatever our test suite demands of us."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def token_arguments(model: ZooModel, tokens: Array) -> dict[str, Array]:
    """Values for the model's extra arguments that mean: one document, no padding, counted from zero."""
    values = {
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape),
        "attention_mask": jnp.ones(tokens.shape, jnp.int32),
        "segment_ids": jnp.zeros(tokens.shape, jnp.int32),
    }
    return {name: values[name] for name in model.arguments}


def logits_of(output: Any) -> Array:
    """The logits f[B, T, V] in what a forward returned."""
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


def full_forward(model: ZooModel, fn: Forward) -> Callable[[Any, Array], Array]:
    """The model as `(params, tokens i32[B, T]) -> logits f32[B, T, V]`, extra arguments filled in."""

    def forward(params: Any, tokens: Array) -> Array:
        return logits_of(fn(params, tokens, **token_arguments(model, tokens))).astype(jnp.float32)

    return forward


def tokens_of(model: ZooModel, vocab_size: int = 31, seed: int = 1) -> np.ndarray:
    """Token ids i32[1, test_length]: no padding (id 0) in front, some later."""
    tokens = np.random.default_rng(seed).integers(1, vocab_size, (1, model.test_length), dtype=np.int32)
    tokens[0, [3, 10]] = 0
    return tokens


def perturbation(model: ZooModel) -> tuple[int, int]:
    """A `(position, token id)` which, put into `tokens_of(model)`, moves logits of later positions.

    The position lies in the middle, behind every first chunk, and near enough to what follows for the narrowest
    window; `test_zoo_is_causal.py` holds that the full forward minds it.
    """
    tokens = tokens_of(model)
    position = model.test_length // 2
    return position, int(tokens[0, position]) % 30 + 1


def guilty_line(model: ZooModel) -> tuple[str, int]:
    """File and line of the first marked line of a refused model."""
    filename, lines = guilty_lines(model)
    return filename, lines[0]


def guilty_lines(model: ZooModel) -> tuple[str, tuple[int, ...]]:
    """File and lines, ascending, that a refusal may name.

    More than one where a reader could blame either, such as the loop over time and the stack behind it.
    """
    if model.guilty is None:
        raise ValueError(f"{model.name} marks no line")
    source, first = inspect.getsourcelines(model.guilty)
    lines = tuple(first + i for i, text in enumerate(source) if text.rstrip().endswith(MARK))
    if not lines:
        raise ValueError(f"{model.name}: no line of {model.guilty.__name__} ends in {MARK!r}")
    return inspect.getsourcefile(model.guilty) or "", lines
