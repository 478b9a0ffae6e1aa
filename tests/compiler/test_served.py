"""Every model of the zoo, served by its derived step, gives the logits of its own forward.

Two requests run in one batch, at different positions and from poisoned memory. The second differs from the first in one
earlier token, which the full forward minds; served logits must move exactly as those of the forward do, so the cache is
really read. No certificate stands in between: what is tested here is the derivation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from passes.incremental.errors import NotServable
from tests.compiler import zoo
from tests.compiler.serving import derive_model, turns, two_requests

QUICK = frozenset(
    """
    gqa_repeated mla_rope alibi_numpy sink_column learned_memory top_scores merged_time_and_heads jax_nn_window
    einops_flat_tokens mask_by_numpy padding_zeroed prefix_lm table_by_slice positions_from_padding rope_complex
    all_arguments shift_pad conv_padded_before running_products gated_scan_by_name rwkv scan_layers_recurrent
    scan_layers_cond queries_by_map keys_by_scan linen_scan_remat
    """.split()
)
MINDS = 1e-3  # of the largest logit: what the forward must move by for the comparison to mean anything


def of(models: tuple[zoo.ZooModel, ...]) -> Any:
    """One test for each model, those outside the quick set marked slow."""
    return pytest.mark.parametrize(
        "model", [pytest.param(m, id=m.name, marks=() if m.name in QUICK else pytest.mark.slow) for m in models]
    )


@of(zoo.SERVED)
def test_served_logits_are_those_of_the_forward_and_move_as_they_do(model: zoo.ZooModel):
    assert_served_exactly(model)


@of(zoo.OPTIONAL)
def test_optional_model_is_served_exactly_or_refused(model: zoo.ZooModel):
    try:
        assert_served_exactly(model)
    except NotServable as refusal:
        assert refusal.source.frames and refusal.reason


def assert_served_exactly(model: zoo.ZooModel) -> None:
    requests, position = two_requests(model)
    derived = derive_model(model)
    full, served = derived.full_logits(requests), derived.served_logits(requests)
    scale = np.abs(full).max()
    assert np.abs(served - full).max() <= model.tolerance * scale  # false for NaN too
    moved, served_moved = full[1] - full[0], served[1] - served[0]
    assert np.abs(moved[position + 1 :]).max() > MINDS * scale
    assert np.abs(served_moved - moved)[position + 1 :].max() <= 2 * model.tolerance * scale


@pytest.mark.parametrize(("length", "first_chunk"), [(24, 1), (24, 5), (32, 1)])
def test_schedule_covers_all_tokens_at_different_positions(length: int, first_chunk: int):
    steps = list(turns(length, first_chunk))
    assert len({turn.chunk for turn in steps}) == 2
    assert [sum(turn.counts[r] for turn in steps) for r in (0, 1)] == [length, length]
    assert any(0 < n < turn.chunk for turn in steps for n in turn.counts)  # padding
    assert all(min(turn.counts) >= first_chunk for turn in steps[:1])
    assert all(
        any(turn.counts[r] == 0 < turn.counts[1 - r] and turn.starts[r] < length for turn in steps) for r in (0, 1)
    )
    both = [turn.starts for turn in steps[1:] if min(turn.counts) > 0]
    assert len(both) > 5 and all(a != b for a, b in both)


def test_quick_set_names_models_of_the_zoo():
    assert QUICK <= {model.name for model in zoo.SERVED}
