"""Eight billion parameters on a machine with 8 GB: the shape of Llama-3.1-8B in int4, with int8 caches of 4,096 tokens.

    fastgpt compile --model FOLDER --output ARTIFACT --quantization=w4a8 --kv_cache_dtype=int8 --dtype=bfloat16 \\
        --max_model_len=4096 --max_num_seqs=1 --buckets=32,512 --decode_buckets=1 --memory_pool_size=320MiB

`compile` in the config holds these flags. `python -m benchmarks.cpu_peers_edge` compiles the shape with them, weights
random, and measures the memory of serving it; what it found is in docs/cpu.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from fastgpt_jax.models.llama import Llama, LlamaConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "edge_8gb"

    config.model = ConfigDict()
    config.model.vocab_size = 128256
    config.model.hidden_size = 4096
    config.model.intermediate_size = 14336
    config.model.num_hidden_layers = 32
    config.model.num_attention_heads = 32
    config.model.num_key_value_heads = 8
    config.model.head_dim = 128
    config.model.max_position_embeddings = 8192
    config.model.rope_theta = 500000.0
    config.model.rms_norm_eps = 1e-5
    config.model.dtype = "bfloat16"

    config.compile = ConfigDict()
    config.compile.quantization = "w4a8"
    config.compile.kv_cache_dtype = "int8"
    config.compile.max_model_len = 4096
    config.compile.max_num_seqs = 1
    config.compile.buckets = "32,512"
    config.compile.decode_buckets = "1"
    config.compile.memory_pool_size = "320MiB"
    return config


def make_model(num_layers: int | None = None) -> tuple[Any, Any]:
    """The forward and random parameters, for `--model configs/edge_8gb.py:make_model`.

    Parameters of one shape are one array, so that making them takes 3 GB and not 16; stored, each has its own bytes.
    """
    fields = get_config().to_dict()["model"] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    config = LlamaConfig(**fields)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    made: dict[Any, Any] = {}

    def draw(leaf: Any) -> Any:
        key = (leaf.shape, leaf.dtype)
        if key not in made:
            noise = 0.02 * jax.random.normal(jax.random.key(len(made)), leaf.shape, leaf.dtype)
            made[key] = noise if len(leaf.shape) > 1 else jnp.ones(leaf.shape, leaf.dtype)
        return made[key]

    params = jax.tree.map(draw, nnx.to_pure_dict(shapes))
    return (lambda params, tokens: nnx.merge(graphdef, params)(tokens)), params
