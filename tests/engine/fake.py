"""A compiled model without a compiler: NumPy caches, and a next token that depends on every cached row it reads.

A row is a token and its position; the next token follows from all rows of a request as its pages show them, or, where
the model has a window, from those in it and a first few. So a wrong
page, a stale row, a missed copy, a wrong length or what another request left behind changes the tokens; a state used
after it was donated, a page that two requests write and a shape that was not announced are errors at once. A carried
program keeps a sum of its rows in its slot besides, and its next token follows from the sum and the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from fastgpt_jax.artifact.cache_layout import CacheEntry, CacheLayout, Reach
from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.sampling import full, greedy
from fastgpt_jax.sampling.inputs import init_sampler_inputs
from fastgpt_jax.sampling.logprobs import score
from fastgpt_jax.sampling.step_io import StepOutputs

VOCAB = 32
HIDDEN = 4
SAMPLERS = {
    "greedy": jax.jit(greedy.sample, static_argnums=2),
    "full": jax.jit(full.sample, static_argnums=2),
}
SCORE = jax.jit(score, static_argnums=2)
WEIGHTS = np.random.default_rng(0).integers(1, 2**31, 4096)


def rows_of(tokens, start=0) -> np.ndarray:
    """What the cache keeps of tokens: each with its position."""
    tokens = np.asarray(tokens, np.int64)
    return tokens + 100 * (start + np.arange(len(tokens)))


def sums_of(rows, reach=None) -> np.ndarray:
    """A number for every row that all rows up to it decide; with a reach, those that it leaves."""
    total = np.cumsum((np.asarray(rows) + 1) * WEIGHTS[: len(rows)])
    if reach is None or not len(total):
        return total
    begins = np.maximum(np.arange(len(total)) - reach.window + 1, 0)
    before = np.concatenate([[0], total])
    firsts = before[np.minimum(reach.num_first, begins)]
    return total - before[begins] + firsts


def best_after(sums) -> np.ndarray:
    return np.asarray(sums) % 1000003 % VOCAB


def logits_after(tokens) -> np.ndarray:
    """The model itself: logits after a sequence of tokens."""
    return logits_of(best_after(sums_of(rows_of(tokens))[-1]))


def logits_of(best) -> np.ndarray:
    return (-0.2 * ((np.arange(VOCAB) - np.asarray(best)[..., None]) % VOCAB)).astype(np.float32)


def hidden_after(sums) -> np.ndarray:
    return np.stack([np.asarray(sums) % n + 1.0 for n in (7, 11, 13, 17)], axis=-1).astype(np.float32)


def continue_greedily(prompt, num_tokens, reach=None) -> tuple[int, ...]:
    """What greedy decoding must give."""
    if reach is not None:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(best_after(sums_of(rows_of(tokens), reach)[-1])))
        return tuple(tokens[len(prompt) :])
    total = int(sums_of(rows_of(prompt))[-1])
    tokens = []
    for position in range(len(prompt), len(prompt) + num_tokens):
        tokens.append(int(best_after(total)))
        total += int((tokens[-1] + 100 * position + 1) * WEIGHTS[position])
    return tuple(tokens)


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
    carried: np.ndarray
    is_donated: bool = False

    def take(self):
        """Donates it; returns what takes its place."""
        if self.is_donated:
            raise AssertionError("a donated state was used again")
        self.is_donated = True
        return State(self.pages.copy(), self.carried.copy())

    def read(self):
        if self.is_donated:
            raise AssertionError("a donated state was read")
        return self


class _Layout(CacheLayout):
    transfer_pages = 3


@dataclasses.dataclass
class FakeCompiled:
    """Attributes: fails: Asked of every step's inputs; True makes it raise, after its state was donated."""

    max_model_len: int = 24
    max_num_seqs: int = 4
    tensor_parallel_size: int = 1
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    vocab_size: int = VOCAB
    min_first_chunk: int = 1
    prefill_buckets: tuple[int, ...] = (4, 8)
    max_logprobs: int = 5
    hidden_size: int = HIDDEN
    tokenizer: object = None
    generation: GenerationDefaults | None = None
    is_fast: bool = False
    max_num_batched_tokens: int = 2048
    decode_rows: tuple[int, ...] = ()
    page_size: int = 4
    num_pages: int | None = None
    form: str = "ragged"
    is_carried: bool = False
    reach: Reach | None = None
    fails: Callable | None = None
    shapes: set = dataclasses.field(default_factory=set)
    num_tokens: int = 0

    @functools.cached_property
    def buckets(self):
        prefill = []
        for chunk_len in self.prefill_buckets:
            together = max(1, min(self.max_num_seqs, self.max_num_batched_tokens // chunk_len))
            prefill += [(chunk_len, rows) for rows in sorted({1, together})]
        decode = {rows for rows in self.decode_rows if rows < self.max_num_seqs} | {self.max_num_seqs}
        return Buckets(tuple(prefill), tuple(sorted(decode)))

    @functools.cached_property
    def layout(self):
        entries = [CacheEntry("kv0", "kv", (), "int64", 1, 8, "fake.py:1", reach=self.reach)]
        if self.is_carried:
            entries.append(CacheEntry("carry1", "carry", (), "int64", 1, 8, "fake.py:2"))
        num_pages = self.num_pages or self.max_num_seqs * -(-self.max_model_len // self.page_size)
        form = "rectangular" if self.is_carried else self.form
        return _Layout(tuple(entries), self.page_size, num_pages, form)

    def init_state(self):
        layout = self.layout
        return State(np.full((layout.num_pages, layout.page_size), 7, np.int64), np.full(self.max_num_seqs, 7))

    def copy_pages(self, state, sources, targets):
        state = state.take()
        is_real = self._is_real(targets)
        state.pages[targets[is_real]] = state.pages[sources[is_real]]
        return state

    def read_pages(self, state, pages):
        return [state.read().pages[np.where(self._is_real(pages), pages, 0)]]

    def write_pages(self, state, pages, values):
        state, is_real = state.take(), self._is_real(pages)
        state.pages[pages[is_real]] = values[0][is_real]
        return state

    def read_slot(self, state, slot):
        return [state.read().carried[slot].copy()] if self.is_carried else []

    def write_slot(self, state, slot, values):
        state = state.take()
        state.carried[slot] = values[0]
        return state

    def _is_real(self, pages):
        layout = self.layout
        assert pages.shape == (layout.transfer_pages,) and pages.max() <= layout.num_pages
        return pages < layout.num_pages

    def step(self, state, inputs, sampler, *, variant, score=False):
        state = state.take()
        if self.fails is not None and self.fails(inputs):
            raise RuntimeError("the device is on fire")
        num_rows = len(inputs.num_new)
        chunk_len = self._check(inputs, sampler, num_rows, variant, score)
        busy = [row for row in range(num_rows) if inputs.num_new[row]]
        for row in busy:
            self._write(state, inputs, row, chunk_len)
        best = np.zeros(len(inputs.tokens), np.int64)
        hidden = np.zeros(num_rows, np.int64)
        for row in busy:
            sums = self._sums(state, inputs, row)
            best[row * chunk_len : row * chunk_len + len(sums)] = best_after(sums)
            hidden[row] = sums[-1]
        self.num_tokens += int(inputs.num_new.sum())
        self.shapes.add((len(inputs.tokens), num_rows, variant, score))
        last = np.arange(num_rows) * chunk_len + np.maximum(inputs.num_new - 1, 0)
        outputs = self._sample(best[last], sampler, variant)
        outputs = dataclasses.replace(outputs, hidden=hidden_after(hidden))
        if score:
            outputs = dataclasses.replace(outputs, score=SCORE(logits_of(best), inputs.targets, self.max_logprobs))
        return outputs, state

    def _write(self, state, inputs, row, chunk_len):
        """Writes a row's tokens into its pages, and garbage behind them, where no later row of the request writes."""
        start, num_new, table = int(inputs.cache_len[row]), int(inputs.num_new[row]), inputs.page_table[row]
        positions = np.arange(start, start + num_new)
        tokens = inputs.tokens[row * chunk_len : row * chunk_len + num_new]
        state.pages[table[positions // self.page_size], positions % self.page_size] = rows_of(tokens, start)
        is_last = not any(
            inputs.slots[other] == inputs.slots[row] and inputs.num_new[other] and inputs.cache_len[other] > start
            for other in range(len(inputs.num_new))
        )
        if is_last:
            stop = start + num_new
            state.pages[table[(stop - 1) // self.page_size], (stop - 1) % self.page_size + 1 :] = 9

    def _sums(self, state, inputs, row):
        """The numbers of a row's tokens, from what its pages hold, and from what its slot carries."""
        start, num_new = int(inputs.cache_len[row]), int(inputs.num_new[row])
        positions = np.arange(start + num_new)
        rows = state.pages[inputs.page_table[row, positions // self.page_size], positions % self.page_size]
        sums = sums_of(rows, self.reach)
        if not self.is_carried:
            return sums[start:]
        slot = inputs.slots[row]
        before = state.carried[slot] if start else 0
        carried = before + sums[start:] - (sums[start - 1] if start else 0)
        state.carried[slot] = carried[-1]
        return 2 * sums[start:] - carried

    def _check(self, inputs, sampler, num_rows, variant, score):
        chunk_len, rest = divmod(len(inputs.tokens), num_rows)
        shape = (chunk_len, num_rows)
        buckets = self.buckets
        assert rest == 0 and (shape in buckets.prefill or (chunk_len == 1 and num_rows in buckets.decode and not score))
        assert inputs.page_table.shape == (num_rows, self.layout.pages_per_request(self.max_model_len))
        ends = {}  # of the rows of each request, by its slot
        written, readers = {}, {}
        for row in range(num_rows):
            start, num_new, slot = int(inputs.cache_len[row]), int(inputs.num_new[row]), int(inputs.slots[row])
            if not num_new:
                continue
            assert num_new <= chunk_len and start + num_new <= self.max_model_len and slot < self.max_num_seqs
            if slot in ends:
                assert self.layout.form == "ragged" and ends[slot] == start, "rows of a request do not follow"
            elif start == 0:
                assert num_new >= self.min_first_chunk, "the first chunk is too short"
            assert start == 0 or start >= self.min_first_chunk or slot in ends
            ends[slot] = start + num_new if num_new == chunk_len else None
            table = inputs.page_table[row]
            for page in table[: -(-(start + num_new) // self.page_size)].tolist():
                readers.setdefault(page, set()).add(slot)
            for page in table[start // self.page_size : -(-(start + num_new) // self.page_size)].tolist():
                written.setdefault(page, set()).add(slot)
        for page, slots in written.items():
            assert readers[page] == slots and len(slots) == 1, "a page is written that another request reads"
        if variant == "greedy":
            assert sampler is None and not score
            return chunk_len
        expected = init_sampler_inputs(num_rows, VOCAB, self.max_model_len)
        jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), sampler, expected)
        return chunk_len

    def _sample(self, best, sampler, variant):
        if self.is_fast and variant == "greedy":
            zeros, none = np.zeros(len(best), np.float32), np.zeros((len(best), 0), np.float32)
            ids = best.astype(np.int32)
            return StepOutputs(ids, zeros, ids, none.astype(np.int32), none, np.zeros_like(ids))
        return SAMPLERS[variant](logits_of(best), sampler, self.max_logprobs)
