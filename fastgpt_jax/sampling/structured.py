"""Text that must have a form: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

Knows no requests and no engine. llguidance is imported when the first such request comes, and never before. The one
idea: a form is compiled once, within a deadline and under limits, into a matcher at its beginning; every request walks
a copy of it, which costs microseconds, and whatever can go wrong in the form goes wrong before the request is queued.
A compilation cannot be ended from outside: one that is late keeps its thread, and what it makes at last is kept too.
"""

from __future__ import annotations

import importlib.util
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as DeadlineError
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt32

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.structured_grammar import make_grammar
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams
from fastgpt_jax.sampling.structured_vocabulary import token_bytes

MAX_CACHED = 64
NUM_COMPILERS = 2
DEADLINE_S = 10.0
_LIMITS = {
    "max_lexer_states": 50_000,  # 1 to 2 kB each, so that a request takes 100 MB at the very most
    "max_grammar_size": 250_000,
    "max_items_in_row": 500,  # with 2,000, a token of an ambiguous grammar took a second; with 500 it takes 0.02 s
    "step_max_items": 10_000,
    "verbose_errors": False,
}
"""Limits of llguidance. A token that exceeds one ends its request with an error."""


class CompilersBusy(UserError):
    """Every thread compiles another form; the same request may be right a moment later.

    Attributes:
      retry_after_s: When one is expected to be free, in whole seconds.
    """

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StructuredCompiler:
    """Makes matchers for one model; may be asked by several threads.

    Invariants: the vocabulary is read once; at most `max_cached` forms are kept, those used last; what is given to
    `_pool` has a thread there (`_free` counts those without work), so that a deadline counts from a beginning.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        eos_ids: Sequence[int],
        *,
        max_cached: int = MAX_CACHED,
        deadline_s: float = DEADLINE_S,
    ):
        """Costs nothing; the vocabulary is read when the first form is compiled.

        Args:
          vocab_size: Of the model's logits; ids past the tokenizer's are never allowed.
          eos_ids: Tokens that end a text; they are allowed where the form may end.
          deadline_s: Longest that a form may compile, and longest that it waits for others before it.
        """
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(token_id for token_id in eos_ids if token_id < vocab_size)
        self._tokenizer = tokenizer
        self._max_cached = max_cached
        self.deadline_s = deadline_s
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._made: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()
        self._pool = ThreadPoolExecutor(NUM_COMPILERS, "structured-outputs")
        self._free = threading.Semaphore(NUM_COMPILERS)

    def prepare(self) -> None:
        """Reads the vocabulary, which takes seconds where it is large, unless that was done.

        Raises:
          UserError: There is no llguidance, or no tokenizer that it could be told of.
        """
        with self._reading:
            _ = self._vocabulary

    def is_compiled(self, params: StructuredOutputsParams) -> bool:
        """Whether a form is kept; costs nothing."""
        with self._lock:
            return params in self._made

    def compile(self, params: StructuredOutputsParams) -> None:
        """Compiles a form unless it is kept already; not to be called on an event loop.

        Raises:
          UserError: The form cannot be enforced, is beyond the limits, or took longer than the deadline.
          CompilersBusy: Other forms compiled for all of that time.
        """
        self._prototype(params)

    def start(self, params: StructuredOutputsParams) -> Any:
        """Returns llguidance's matcher at the beginning of a form."""
        return self._prototype(params).deep_copy()

    def _prototype(self, params: StructuredOutputsParams) -> Any:
        matcher = self._kept(params)
        if matcher is not None:
            return matcher
        self.prepare()  # outside the deadline: it is no request's fault
        if not self._free.acquire(timeout=self.deadline_s):
            raise CompilersBusy(
                f"structured_outputs.{params.kind} waited {self.deadline_s:g} s for other forms to compile; "
                "try again later",
                math.ceil(self.deadline_s),
            )
        future: Future[Any] = self._pool.submit(self._keep, params)
        try:
            return future.result(self.deadline_s)
        except DeadlineError:
            raise UserError(
                f"structured_outputs.{params.kind} took longer than {self.deadline_s:g} s to compile; simplify it"
            ) from None

    def _kept(self, params: StructuredOutputsParams) -> Any:
        with self._lock:
            if params in self._made:
                self._made.move_to_end(params)
            return self._made.get(params)

    def _keep(self, params: StructuredOutputsParams) -> Any:
        """Compiles a form, unless another thread did while this one waited, and keeps it."""
        try:
            matcher = self._kept(params) or self._compile(params)
            with self._lock:
                self._made[params] = matcher
                while len(self._made) > self._max_cached:
                    self._made.popitem(last=False)
            return matcher
        finally:
            self._free.release()

    def _compile(self, params: StructuredOutputsParams) -> Any:
        vocabulary = self._vocabulary
        from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415 - an optional extra

        grammar = make_grammar(params)
        limits = LLParserLimits(**_LIMITS)
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary, limits=limits)
        if is_wrong or messages:
            raise _refusal(params, messages[0])
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        # The first mask shows what building alone does not: a form that nothing satisfies, or one beyond the limits.
        first = matcher.deep_copy()
        mask = first.compute_bitmask()
        if "TooComplex" in first.stop_reason():
            raise _refusal(params, "it is too complex")
        if first.is_error() or not any(mask):
            raise _refusal(params, "no text of this model's tokens satisfies it")
        return matcher

    @cached_property
    def _vocabulary(self) -> Any:
        """The model's tokens as llguidance knows them."""
        if importlib.util.find_spec("llguidance") is None:
            raise UserError("structured_outputs needs the package llguidance; install it with pip install llguidance")
        from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415 - an optional extra

        source = _Vocabulary(token_bytes(self._tokenizer, self.vocab_size), sorted(self.eos_ids))
        return LLTokenizer(TokenizerWrapper(source), n_vocab=len(source.tokens), eos_token=source.eos_ids)


