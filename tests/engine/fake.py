"""A compiled model without a compiler: a NumPy cache, and a next token that depends on every cached token.

Reading a wrong page, a wrong length or what another request left behind changes the tokens; a state used after it was
donated, a page named twice and a shape that was not announced are errors at once.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fastgpt_jax.artifact.cache_layout import CacheEntry, CacheLayout
from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.sampling import full, greedy
from fastgpt_jax.sampling.inputs import init_sampler_inputs
from fastgpt_jax.sampling.logprobs import score

VOCAB = 32
SAMPLERS = {
    "greedy": jax.jit(greedy.sample, static_argnums=2),
    "full": jax.jit(full.sample, static_argnums=2),
}
SCORE = jax.jit(score, static_argnums=2)


def logits_after(tokens) -> np.ndarray:
    """The model itself: logits after a sequence of tokens."""
    tokens = np.asarray(tokens, np.int64)
    best = int((tokens * (np.arange(len(tokens)) % 5 + 1)).sum() + len(tokens)) % VOCAB
    return (-0.2 * ((np.arange(VOCAB) - best) % VOCAB)).astype(np.float32)


def continue_greedily(prompt, num_tokens) -> tuple[int, ...]:
    """What greedy decoding must give."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(logits_after(tokens))))
    return tuple(tokens[len(prompt) :])


class CharTokenizer:
    """Letters for tokens; the last token, `$`, ends a text."""

    letters = "abcdefghijklmnopqrstuvwxyz .,!?$"

    def encode(self, text):
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.letters[i] for i in ids)


@dataclasses.dataclass
class State:
    pages: np.ndarray
    is_donated: bool = False


@dataclasses.dataclass
class FakeCompiled:
    max_model_len: int = 24
    max_num_seqs: int = 4
    tensor_parallel_size: int = 1
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    vocab_size: int = VOCAB
    min_first_chunk: int = 1
    prefill_buckets: tuple[int, ...] = (4, 8)
    max_logprobs: int = 5
    tokenizer: object = None
    generation: GenerationDefaults | None = None
    is_fast: bool = False
    max_num_batched_tokens: int = 2048
    decode_rows: tuple[int, ...] = ()
    shapes: set = dataclasses.field(default_factory=set)

    @property
    def buckets(self):
        prefill = []
        for chunk_len in self.prefill_buckets:
            together = max(1, min(self.max_num_seqs, self.max_num_batched_tokens // chunk_len))
            prefill += [(chunk_len, rows) for rows in sorted({1, together})]
        decode = {rows for rows in self.decode_rows if rows < self.max_num_seqs} | {self.max_num_seqs}
        return Buckets(tuple(prefill), tuple(sorted(decode)))

    @property
    def layout(self):
        entry = CacheEntry("kv0", "kv", (), "int32", 1, 4, "fake.py:1")
        return CacheLayout((entry,), self.max_model_len, self.max_num_seqs, "ragged")

    def init_state(self):
        return State(np.full((self.max_num_seqs, self.max_model_len), 7, np.int32))

    def step(self, state, inputs, sampler, *, variant, score=False):
        if state.is_donated:
            raise AssertionError("a donated state was used again")
        state.is_donated = True
        pages, num_rows = state.pages.copy(), len(inputs.num_new)
        chunk_len = self._check(inputs, sampler, num_rows, variant, score)
        logits = np.full((len(inputs.tokens), VOCAB), np.nan, np.float32)
        for row, (page, start, num_new) in enumerate(
            zip(inputs.page_table[:, 0], inputs.cache_len, inputs.num_new, strict=True)
        ):
            if num_new and start == 0 and num_new < self.min_first_chunk:
                raise AssertionError("the first chunk is too short")
            pages[page, start : start + num_new] = inputs.tokens[row * chunk_len : row * chunk_len + num_new]
            pages[page, start + num_new :] = np.where(num_new, 9, pages[page, start + num_new :])  # leaves garbage
            for i in range(num_new):
                logits[row * chunk_len + i] = logits_after(pages[page, : start + i + 1])
        self.shapes.add((len(inputs.tokens), num_rows, variant, score))
        last = np.arange(num_rows) * chunk_len + np.maximum(inputs.num_new - 1, 0)
        outputs = self._sample(logits[last], sampler, variant)
        if score:
            outputs = dataclasses.replace(outputs, score=SCORE(logits, inputs.targets, self.max_logprobs))
        return outputs, State(pages)

    def _check(self, inputs, sampler, num_rows, variant, score):
        chunk_len, rest = divmod(len(inputs.tokens), num_rows)
        assert rest == 0 and chunk_len in (1, *self.prefill_buckets)
        pages = inputs.page_table[inputs.num_new > 0, 0].tolist()
        assert len(set(pages)) == len(pages), "a page is named twice"
        assert np.all(inputs.cache_len + inputs.num_new <= self.max_model_len)
        if variant == "greedy":
            assert sampler is None and not score
            return chunk_len
        expected = init_sampler_inputs(num_rows, VOCAB, self.max_model_len)
        jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), sampler, expected)
        return chunk_len

    def _sample(self, logits, sampler, variant):
        if self.is_fast and variant == "greedy":
            ids = np.argmax(np.nan_to_num(logits), axis=1).astype(np.int32)
            zeros, none = np.zeros(len(ids), np.float32), np.zeros((len(ids), 0), np.float32)
            return full.StepOutputs(ids, zeros, ids, none.astype(np.int32), none, np.zeros_like(ids))
        return SAMPLERS[variant](logits, sampler, self.max_logprobs)
