"""Writes the logits of transformers' models on tiny configurations into `goldens/`.

Needs the `parity` extra (torch, transformers); the tests that read the goldens do not. The first word of a golden's
name is its row in docs/models.md.

    python -m tests.parity.make_goldens            # all of them
    python -m tests.parity.make_goldens phi3 bloom # these alone
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.parity.weights import make_weights

FOLDER = Path(__file__).parent / "goldens"
NUM_TOKENS = 48  # Past the original context of 16 that the scalings below stretch.
VOCAB_SIZE = 61

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_MSCALE = YARN | {"mscale": 1.2, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}


WINDOW = 8  # Far shorter than the sequence.
GEMMA = SHAPE | {"head_dim": 16, "rms_norm_eps": 1e-6, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
# Of the short and of the long texts: one for each pair of dimensions of a head of 16.
FACTORS = [[round(1 + step * i, 2) for i in range(8)] for step in (0.05, 0.9)]


def rope(theta: float, scaling: dict | None = None) -> dict:
    return {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}


def llama(theta: float = 500.0, scaling: dict | None = None, **fields) -> LlamaConfig:
    own = {"head_dim": 16, "rms_norm_eps": 1e-5, "rope_parameters": rope(theta, scaling)}
    return LlamaConfig(**SHAPE | own | fields)


def qwen2(**fields) -> Qwen2Config:
    return Qwen2Config(**SHAPE | {"rms_norm_eps": 1e-6, "rope_parameters": rope(1e4)} | fields)


def mistral(**fields) -> MistralConfig:
    return MistralConfig(**SHAPE | {"rms_norm_eps": 1e-5, "rope_parameters": rope(500.0)} | fields)


def qwen3(**fields) -> Qwen3Config:
    return Qwen3Config(**SHAPE | {"head_dim": 16, "rms_norm_eps": 1e-6, "rope_parameters": rope(500.0)} | fields)


def gemma2(**fields) -> Gemma2Config:
    return Gemma2Config(**GEMMA | {"rope_parameters": rope(500.0)} | fields)


def gemma3(scaling: dict | None = None, **fields) -> Gemma3TextConfig:
    rotations = {"full_attention": rope(500.0, scaling), "sliding_attention": rope(50.0)}
    own = {"num_hidden_layers": 3, "sliding_window_pattern": 3, "rope_parameters": rotations}
    return Gemma3TextConfig(**GEMMA | own | fields)


def phi3(original: int | None = None, factors: int = 8, partial: float = 1.0, **fields) -> Phi3Config:
    """With an `original` length the scaling is longrope; heads are 16 wide."""
    names = ("short_factor", "long_factor")
    scaling = {"rope_type": "longrope"} | {n: f[:factors] for n, f in zip(names, FACTORS, strict=True)}
    rotations = rope(500.0, scaling if original else None) | {"partial_rotary_factor": partial}
    own = {"hidden_size": 64, "rope_parameters": rotations, "pad_token_id": 0, "eos_token_id": 2}
    return Phi3Config(**SHAPE | own | ({"original_max_position_embeddings": original} if original else {}) | fields)


def bloom(**fields) -> BloomConfig:
    return BloomConfig(**{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4} | fields)


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": llama(),
    "llama_tied_biased": llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama_linear": llama(scaling={"rope_type": "linear", "factor": 4.0}),
    "llama_llama3": llama(scaling=LLAMA3),
    "llama_yarn": llama(scaling=YARN),
    "llama_yarn_mscale": llama(scaling=YARN_MSCALE),
    "llama3": llama(500000.0),
    "llama3_1": llama(500000.0, LLAMA3 | {"factor": 8.0}),
    "llama3_2": llama(500000.0, LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True),
    "qwen2": qwen2(),
    "deepseek_llama": llama(500000.0, LLAMA3 | {"factor": 8.0}, num_hidden_layers=3, num_attention_heads=8, head_dim=8),
    "deepseek_qwen2": qwen2(
        hidden_size=48, num_attention_heads=6, use_sliding_window=False, sliding_window=4096, max_window_layers=21
    ),
    "mistral": mistral(sliding_window=WINDOW),
    "mistral_full": mistral(sliding_window=None, head_dim=16, rope_parameters=rope(1e6)),
    "qwen3": qwen3(),
    "qwen3_tied_biased": qwen3(tie_word_embeddings=True, attention_bias=True),
    "gemma2": gemma2(attn_logit_softcapping=5.0, final_logit_softcapping=10.0),
    "gemma2_uncapped": gemma2(attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": gemma3(),
    "gemma3_linear_capped": gemma3({"rope_type": "linear", "factor": 4.0}, final_logit_softcapping=10.0),
    "phi3": phi3(sliding_window=WINDOW),
    "phi3_longrope_short": phi3(NUM_TOKENS, max_position_embeddings=256),
    "phi3_longrope_long": phi3(16),
    "phi3_longrope_partial": phi3(16, factors=6, partial=0.75, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "bloom": bloom(),
    "bloom_six_heads": bloom(hidden_size=48, n_head=6),
}
# The length for which a golden is loaded, where it is not the model's own limit.
MAX_MODEL_LEN = {"phi3_longrope_short": NUM_TOKENS}


def make_golden(name: str, config: PreTrainedConfig) -> None:
    """Writes one golden: config.json as text, the tensors' shapes as JSON, tokens [1, T] and logits [1, T, V]."""
    config._attn_implementation = "eager"
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    model = AutoModelForCausalLM.from_config(config).float().eval()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}
    state = {key: torch.from_numpy(tensor) for key, tensor in make_weights(shapes).items()}
    report = model.load_state_dict(state, strict=False)
    if set(report.missing_keys) != tied or report.unexpected_keys:
        raise RuntimeError(f"{name}: {report}")
    model.tie_weights()
    tokens = np.random.RandomState(0).randint(0, VOCAB_SIZE, (1, NUM_TOKENS)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(
        path,
        config=json.dumps(config.to_dict(), sort_keys=True),
        shapes=json.dumps(shapes),
        transformers=transformers.__version__,
        max_model_len=MAX_MODEL_LEN.get(name, config.to_dict().get("max_position_embeddings", NUM_TOKENS)),
        tokens=tokens,
        logits=logits,
    )
    print(f"{name}: {path.stat().st_size} bytes, logits up to {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for golden_name, golden_config in CONFIGS.items():
        if not sys.argv[1:] or golden_name in sys.argv[1:]:
            make_golden(golden_name, golden_config)
