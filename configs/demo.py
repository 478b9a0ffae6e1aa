"""The embedded default: a Llama of 0.7M parameters that learns to write scenes in about seven minutes on two cores.

python tools/train.py --config configs/demo.py --text tinyshakespeare.txt --output out/demo
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "demo"
    config.seed = 0
    config.steps = 1200
    config.log_every_steps = 10
    config.evaluate_every_steps = 150
    config.checkpoint_every_steps = 300

    config.tokenizer = ConfigDict()
    config.tokenizer.vocab_size = 1024

    config.data = ConfigDict()
    config.data.window_tokens = 512
    config.data.batch_size = 4
    config.data.valid_fraction = 0.1
    config.data.paragraphs_per_document = 16

    config.model = ConfigDict()
    config.model.hidden_size = 128
    config.model.intermediate_size = 368
    config.model.num_hidden_layers = 3
    config.model.num_attention_heads = 4
    config.model.num_key_value_heads = 2
    config.model.head_dim = 32
    config.model.max_position_embeddings = 512
    config.model.rope_theta = 10000.0
    config.model.rms_norm_eps = 1e-5

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 4e-3
    config.optimizer.final_learning_rate_fraction = 0.05
    config.optimizer.warmup_steps = 60
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.optimizer.max_grad_norm = 1.0
    return config