class StructuredOutput:
    """Where one text stands in its form.

    Invariants: `bitmask` allows exactly the tokens after which the form can still be completed, and the ends of text
    where it is complete; after `is_terminated` nothing is accepted.
    """

    def __init__(self, params: StructuredOutputsParams, compiler: StructuredCompiler, output_ids: Sequence[int] = ()):
        """Args: output_ids: Tokens of the text so far."""
        self._compiler = compiler
        self._matcher = compiler.start(params)
        self._bits: np.ndarray | None = None
        self.is_terminated = False
        self.failure: str | None = None
        for token_id in output_ids:
            self.accept(token_id)

    def bitmask(self) -> UInt32[np.ndarray, " W"]:
        """Returns `SamplerInputs.allowed_bits` of the next token; not to be changed by the caller."""
        if self._bits is None:
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: -(-self._compiler.vocab_size // 32)]
            self._bits = words.copy()
            self._bits[-1] &= _low_bits(self._compiler.vocab_size)
            if not self._bits.any() or self._matcher.is_error():
                self._fail(self._matcher.get_error() or "no token of the model continues the text")
        return self._bits

    def accept(self, token_id: int) -> None:
        """Takes the next token of the text; one that is not allowed, or that nothing may follow, makes it fail."""
        if self.is_terminated:
            return
        self._bits = None
        if token_id in self._compiler.eos_ids:
            self.is_terminated = True
            if not self._matcher.is_accepting():
                self._fail("the text ended before its form was complete")
        elif not self._matcher.consume_token(token_id):
            self._fail(self._matcher.get_error() or f"token {token_id} is not allowed here")
        else:
            self.is_terminated = self._matcher.is_stopped()
            if not self.is_terminated:
                self.bitmask()  # a text that cannot go on fails here, and not with a token that was never allowed
            elif not self._matcher.is_accepting():
                self._fail(self._matcher.get_error() or str(self._matcher.stop_reason()))

    def _fail(self, message: str) -> None:
        """Ends the request: its text can no longer be held to its form."""
        self.failure = f"structured_outputs failed: {_one_line(message)}"
        self.is_terminated = True


class _Vocabulary:
    """Tokens in the shape that llguidance's TokenizerWrapper asks for."""

    def __init__(self, tokens: list[bytes], eos_ids: list[int]):
        """A model without an end of text gets one past its vocabulary, whose bit nobody reads."""
        self.tokens = tokens if eos_ids else [*tokens, b""]
        self.eos_ids = eos_ids or [len(tokens)]
        self.eos_token_id = self.eos_ids[0]
        self.bos_token_id = None
        for token_id in self.eos_ids:
            self.tokens[token_id] = f"<end of text {token_id}>".encode()
        self.special_token_ids = self.eos_ids
        self._ids = {token: token_id for token_id, token in reversed(list(enumerate(tokens))) if token}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens that spell a text, longest first; bytes that have none are left out."""
        data, ids, start = text.encode() if isinstance(text, str) else text, [], 0
        while start < len(data):
            pieces = (data[start:stop] for stop in range(min(len(data), start + self._longest), start, -1))
            piece = next((piece for piece in pieces if piece in self._ids), None)
            ids += [] if piece is None else [self._ids[piece]]
            start += 1 if piece is None else len(piece)
        return ids


def _low_bits(vocab_size: int) -> np.uint32:
    """The bits of the last word that belong to the vocabulary."""
    return np.uint32(0xFFFFFFFF >> (-vocab_size % 32))


def _refusal(params: StructuredOutputsParams, message: str) -> UserError:
    return UserError(f"structured_outputs.{params.kind} cannot be enforced: {_one_line(message)}")


def _one_line(message: str) -> str:
    """What went wrong, without the places and the listing of a grammar that the user did not write."""
    text = re.sub(r"^at [0-9]+\([0-9]+\): |failed to compile JSON schema: ", "", message.partition("<state>")[0])
    line = " ".join(re.split(r"\n\s*[0-9]+ \|", text)[0].split())
    return line if len(line) <= 300 else line[:297] + "..."
