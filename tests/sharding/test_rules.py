import json

import pytest
from jax.sharding import PartitionSpec

from sharding import (
    TENSOR_PARALLEL,
    DivisibilityError,
    LogicalAxis,
    Rules,
    ShardingError,
    names_of_spec,
    rules_of_templates,
    spec_of_names,
)

EMBED, HEADS, KV_HEADS, MLP, VOCAB = (
    LogicalAxis.EMBED,
    LogicalAxis.HEADS,
    LogicalAxis.KV_HEADS,
    LogicalAxis.MLP,
    LogicalAxis.VOCAB,
)
UNITS = {HEADS: 6, KV_HEADS: 2, LogicalAxis.HEAD_DIM: 8}
RULES = rules_of_templates(
    {
        "embed": (VOCAB, EMBED),
        "layers.{}.query": (EMBED, HEADS),
        "layers.{}.down": (MLP, EMBED),
        "layers.{}.fused": (EMBED, None),
    },
    UNITS,
)
TWO, FOUR = {"tensor": 2, "data": 1}, {"tensor": 4}


def test_every_logical_axis_has_its_place_in_the_table():
    assert set(TENSOR_PARALLEL) == set(LogicalAxis)
    assert {axis for axis, mesh_axis in TENSOR_PARALLEL.items() if mesh_axis is None} == {
        EMBED,
        LogicalAxis.HEAD_DIM,
        LogicalAxis.LAYERS,
    }


def test_paths_lead_to_specs():
    assert RULES.spec_of("embed", (10, 4), TWO) == PartitionSpec("tensor", None)
    assert RULES.spec_of("layers.11.query", (4, 48), TWO) == PartitionSpec(None, "tensor")
    assert RULES.spec_of("layers.0.down", (12, 4), FOUR) == PartitionSpec("tensor", None)
    assert RULES.spec_of("layers.0.fused", (4, 7), FOUR) == PartitionSpec()


def test_a_path_is_matched_whole_and_literally():
    for path in ("layers.1.query.bias", "my.layers.1.query", "layers.x.query", "layersX1.query"):
        assert RULES.axes_of(path) is None


def test_the_first_rule_that_matches_wins():
    rules = Rules(((r".*\.up", (None, MLP)), (r"layers\..*", (MLP, None))))
    assert rules.axes_of("layers.0.up") == (None, MLP)
    assert rules.axes_of("layers.0.down") == (MLP, None)


def test_what_no_rule_names_is_replicated_and_reported():
    made = RULES.assign({"embed": (8, 4), "norm": (4,), "layers.0.gate": (4, 4)}, TWO)
    assert made.unmatched == ("norm", "layers.0.gate")
    assert made.specs["norm"] == made.specs["layers.0.gate"] == PartitionSpec()
    assert made.specs["embed"] == PartitionSpec("tensor", None)


def test_one_device_cuts_nothing():
    assert RULES.spec_of("embed", (7, 4), {"tensor": 1}) == PartitionSpec()


def test_indivisible_sizes_are_told_with_path_axis_size_mesh_and_the_way_out():
    with pytest.raises(
        DivisibilityError, match=r"vocab of embed .*the 4 devices of mesh axis tensor, got 10; .*\(1, 2\)"
    ):
        RULES.spec_of("embed", (10, 4), FOUR)


def test_heads_are_never_cut_in_two():
    # 48 numbers divide by four, six heads do not.
    with pytest.raises(DivisibilityError, match=r"heads of layers.3.query must divide .*got 6; .*\(1, 2, 3\)"):
        RULES.spec_of("layers.3.query", (4, 48), FOUR)


def test_a_rule_for_another_rank_and_a_doubled_mesh_axis_are_refused():
    with pytest.raises(ShardingError, match=r"rule for embed names 2 dimensions, and it has shape \(4,\)"):
        RULES.spec_of("embed", (4,), TWO)
    with pytest.raises(ShardingError, match="cut along one mesh axis"):
        Rules((("w", (MLP, HEADS)),)).spec_of("w", (4, 4), TWO)


@pytest.mark.parametrize(
    ("row", "spec"),
    [
        ((2, 8), PartitionSpec(None, None, None, "tensor", None)),
        ((1, 2, 8), PartitionSpec(None, None, None, None, "tensor", None)),
        ((1, 16), PartitionSpec(None, None, None, None, "tensor")),
        ((1, 5), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_pools_are_cut_between_kv_heads_where_a_row_has_them(row, spec):
    assert RULES.cache_spec("kv0", row, 3, TWO) == spec


def test_pools_of_models_without_a_number_of_kv_heads_are_replicated():
    assert Rules(()).cache_spec("kv0", (2, 8), 2, TWO) == PartitionSpec()


def test_kv_heads_that_do_not_divide_are_refused():
    with pytest.raises(DivisibilityError, match="kv_heads of kv0 .* got 2"):
        RULES.cache_spec("kv0", (1, 2, 8), 3, FOUR)


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec(), PartitionSpec(None, "tensor"), PartitionSpec(("data", "tensor"), None, "expert")],
)
def test_specs_survive_json(spec):
    assert spec_of_names(json.loads(json.dumps(names_of_spec(spec)))) == spec


@pytest.mark.parametrize("entries", [["tensor"], [[3]], [["tensor", "x"]], "tensor", [None]])
def test_what_is_no_spec_is_refused(entries):
    with pytest.raises(ShardingError, match="a partition spec"):
        spec_of_names(entries)
