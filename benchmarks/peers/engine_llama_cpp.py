"""llama.cpp through its C functions: batches of several sequences, and its chain of samplers for each.

The one idea: nothing of Python's wrapper runs in a step; a batch is filled once and a token a sequence is exchanged, as
llama.cpp's own `batched-bench` and server do it.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np

from benchmarks.peers.worker import TEMPERATURE, TOP_K

CACHE_TYPES = {"f16": c.GGML_TYPE_F16, "f32": c.GGML_TYPE_F32, "q8_0": c.GGML_TYPE_Q8_0}


class Engine:
    """One model with a context."""

    def __init__(
        self,
        model: str,
        threads: int,
        max_len: int,
        cache_tokens: int,
        max_seqs: int,
        flash_attention: bool = True,
        cache_type: str = "f16",
        use_mmap: bool = True,
        use_repack: bool = True,
        kv_unified: bool = True,
        n_ubatch: int = 512,
    ):
        self._callback = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._callback, ctypes.c_void_p())
        c.llama_backend_init()
        model_params = c.llama_model_default_params()
        model_params.use_mmap, model_params.use_extra_bufts = use_mmap, use_repack
        self._model = c.llama_model_load_from_file(model.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        params = c.llama_context_default_params()
        params.n_ctx = cache_tokens
        params.n_batch, params.n_ubatch, params.n_seq_max = max_len, n_ubatch, max_seqs
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHE_TYPES[cache_type]
        params.flash_attn_type = int(flash_attention)
        params.kv_unified, params.no_perf, params.offload_kqv = kv_unified, True, False
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context with these settings")
        self._memory = c.llama_get_memory(self._context)
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._samplers = [self._make_sampler(seed) for seed in range(max_seqs)]
        self._batch = c.llama_batch_init(max_len, 0, 1)
        self._max_len = max_len
        self._settings = {
            "threads": threads,
            "flash_attention": flash_attention,
            "cache_type": cache_type,
            "use_mmap": use_mmap,
            "use_repack": use_repack,
            "kv_unified": kv_unified,
            "n_batch": max_len,
            "n_ubatch": n_ubatch,
            "n_ctx": params.n_ctx,
        }

    def about(self) -> dict[str, Any]:
        told = Path(sys.prefix, "llama_cpp_build_flags.txt")
        flags = told.read_text().strip() if told.is_file() else "unknown flags"
        system = c.llama_print_system_info().decode()
        return {"version": c.__version__, "build": f"{flags}; {system}", "settings": self._settings}

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        length = len(prompts[0])
        ids = self._step(self._read_prompts(prompts), length)
        start = time.perf_counter()
        for index in range(1, steps):
            ids = self._step(ids, length + index)
        return (time.perf_counter() - start) / (steps - 1)

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self._read_prompts([prompt])
        return time.perf_counter() - start

    def logits(self, prompt: list[int]) -> Any:
        self._read_prompts([prompt])
        return np.ctypeslib.as_array(c.llama_get_logits_ith(self._context, -1), (self.vocab_size,)).copy()

    def _read_prompts(self, prompts: list[list[int]]) -> list[int]:
        """Forgets everything, reads the prompts and draws a token for each."""
        c.llama_memory_clear(self._memory, False)
        for sampler in self._samplers:
            c.llama_sampler_reset(sampler)
        ids, rows = [], []
        for sequence, prompt in enumerate(prompts):
            if sum(len(prompts[0]) for _ in rows) + len(prompt) > self._max_len:
                ids += self._run(rows)
                rows = []
            rows.append([(i, p, sequence, p == len(prompt) - 1) for p, i in enumerate(prompt)])
        return ids + self._run(rows)

    def _step(self, ids: list[int], position: int) -> list[int]:
        return self._run([[(token_id, position, sequence, True)] for sequence, token_id in enumerate(ids)])

    def _run(self, rows: list[list[tuple[int, int, int, bool]]]) -> list[int]:
        """Decodes a batch of (id, position, sequence, is wanted); the ids drawn."""
        batch, wanted = self._batch, []
        batch.n_tokens = 0
        for token_id, position, sequence, is_wanted in (token for row in rows for token in row):
            index = batch.n_tokens
            batch.token[index], batch.pos[index] = token_id, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = is_wanted
            if is_wanted:
                wanted.append((sequence, index))
            batch.n_tokens += 1
        code = c.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode of {batch.n_tokens} tokens ended with {code}")
        return [c.llama_sampler_sample(self._samplers[s], self._context, index) for s, index in wanted]

    def _make_sampler(self, seed: int) -> Any:
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_k(TOP_K))
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(TEMPERATURE))
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(seed))
        return chain
