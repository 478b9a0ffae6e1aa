"""What stands for an AsyncLLM where routes are tested: it spells the alphabet, whatever it is asked."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fastgpt_jax import tokenizer as ours
from fastgpt_jax.engine.outputs import CompletionOutput, Logprob, RequestOutput
from fastgpt_jax.engine.stats import EngineStats
from fastgpt_jax.engine.stop import find_stop
from fastgpt_jax.serving.app import make_app
from fastgpt_jax.serving.metrics import ServerMetrics
from fastgpt_jax.serving.settings import ServerSettings

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
START, END, VOCAB = 256, 257, 258
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer() -> ours.Tokenizer:
    """A token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    return ours.Tokenizer(backend, eos_token_ids=(END,))


class FakeLLM:
    """Remembers what it was asked; `error` is raised before the first token, or after `error_after` of them."""

    model_name = "fake"

    def __init__(self, tokenizer="own", chat_template=CHATML, max_model_len=64):
        self.tokenizer = make_tokenizer() if tokenizer == "own" else tokenizer
        self.compiled = SimpleNamespace(chat_template=chat_template, layout=None)
        self.max_model_len, self.vocab_size, self.max_logprobs, self.max_num_seqs = max_model_len, VOCAB, 5, 4
        self.is_alive = self.is_ready = True
        self.is_draining = False
        self.num_unfinished, self.queue_s = 0, 0.0
        self.asked: list[SimpleNamespace] = []
        self.num_left = 0
        self.error: Exception | None = None
        self.error_after = 0
        self.ends_with: str | None = None
        self.delay_s = 0.0

    def observe(self, observer):
        pass

    def stats(self):
        return EngineStats()

    def room(self, num_sequences, num_tokens):
        return contextlib.nullcontext()

    async def aside(self, work):
        return await asyncio.to_thread(work)

    async def generate(self, request_id, prompt, params, *, priority=0, deadline_s=None, cache_salt="", room=None):
        ids = prompt["prompt_token_ids"]
        self.asked.append(
            SimpleNamespace(
                request_id=request_id,
                text=prompt["prompt"],
                ids=ids,
                params=params,
                priority=priority,
                deadline_s=deadline_s,
                cache_salt=cache_salt,
            )
        )
        num_tokens = min(params.max_tokens or 8, self.max_model_len - len(ids))
        is_ended = False
        try:
            for length in range(1, num_tokens + 1):
                await asyncio.sleep(self.delay_s) if self.delay_s >= 0 else None
                if self.error is not None and length > self.error_after:
                    raise self.error
                output = self._output(request_id, prompt, params, length, num_tokens)
                is_ended = output.finished
                yield output
                if is_ended:
                    return
        finally:
            self.num_left += not is_ended

    async def embed(self, request_id, prompts, *, cache_salt=""):
        self.asked.append(SimpleNamespace(request_id=request_id, prompts=prompts, cache_salt=cache_salt))
        await asyncio.sleep(max(self.delay_s, 0))
        if self.error is not None:
            raise self.error
        return [
            SimpleNamespace(embedding=np.array([0.6, -0.8], np.float32), prompt_token_ids=p["prompt_token_ids"])
            for p in prompts
        ]

    def _output(self, request_id, prompt, params, length, num_tokens):
        text = (LETTERS * 3)[:length]
        ids = tuple(self.tokenizer.encode(text)) if self.tokenizer else tuple(range(length))
        match = find_stop(text, params.stop)
        reason = "stop" if match else "length" if length == num_tokens else None
        if self.ends_with is not None and length == num_tokens:
            reason = self.ends_with
        continuation = CompletionOutput(
            index=0,
            text=(text[: match.start] if match else text) if self.tokenizer else "",
            token_ids=ids,
            cumulative_logprob=-0.5 * length,
            logprobs=None if params.logprobs is None else tuple(map(self._row, ids)),
            finish_reason=reason,
            stop_reason=match.stop if match else None,
        )
        outputs = tuple(CompletionOutput(**{**continuation.__dict__, "index": index}) for index in range(params.n))
        scored = None
        if params.prompt_logprobs is not None:
            scored = (None, *map(self._row, prompt["prompt_token_ids"][1:]))
        return RequestOutput(
            request_id, prompt["prompt"], tuple(prompt["prompt_token_ids"]), scored, outputs, reason is not None
        )

    def _row(self, token_id):
        """The token itself is second to `z`, and `y` was made impossible."""
        spell = self._spell
        z, y = (self.tokenizer.encode("zy")) if self.tokenizer else (30, 31)
        return {
            token_id: Logprob(-0.5, 2, spell(token_id)),
            z: Logprob(-0.25, 1, spell(z)),
            y: Logprob(float("-inf"), 3, spell(y)),
        }

    def _spell(self, token_id):
        return self.tokenizer.decode([token_id], skip_special_tokens=False) if self.tokenizer else None


def make_server(llm=None, routers=(), **settings):
    """A fake and the application that serves it."""
    llm = FakeLLM() if llm is None else llm
    settings = ServerSettings(**{"served_model_names": ("fake", "org/alias"), **settings})
    return llm, make_app(llm, settings, counted=Uncounted(), routers=routers)


class Uncounted(ServerMetrics):
    """Metrics of nothing."""

    def __init__(self):
        self.registry = CollectorRegistry()
