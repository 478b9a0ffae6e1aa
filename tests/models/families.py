"""A tiny configuration of every family, with what tells it from the others switched on."""

from fastgpt_jax.models import (
    GPT2,
    Bloom,
    BloomConfig,
    Gemma,
    GemmaConfig,
    GPT2Config,
    Llama,
    LlamaConfig,
    Mistral,
    MistralConfig,
    Phi3,
    Phi3Config,
    Qwen3,
    Qwen3Config,
)
from fastgpt_jax.models.layers.rope import LongRopeScaling
from tests.filled_model import make_filled_model

DECODER = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
LEARNED = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = DECODER | {"local_layers": (True, False), "sliding_window": 3, "query_pre_attn_scalar": 12.0}
GEMMA |= {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
LONGROPE = LongRopeScaling(
    (1.0, 1.5, 2.0), (2.0, 3.0, 4.0), original_max_position_embeddings=16, factor=2.0, max_model_len=32
)

FAMILIES = {
    "llama": (Llama, LlamaConfig(**DECODER)),
    "gpt2": (GPT2, GPT2Config(**LEARNED, intermediate_size=64, max_position_embeddings=32)),
    "mistral": (Mistral, MistralConfig(**DECODER, sliding_window=3)),
    "qwen3": (Qwen3, Qwen3Config(**DECODER, attention_bias=True)),
    "phi3": (
        Phi3,
        Phi3Config(**DECODER, sliding_window=3, partial_rotary_factor=0.75, rope_scaling=LONGROPE),
    ),
    "gemma2": (Gemma, GemmaConfig(**GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=10.0)),
    "gemma3": (Gemma, GemmaConfig(**GEMMA, has_head_norms=True, rope_local_base_freq=100.0)),
    "bloom": (Bloom, BloomConfig(**LEARNED, max_position_embeddings=32)),
}


def make_model(name: str):
    """The family's module with deterministic parameters."""
    return make_filled_model(*FAMILIES[name])
