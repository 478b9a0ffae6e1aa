"""AdamW with warm-up and cosine decay, as one optax chain.

Knows no model: what decays is told from the rank (matrices and embeddings do, gains and biases do not).
"""

from __future__ import annotations

import jax
import optax

from fastgpt_jax.training.settings import OptimizerSettings


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clips the global gradient norm, then AdamW under the schedule of `learning_rate_schedule`."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(settings, steps),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`, then a cosine down to the final fraction at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=steps,
        end_value=settings.learning_rate * settings.final_learning_rate_fraction,
    )
