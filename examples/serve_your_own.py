"""A model of your own, in bare jnp: train it for a minute, then serve it, with no line changed for serving.

    python examples/serve_your_own.py                       # learns three sonnets, then serves three prompts
    python examples/serve_your_own.py --text my.txt --steps 2000
    fastgpt explain examples/serve_your_own.py:make_model   # what the compiler finds in it

The model attends over a sliding window, with a learned sink in every softmax and soft-capped scores: three things that
serving engines usually ask you to write again with their own layers. Here it is only the training forward below.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fastgpt_jax
from fastgpt_jax import LLM, CompileConfig, SamplingParams

# ---- the model: bytes in, logits out, no cache anywhere -------------------------------------------------------------
VOCAB, MAX_LEN, LAYERS, D, N, H, WINDOW, CAP = 256, 192, 2, 96, 4, 24, 64, 20.0


def init_params(key):
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))

    def normal(*shape, std):
        return std * jax.random.normal(next(keys), shape)

    def layer():
        return {
            "norm1": jnp.ones(D), "qkv": normal(3, D, N, H, std=D**-0.5), "sink": jnp.zeros(N),
            "out": normal(N, H, D, std=D**-0.5 / 2), "norm2": jnp.ones(D),
            "up": normal(D, 4 * D, std=D**-0.5), "down": normal(4 * D, D, std=D**-0.5 / 4),
        }  # fmt: skip

    layers = [layer() for _ in range(LAYERS)]
    return {"embed": normal(VOCAB, D, std=0.05), "position": normal(MAX_LEN, D, std=0.05), "layers": layers}


def norm(x, gain=1.0):
    return gain * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def attention(x, p, mask):
    q, k, v = jnp.einsum("btd,cdnh->cbtnh", x, p["qkv"])
    scores = CAP * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k) / (CAP * H**0.5))  # soft-cap
    scores = jnp.where(mask, scores, -1e9)
    sink = jnp.broadcast_to(p["sink"][None, :, None, None], (*scores.shape[:-1], 1))  # a place to attend to nothing
    probs = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bnts,bsnh,nhd->btd", probs, v, p["out"])


def model(params, tokens):
    t = jnp.arange(tokens.shape[1])
    mask = (t[None, :] <= t[:, None]) & (t[:, None] - t[None, :] < WINDOW)  # causal, sliding window
    x = params["embed"][tokens] + params["position"][t]
    for p in params["layers"]:
        x = x + attention(norm(x, p["norm1"]), p, mask)
        x = x + jax.nn.gelu(norm(x, p["norm2"]) @ p["up"]) @ p["down"]
    return norm(x) @ params["embed"].T


def make_model():
    return model, init_params(jax.random.key(0))


# ---- training: any loop will do -------------------------------------------------------------------------------------
def train(params, text, steps, batch_size=4):
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 10, steps), b2=0.98)
    data = np.frombuffer(text, np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(params, opt_state, windows):
        def loss_fn(params):
            logits = model(params, windows[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, started, length = optimizer.init(params), time.monotonic(), min(MAX_LEN, len(data) - 1)
    for i in range(steps):
        starts = rng.integers(0, len(data) - length, batch_size)
        params, opt_state, loss = step(params, opt_state, data[starts[:, None] + np.arange(length + 1)])
        if i % 50 == 0 or i == steps - 1:
            print(f"step {i}: loss {loss:.3f}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return params


# ---- serving: the same function -------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("sonnets.txt"), help="a text to learn")
    parser.add_argument("--steps", type=int, default=1200, help="training steps")
    parser.add_argument("--max_tokens", type=int, default=160, help="bytes to write for each prompt")
    parser.add_argument("--quick", action="store_true", help="a few steps and bytes only, to see that it runs")
    args = parser.parse_args()
    if not args.text.is_file() or args.text.stat().st_size < 100:
        parser.error(f"--text must name a file of at least 100 bytes, got {args.text}")
    steps, max_tokens = (5, 8) if args.quick else (args.steps, args.max_tokens)

    fn, params = make_model()
    params = train(params, args.text.read_bytes(), steps)
    llm = LLM(fastgpt_jax.compile(fn, params, CompileConfig(max_model_len=MAX_LEN)))
    prompts = [b"Shall I compare thee", b"When, in disgrace", b"Let me not"]
    outputs = llm.generate(
        prompt_token_ids=[list(prompt) for prompt in prompts],
        sampling_params=SamplingParams(temperature=0, max_tokens=max_tokens),
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        print((prompt + bytes(output.outputs[0].token_ids)).decode(errors="replace"), end="\n\n")


if __name__ == "__main__":
    main()
