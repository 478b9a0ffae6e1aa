"""Writes the logits of transformers' models on tiny configurations into `goldens/`.

Needs the `parity` extra (torch, transformers); the tests that read the goldens do not.

    python -m tests.parity.make_goldens
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

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


def llama(theta: float = 500.0, scaling: dict | None = None, **fields) -> LlamaConfig:
    rope = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    return LlamaConfig(**SHAPE | {"head_dim": 16, "rms_norm_eps": 1e-5, "rope_parameters": rope} | fields)


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": llama(),
    "llama_tied_biased": llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama_linear": llama(scaling={"rope_type": "linear", "factor": 4.0}),
    "llama_llama3": llama(scaling=LLAMA3),
    "llama_yarn": llama(scaling=YARN),
    "llama_yarn_mscale": llama(scaling=YARN_MSCALE),
    "qwen2": Qwen2Config(
        **SHAPE | {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


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
        tokens=tokens,
        logits=logits,
    )
    print(f"{name}: {path.stat().st_size} bytes, logits up to {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for golden_name, golden_config in CONFIGS.items():
        make_golden(golden_name, golden_config)
