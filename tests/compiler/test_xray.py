"""The X-ray's data: what each row came from, who made it, what repeats, and which token sees which."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.compiler.capture import as_forward, capture
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.mask_pictures import MAX_CELLS, _evaluated, cells, draw_masks
from fastgpt_jax.compiler.roofline import MACHINES, Machine
from fastgpt_jax.compiler.xray import DERIVED, XRay, xray
from passes.repeats import Repeat, find_repeats
from passes.sparse_attention.parser import parse_sparsity

NUM_LAYERS, WIDTH, VOCAB, T = 5, 8, 20, 48
H100 = MACHINES["h100"]


def layer(x, p, mask):
    scores = jnp.einsum("btd,bsd->bts", x @ p["q"], x)
    return x + jax.nn.softmax(jnp.where(mask, scores, -1e9)) @ (x @ p["v"])


def window_mask(length, window):
    index = jnp.arange(length)
    return (index[:, None] >= index) & (index[:, None] - index < window)


def forward(params, tokens):
    x = params["embed"][tokens]
    for i in range(NUM_LAYERS):
        x = layer(x, params["layers"][i], window_mask(x.shape[1], 4 if i == 2 else 1000))
    return x @ params["embed"].T


def scanned(params, tokens):
    x = params["embed"][tokens]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    body = lambda x, p: (layer(x, p, window_mask(x.shape[1], 1000)), None)
    return jax.lax.scan(body, x, stacked)[0] @ params["embed"].T


def make_params():
    weight = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    layers = [{"q": weight, "v": weight} for _ in range(NUM_LAYERS)]
    return {"embed": jax.ShapeDtypeStruct((VOCAB, WIDTH), jnp.float32), "layers": layers}


def look(fn=forward, pipeline="simplify", **options) -> XRay:
    config = CompileConfig(max_model_len=T, pipeline=pipeline)
    return xray(fn, make_params(), config, name="model", machine=H100, **options)


@pytest.fixture(scope="module")
def seen() -> XRay:
    return look()


def test_rows_name_the_users_lines_through_the_derivation(seen):
    lines = {seen.sources[row.source[0]].lines for row in seen.stages[0].listing.rows if row.source is not None}
    (mine,) = [source for source in seen.sources if source.path == __file__]
    assert mine.lines in lines
    text = dict(mine.lines)
    products = [row for row in seen.stages[0].listing.rows if row.name == "dot_general"]
    assert all(
        row.source is not None and "@" in text[row.source[1]] or "einsum" in text[row.source[1]] for row in products
    )


def test_stages_count_the_whole_program_and_say_what_a_pass_takes_away_and_makes(seen):
    derived, simplified = seen.stages
    assert (derived.name, simplified.name) == (DERIVED, "simplify")
    assert simplified.num_ops < derived.num_ops and simplified.matched > 0
    assert any(row.is_gone for row in derived.listing.rows) and not any(row.is_gone for row in simplified.listing.rows)
    assert {row.made_by for row in derived.listing.rows} == {""}
    assert {row.made_by for row in simplified.listing.rows} == {"", "simplify"}
    assert simplified.numerics == "exact" and simplified.seconds > 0


def test_layers_that_are_alike_are_shown_once_and_counted(seen):
    listing = seen.stages[-1].listing
    assert max(repeat.count for repeat in listing.repeats) >= 2
    copies = np.ones(len(listing.rows), int)
    for repeat in listing.repeats:
        copies[repeat.start : repeat.start + repeat.length] = repeat.count
    products = sum(int(n) for n, row in zip(copies, listing.rows, strict=True) if row.name == "dot_general")
    assert products == 4 * NUM_LAYERS + 1
    assert sum(int(n) * row.flops for n, row in zip(copies, listing.rows, strict=True)) == listing.flops
    assert len(listing.rows) < listing.num_ops


def test_a_loop_over_layers_counts_its_turns(seen):
    config = CompileConfig(max_model_len=T, unroll_layers=False, pipeline="simplify")
    in_loop = xray(scanned, make_params(), config, name="model", machine=H100).stages[-1].listing
    products = lambda listing: max(row.flops for row in listing.rows if row.name == "dot_general" and row.depth)
    assert products(in_loop) == NUM_LAYERS * 2 * T * WIDTH
    assert 0.9 < in_loop.flops / seen.stages[1].flops < 1.1


def test_what_parameters_alone_determine_costs_a_step_nothing():
    def doubled(params, tokens):
        return params["embed"][tokens] @ (params["embed"] * 2.0 + 1.0).T

    rows = look(doubled).stages[-1].listing.rows
    prepared = [row for row in rows if row.is_prepared and row.name in ("mul", "add")]
    assert len(prepared) == 2 and all(row.flops == row.nbytes == 0 for row in prepared)


def test_masks_are_drawn_layer_by_layer(seen):
    full, window = seen.masks.pictures
    assert full.origin == window.origin == "recognised"
    assert (full.layers, window.layers) == (((0, 1), (3, 4)), ((2, 2),))
    assert full.layer_text == "layers 0 to 1, 3 to 4" and window.layer_text == "layer 2"
    expected = [np.tril(np.ones((T, T), bool)), np.array(window_mask(T, 4))]
    for picture, mask in zip((full, window), expected, strict=True):
        assert picture.num_tokens == T and picture.rows == cells(mask)
    assert seen.masks.notes == ()


@pytest.mark.parametrize("fn", [forward, scanned])
def test_masks_that_are_asked_for_are_drawn_over_those_that_there_are(fn):
    captured = capture(*as_forward(fn, make_params()), T)
    pictures = draw_masks(captured, parse_sparsity("layers[1:3]: window(8) | sinks(2)")).pictures
    key = np.arange(T)
    asked = window_mask(T, 8) | (key < 2) & window_mask(T, 1000)
    masks = {"layers 0, 3 to 4": window_mask(T, 1000), "layer 1": asked, "layer 2": asked & window_mask(T, 4)}
    if fn is scanned:
        masks = {"layers 0, 3 to 4": window_mask(T, 1000), "layers 1 to 2": asked}
    assert {p.layer_text: p.rows for p in pictures} == {text: cells(np.array(m)) for text, m in masks.items()}


def test_without_recognition_masks_are_run_as_the_program_has_them():
    captured = capture(*as_forward(forward, make_params()), T)
    found = list(_evaluated(captured, np.arange(T)))
    assert len(found) == NUM_LAYERS
    for i, item in enumerate(found):
        np.testing.assert_array_equal(item.is_visible[0], window_mask(T, 4 if i == 2 else 1000))


def test_a_model_without_attention_says_so():
    masks = draw_masks(capture(*as_forward(lambda p, t: p["embed"][t] @ p["embed"].T, make_params()), T))
    assert masks.pictures == () and "no attention" in masks.notes[0]


def test_cells_hold_the_share_that_is_seen():
    grid = np.zeros((4 * MAX_CELLS, 4 * MAX_CELLS), bool)
    grid[:4, :4] = True
    grid[4, 4] = True
    rows = cells(grid)
    assert len(rows) == len(rows[0]) == MAX_CELLS
    assert (rows[0][0], rows[1][1], rows[1][0]) == ("f", "1", "0")


def test_the_roofline_divides_at_the_machines_balance():
    machine = Machine("a machine", 100.0, 10.0)
    assert machine.balance == 10
    assert [machine.bound(f, b) for f, b in [(99, 10), (100, 10), (0, 0)]] == ["memory", "compute", "free"]
    assert machine.seconds(100, 1) == 1 and machine.seconds(1, 100) == 10


def test_repeats_are_the_longest_and_begin_where_cutting_is_cheapest():
    items = ["a", "b", *["x", "y", "z"] * 4, "x", "c"]
    assert find_repeats(items) == [Repeat(2, 3, 4)]
    live = [9, 9, 2, 1, 3, 2, 1, 3, 2, 1, 3, 2, 1, 3, 2, 1]
    assert find_repeats(items, live=live) == [Repeat(3, 3, 4)]
    assert find_repeats(["a", "a", "a", "a"]) == [] and find_repeats([]) == []
