"""One continuation of one prompt on its way through the engine, and the group of continuations a user asked for.

Knows no device, no text and no scheduling. The one idea: a request is its tokens and a count of how many of their rows
the caches hold; where it stands (waiting, prefill, decode, finished) follows from these, and so does what is left to
do after it lost its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastgpt_jax.engine.device_caches import SavedRows
from fastgpt_jax.engine.page_keys import PageKeys
from fastgpt_jax.engine.pooling import PoolingParams
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.structured import StructuredOutput


class Request:
    """One continuation.

    Invariants: it holds a slot and pages, or neither; `num_computed` rows lie in its pages once all steps given to the
    device are done, `num_computed < num_wanted` while it may run; `finish_reason` is set once, and then it holds
    nothing.

    Attributes:
      order: What comes first: lower priority values, then earlier arrivals.
      num_computed: Rows that its pages hold, or will hold when the steps under way are done.
      num_awaited: Tokens of its output that steps under way, or planned, will bring.
      pages: Its pages in order of position; None for one that was given back, since nobody will read it again.
      service: Prompt tokens it was served, by which equals take turns.
      structured: The form that its text must have (`StructuredOutput`); None where it is free.
      num_scored: Prompt tokens whose log-probabilities are known; the first has none.
      is_counted: Whether statistics know of it.
      is_scored: Whether the log-probabilities of all its prompt's tokens are known, or not wanted.
    """

    def __init__(
        self,
        group: RequestGroup,
        index: int,
        *,
        order: tuple[int, int, int],
        seed: int,
        keys: PageKeys,
        structured: StructuredOutput | None = None,
    ):
        self.group = group
        self.index = index
        self.order = order
        self.seed = seed
        self.keys = keys
        self.structured = structured
        self.needs_full_sampler = structured is not None or group.needs_full_sampler
        self.output_token_ids: list[int] = []
        self.slot: int | None = None
        self.pages: list[int | None] = []
        self.num_computed = 0
        self.num_named = 0
        self.num_awaited = 0
        self.is_scored = index > 0 or not group.wants_score or self.num_prompt == 1
        self.num_scored = 0
        self.is_counted = False
        self.saved: SavedRows | None = None
        self.service = 0
        self.snapshot_key: bytes | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    @property
    def params(self) -> SamplingParams | PoolingParams:
        return self.group.params

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.group.prompt_token_ids

    @property
    def num_prompt(self) -> int:
        return len(self.group.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output that are known."""
        return len(self.group.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_wanted(self) -> int:
        """Rows that its next token follows from; tokens under way are counted."""
        return len(self.group.prompt_token_ids) + len(self.output_token_ids) + self.num_awaited

    @property
    def num_left(self) -> int:
        """Rows to be computed before its next token."""
        return self.num_wanted - self.num_computed

    @property
    def held_slot(self) -> int:
        """Its slot; RuntimeError where it holds none."""
        if self.slot is None:
            raise RuntimeError("a request without a slot was scheduled")
        return self.slot

    @property
    def draws_unseen(self) -> bool:
        """Whether its next token but one can be drawn before anybody has looked at the next."""
        return self.structured is None and self.group.ignores_outputs(len(self.output_token_ids))

    @property
    def held_pages(self) -> list[int]:
        """The pages that it refers to."""
        return [page for page in self.pages if page is not None]

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def tokens(self, start: int, stop: int) -> list[int]:
        """Returns a stretch of prompt and output together, shorter where these end."""
        num_prompt = self.num_prompt
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return [*self.group.prompt_token_ids[start:stop], *self.output_token_ids[: max(stop - num_prompt, 0)]]

    def page_keys(self, num_pages: int) -> list[bytes]:
        """The names of its first pages, which must be full of known tokens."""
        return self.keys.up_to(num_pages, self.tokens)

    def append(self, token_id: int, max_model_len: int) -> None:
        """Adds a sampled token and decides, by ids alone, whether it is the last."""
        group = self.group
        self.output_token_ids.append(token_id)
        if token_id in group.eos_ids:
            self.end("stop", None)
        elif token_id in group.stop_ids:
            self.end("stop", token_id)
        elif self.num_tokens >= max_model_len or len(self.output_token_ids) == group.max_tokens:
            self.end("length", None)

    def will_end(self, max_model_len: int) -> bool:
        """Whether the tokens under way are the last for sure, whatever they are."""
        if not self.num_awaited:
            return False
        num_outputs = len(self.output_token_ids) + self.num_awaited
        return num_outputs == self.group.max_tokens or self.num_wanted >= max_model_len

    def end(self, finish_reason: str, stop_reason: str | int | None = None) -> None:
        """Finishes."""
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason


class RequestGroup:
    """What a user asked for under one id: a prompt and its `n` continuations, which share the prompt.

    Attributes:
      prompt: The prompt as text, where it came so.
      deadline: When it ends whatever it has, in seconds of the monotonic clock; None for never.
      eos_ids, stop_ids: Tokens that end it.
      first_scheduled: When its first step was given to the device.
      num_cached_tokens: Prompt tokens of its first continuation that were found in the prefix cache.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        *,
        arrival: float,
        deadline: float | None,
        eos_ids: Sequence[int],
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.params = params
        self.arrival = arrival
        self.deadline = deadline
        self.first_scheduled: float | None = None
        self.num_cached_tokens = 0
        self.requests: tuple[Request, ...] = ()
        if isinstance(params, PoolingParams):
            self.eos_ids, self.stop_ids = frozenset(), frozenset()
            self.max_tokens, self.min_tokens = 1, 0
            self.needs_full_sampler = self.wants_score = self.wants_logprobs = False
        else:
            self.eos_ids = frozenset(() if params.ignore_eos else eos_ids)
            self.stop_ids = frozenset(params.stop_token_ids)
            self.max_tokens, self.min_tokens = params.max_tokens, params.min_tokens
            self.needs_full_sampler = params.needs_full_sampler
            self.wants_score = params.prompt_logprobs is not None
            self.wants_logprobs = params.logprobs is not None

    def ignores_outputs(self, num_outputs: int) -> bool:
        """Whether what the sampler does with a continuation of so many tokens depends on none of them, nor changes."""
        if not self.needs_full_sampler:
            return True
        return not getattr(self.params, "has_penalties", False) and num_outputs >= self.min_tokens

    @property
    def is_pooling(self) -> bool:
        """Whether an embedding is wanted, and no continuation."""
        return isinstance(self.params, PoolingParams)

    @property
    def is_finished(self) -> bool:
        return all(request.is_finished for request in self.requests)


def make_requests(
    group: RequestGroup,
    *,
    number: int,
    priority: int,
    seed: int,
    salts: Sequence[str],
    page_size: int,
    make_structured: Callable[[], StructuredOutput | None] = lambda: None,
) -> None:
    """Gives a group its continuations.

    Args:
      number: How many groups came before it.
      seed: Of the first continuation; the others have those that follow.
      salts: What besides the tokens decides who may share their rows.
      make_structured: Makes the form that the text of one continuation must have; None where it is free.
    """
    num = 1 if isinstance(group.params, PoolingParams) else group.params.n
    group.requests = tuple(
        Request(
            group,
            index,
            order=(priority, number, index),
            seed=seed + index,
            keys=PageKeys(salts, page_size),
            structured=make_structured(),
        )
        for index in range(num)
    )
