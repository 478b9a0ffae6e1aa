"""An engine without a model: every step adds a token to each running request, as fast or as badly as a test wants."""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

from fastgpt_jax.engine.outputs import CompletionOutput, RequestOutput
from fastgpt_jax.engine.stats import EngineStats, RequestMetrics
from fastgpt_jax.errors import UserError

VOCAB = 100


class Tokenizer:
    """A token a character, by its code."""

    eos_token_ids = ()

    def encode(self, text):
        return [ord(letter) % VOCAB for letter in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


@dataclasses.dataclass
class Running:
    prompt: dict
    params: object
    options: dict
    token_ids: list
    arrival: float
    first_token: float | None = None


class ScriptedEngine:
    """Tokens 0, 1, 2 ... for everybody; `before_step` may sleep, wait or raise."""

    def __init__(self, *, max_num_seqs=4, max_model_len=64, before_step=lambda engine: None):
        self.compiled = SimpleNamespace(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            max_logprobs=5,
            generation=None,
            tokenizer=Tokenizer(),
            buckets=None,
            layout=SimpleNamespace(page_size=max_model_len, num_pages=max_num_seqs),
        )
        self.tokenizer = self.compiled.tokenizer
        self.before_step = before_step
        self.requests: dict[str, Running] = {}
        self.aborted: list[str] = []
        self.num_steps = self.prompt_tokens = self.generation_tokens = self.num_compiles = 0
        self.threads: set[int] = set()

    def check_request(self, prompt, params, *, compiles=True):
        ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt
        text = ids if isinstance(ids, str) else None
        ids = self.tokenizer.encode(ids) if isinstance(ids, str) else list(ids)
        if len(ids) >= self.compiled.max_model_len:
            raise UserError(f"the prompt has {len(ids)} tokens and the context holds {self.compiled.max_model_len}")
        return text, ids

    def add_request(self, request_id, prompt, params=None, **options):
        self.threads.add(threading.get_ident())
        self.requests[request_id] = Running(prompt, params, options, [], time.monotonic())

    def abort_request(self, request_id):
        self.threads.add(threading.get_ident())
        for name in [request_id] if isinstance(request_id, str) else request_id:
            if self.requests.pop(name, None) is not None:
                self.aborted.append(name)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        self.threads.add(threading.get_ident())
        self.before_step(self)
        self.num_steps += 1
        outputs = []
        for request_id, request in list(self.requests.items())[: self.compiled.max_num_seqs]:
            now = time.monotonic()
            if request.first_token is None:
                request.first_token = now
                self.prompt_tokens += len(request.prompt["prompt_token_ids"])
            request.token_ids.append(len(request.token_ids))
            self.generation_tokens += 1
            finished = len(request.token_ids) >= request.params.max_tokens
            metrics = RequestMetrics(
                request.arrival, request.first_token, request.first_token, now if finished else None
            )
            outputs.append(self._output(request_id, request, finished, metrics))
            if finished:
                del self.requests[request_id]
        return outputs

    def start(self): ...

    def interrupt(self): ...

    def close(self): ...

    def stats(self):
        running = min(len(self.requests), self.compiled.max_num_seqs)
        return EngineStats(
            num_running=running,
            num_waiting=len(self.requests) - running,
            kv_cache_usage=running / self.compiled.max_num_seqs,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            num_steps=self.num_steps,
            num_compiles=self.num_compiles,
        )

    def _output(self, request_id, request, finished, metrics):
        reason = "length" if finished else None
        ids = tuple(request.token_ids)
        completions = tuple(
            CompletionOutput(index, self.tokenizer.decode(ids), ids, 0.0, None, reason)
            for index in range(request.params.n)
        )
        prompt_ids = tuple(request.prompt["prompt_token_ids"])
        return RequestOutput(request_id, request.prompt.get("prompt"), prompt_ids, None, completions, finished, metrics)
