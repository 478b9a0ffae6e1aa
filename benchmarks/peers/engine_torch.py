"""Torch: the decoder written out in its own operations, caches of fixed size updated in place.

The one idea: what somebody who writes it well gets from torch without kernels of their own: its matrix products
(oneDNN), its fused attention, nothing copied from step to step; optionally all of it through `torch.compile`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.peers.worker import TEMPERATURE, TOP_K

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Engine:
    """A model of Llama's or Qwen2's kind."""

    def __init__(self, model: str, threads: int, max_len: int, dtype: str, is_compiled: bool = False):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        folder = Path(model)
        self.config = json.loads((folder / "config.json").read_text())
        self.vocab_size = self.config["vocab_size"]
        self._settings = {"dtype": dtype, "threads": torch.get_num_threads(), "is_compiled": is_compiled}
        self._dtype, self._max_len = DTYPES[dtype], max_len
        tensors = {name: tensor.to(self._dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        self._decoder = Decoder(self.config, tensors)
        self._step = torch.compile(self._decoder.forward, dynamic=False) if is_compiled else self._decoder.forward
        self._caches: dict[int, list[torch.Tensor]] = {}
        self._random = torch.Generator().manual_seed(0)

    def about(self) -> dict[str, Any]:
        return {
            "version": torch.__version__,
            "build": _build(),
            "settings": {**self._settings, "attention": "scaled_dot_product_attention", "oneDNN": True},
        }

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        caches, length = self._caches_for(len(prompts)), len(prompts[0])
        ids = self._sample(self._decoder.forward(torch.tensor(prompts), 0, length, caches))
        ids = self._sample(self._step(ids, torch.tensor(length), self._window(length + steps), caches))
        start = time.perf_counter()
        for index in range(1, steps):
            at = torch.tensor(length + index)
            ids = self._sample(self._step(ids, at, self._window(length + steps), caches))
        return (time.perf_counter() - start) / (steps - 1)

    def prefill(self, prompt: list[int]) -> float:
        caches, start = self._caches_for(1), time.perf_counter()
        self._sample(self._decoder.forward(torch.tensor([prompt]), 0, len(prompt), caches))
        return time.perf_counter() - start

    def logits(self, prompt: list[int]) -> Any:
        return self._decoder.forward(torch.tensor([prompt]), 0, len(prompt), self._caches_for(1))[0].float().numpy()

    def _window(self, num_keys: int) -> int:
        """Keys that a step attends to, in eights, so that few shapes are compiled."""
        return min(self._max_len, -(-num_keys // 64) * 64)

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Draws a token a row; its shape is that of a step's tokens."""
        top, ids = torch.topk(logits.float(), min(TOP_K, logits.shape[-1]))
        chosen = torch.multinomial(torch.softmax(top / TEMPERATURE, -1), 1, generator=self._random)
        return ids.gather(1, chosen)

    def _caches_for(self, batch: int) -> list[torch.Tensor]:
        if batch not in self._caches:
            self._caches.clear()  # those of another batch would count as this one's memory
            config = self.config
            head_dim = config["hidden_size"] // config["num_attention_heads"]
            sizes = (batch, config["num_key_value_heads"], self._max_len, head_dim)
            count = 2 * config["num_hidden_layers"]
            self._caches[batch] = [torch.zeros(sizes, dtype=self._dtype) for _ in range(count)]
        return self._caches[batch]


def _build() -> str:
    """What its wheel calculates with: libraries, and the instructions in use."""
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    return "wheel; " + "; ".join(line for line in lines if line.startswith(("Intel(R)", "CPU capability")))


class Decoder:
    """The model; matrices that read the same input are one."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]):
        self._num_heads, self._num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._head_dim = config["hidden_size"] // self._num_heads
        self._epsilon = config["rms_norm_eps"]
        exponents = torch.arange(0, self._head_dim, 2, dtype=torch.float32) / self._head_dim
        self._frequencies = config["rope_theta"] ** -exponents
        self._embedding = tensors["model.embed_tokens.weight"]
        self._norm = tensors["model.norm.weight"]
        self._head = tensors.get("lm_head.weight", self._embedding)
        self._layers = [self._layer(tensors, index) for index in range(config["num_hidden_layers"])]

    @staticmethod
    def _layer(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor | None]:
        def take(*names: str, kind: str = "weight") -> torch.Tensor | None:
            found = [tensors.pop(f"model.layers.{index}.{name}.{kind}", None) for name in names]
            return None if found[0] is None else torch.cat(found)  # pyright: ignore[reportArgumentType]

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return {
            "qkv": take(*qkv),
            "qkv_bias": take(*qkv, kind="bias"),
            "output": take("self_attn.o_proj"),
            "gate_up": take("mlp.gate_proj", "mlp.up_proj"),
            "down": take("mlp.down_proj"),
            "norm": take("input_layernorm"),
            "mlp_norm": take("post_attention_layernorm"),
        }

    def forward(
        self, ids: torch.Tensor, start: int | torch.Tensor, window: int, caches: list[torch.Tensor]
    ) -> torch.Tensor:
        """Logits `[batch, vocabulary]` after the last of `ids`, which begin at position `start`; caches are written.

        Args:
          window: Keys attended to at most.
        """
        count = ids.shape[1]
        positions = torch.arange(count) + start
        angles = positions[:, None].float() * self._frequencies
        cos, sin = (torch.cat([f(angles)] * 2, -1).to(self._embedding.dtype) for f in (torch.cos, torch.sin))
        is_prompt = isinstance(start, int)
        mask = None if is_prompt else torch.arange(window)[None] <= positions[:, None]
        x = F.embedding(ids, self._embedding)
        for index, layer in enumerate(self._layers):
            keys, values = caches[2 * index], caches[2 * index + 1]
            q, k, v = self._heads(F.linear(self._normed(x, layer["norm"]), layer["qkv"], layer["qkv_bias"]))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            if not is_prompt:
                k, v = keys[:, :, :window], values[:, :, :window]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_prompt, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).flatten(2), layer["output"])
            gate, up = F.linear(self._normed(x, layer["mlp_norm"]), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(self._normed(x[:, -1], self._norm), self._head)

    def _normed(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._epsilon)

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        counts = [self._num_heads, self._num_kv_heads, self._num_kv_heads]
        heads = qkv.unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
        return heads.split(counts, 1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
