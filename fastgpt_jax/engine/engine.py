"""The loop: requests in, steps of the compiled model, outputs out. vLLM's `LLMEngine` in name and meaning.

The one idea: everything that happens is one of add, abort and step, and the engine is consistent after each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastgpt_jax.engine.args import EngineArgs
from fastgpt_jax.engine.compiled import CompiledModel, end_ids
from fastgpt_jax.engine.loading import resolve_model
from fastgpt_jax.engine.offline import Offline, Params
from fastgpt_jax.engine.outputs import Logprob, RequestOutput
from fastgpt_jax.engine.prompts import Prompt, check_params, check_prompt, encode_prompt
from fastgpt_jax.engine.request import Request, RequestGroup
from fastgpt_jax.engine.runner import Runner
from fastgpt_jax.engine.scheduler import Batch, Scheduler
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.step_io import StepOutputs


class LLMEngine:
    """Runs requests of different lengths together.

    Invariants: an id names at most one unfinished group; the scheduler holds exactly the unfinished requests of these
    groups. The same requests in the same order give the same outputs.
    """

    def __init__(self, compiled: CompiledModel, *, seed: int = 0):
        """Args: seed: Decides the draws of requests that bring no seed, by their order of arrival."""
        if compiled.buckets.chunk_lens[-1] < compiled.min_first_chunk:
            raise RuntimeError(
                f"no prefill bucket of {compiled.buckets.chunk_lens} holds the first {compiled.min_first_chunk} tokens "
                "that the model needs at once"
            )
        self.compiled = compiled
        self._seed = seed
        self._num_added = 0
        self._groups: dict[str, RequestGroup] = {}
        self._runner = Runner(compiled)
        pages_per_request = compiled.layout.pages_per_request(compiled.max_model_len)
        num_slots = min(compiled.max_num_seqs, compiled.layout.num_pages // pages_per_request)
        self._scheduler = Scheduler(num_slots, compiled.buckets)
        self._offline = Offline(self)
        self.num_full_sorts = 0

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        """Compiles what `args.model` names, if it is not compiled already."""
        return cls(resolve_model(args), seed=args.seed)

    @property
    def tokenizer(self) -> Any:
        return self.compiled.tokenizer

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._groups)

    def get_num_unfinished_requests(self) -> int:
        """Returns how many ids are waiting or running."""
        return len(self._groups)

    def check_request(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        """Returns a prompt's text and ids; raises UserError where the request could not be run."""
        check_params(params, self.compiled)
        text, token_ids = encode_prompt(prompt, self.tokenizer)
        check_prompt(token_ids, self.compiled)
        return text, token_ids

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Queues a prompt; a request that cannot be run raises UserError and leaves the others as they are."""
        params = SamplingParams() if params is None else params
        if request_id in self._groups:
            raise UserError(f"request id {request_id!r} is in use by an unfinished request")
        text, token_ids = self.check_request(prompt, params)
        group = RequestGroup(
            request_id,
            text,
            token_ids,
            params,
            seed=self._next_seed() if params.seed is None else params.seed,
            eos_ids=end_ids(self.compiled),
            tokenizer=self.tokenizer,
        )
        self._groups[request_id] = group
        for request in group.requests:
            self._scheduler.add(request)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Forgets requests and frees their slots at once; ids that are not running are ignored."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            group = self._groups.pop(name, None)
            if group is not None:
                self._scheduler.remove(group.requests)

    def step(self) -> list[RequestOutput]:
        """Runs one prefill or decode step; returns the requests that got a token, with all they have so far."""
        for request in self._scheduler.admit():
            self._runner.admit(request)
        batch = self._scheduler.next_batch()
        if batch is None:
            return []
        outputs = self._runner.run(batch)
        advanced = [request for row in range(len(batch.rows)) if (request := self._absorb(batch, row, outputs))]
        self._scheduler.remove([request for request in advanced if request.is_finished])
        groups = dict.fromkeys(request.group for request in advanced)
        for group in groups:
            if group.is_finished:
                del self._groups[group.request_id]
        return [group.to_output() for group in groups]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continues every prompt; as `LLM.generate`, for callers that hold an engine."""
        return self._offline.generate(prompts, prompt_token_ids, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Continues every prompt; as `LLM.stream`, for callers that hold an engine."""
        return self._offline.stream(prompts, prompt_token_ids, sampling_params)

    def _absorb(self, batch: Batch, row: int, outputs: StepOutputs) -> Request | None:
        """Takes one row's results; returns its request if that brought a token."""
        request = batch.rows[row]
        if request is None:
            return None
        if request.wants_score and request.is_prefilling:
            self._absorb_scores(batch, row, outputs)
        request.num_cached += batch.num_new[row]
        if request.is_prefilling:
            return None
        token_id, logprob = int(outputs.ids[row]), float(outputs.logprobs[row])
        self.num_full_sorts += int(outputs.full_sorts[row])
        request.cumulative_logprob += logprob
        if request.params.logprobs is not None:
            request.logprobs.append(
                self._logprobs(
                    token_id,
                    Logprob(logprob, int(outputs.ranks[row]), self._token_text(token_id)),
                    outputs.top_ids[row],
                    outputs.top_logprobs[row],
                    request.params.logprobs,
                )
            )
        request.append(token_id, self.compiled.max_model_len)
        if not request.is_finished:
            self._runner.append(request, token_id)
        return request

    def _absorb_scores(self, batch: Batch, row: int, outputs: StepOutputs) -> None:
        """Adds the log-probabilities of the prompt tokens that follow this chunk's tokens."""
        request, scores = batch.rows[row], outputs.score
        if request is None or scores is None or request.params.prompt_logprobs is None:
            raise RuntimeError("scores were asked for and not computed")
        following = request.prompt_token_ids[request.num_cached + 1 : request.num_cached + batch.num_new[row] + 1]
        for index, token_id in enumerate(following, start=row * batch.chunk_len):
            own = Logprob(float(scores.logprobs[index]), int(scores.ranks[index]), self._token_text(token_id))
            request.group.prompt_logprobs.append(
                self._logprobs(
                    token_id, own, scores.top_ids[index], scores.top_logprobs[index], request.params.prompt_logprobs
                )
            )

    def _logprobs(self, token_id: int, own: Logprob, top_ids: Any, top_logprobs: Any, num: int) -> dict[int, Logprob]:
        """Returns a token's own log-probability and those of the `num` most likely tokens."""
        result = {token_id: own}
        for rank in range(min(num, len(top_ids))):
            top_id = int(top_ids[rank])
            if top_id not in result:
                result[top_id] = Logprob(float(top_logprobs[rank]), rank + 1, self._token_text(top_id))
        return result

    def _token_text(self, token_id: int) -> str | None:
        if self.tokenizer is None:
            return None
        if hasattr(self.tokenizer, "detokenizer"):
            return self.tokenizer.decode([token_id], skip_special_tokens=False)
        return self.tokenizer.decode([token_id])

    def _next_seed(self) -> int:
        """Returns a seed that the engine's seed and the number of requests before this one decide."""
        self._num_added += 1
        return int(np.random.SeedSequence([self._seed, self._num_added]).generate_state(1, np.uint32)[0])

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant of the engine does not hold."""
        self._scheduler.check_integrity()
        held = [*self._scheduler.waiting, *self._scheduler.running.values()]
        expected = [r for group in self._groups.values() for r in group.requests if not r.is_finished]
        if set(map(id, held)) != set(map(id, expected)) or len(held) != len(expected):
            raise RuntimeError(f"the scheduler holds {len(held)} requests and {len(expected)} are unfinished")
