import jax.numpy as jnp
import pytest

from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.registry import PASSES, Numerics, Pass, make_registry, parse_pipeline
from passes.result import PassResult, Remark
from passes.verify import MalformedGraph
from tests.passes.graphs import names, read

X = jnp.ones((3, 3))


def program(x):
    unused = jnp.sin(x) @ x
    return (x * 1.0 @ x) + (x @ x), unused[:0]


def managed(pipeline, **options):
    texts = []
    graph = read(program, X)
    return graph, PassManager(parse_pipeline(pipeline), PassOptions(**options), texts.append).run(graph), texts


def test_statistics_count_operations_flops_and_bytes():
    graph, (canonical, merged, dead), _ = managed("canonicalize, cse,dce")
    assert (canonical.name, merged.name, dead.name) == ("canonicalize", "cse", "dce")
    assert (canonical.result.matched, merged.result.matched) == (1, 1)
    assert merged.cost_before.flops - merged.cost_after.flops == 2 * 3**3
    assert merged.ops_before - merged.ops_after == 1 and dead.ops_before == merged.ops_after
    assert merged.cost_after.bytes < merged.cost_before.bytes
    assert dead.numerics is Numerics.EXACT and dead.seconds >= 0
    assert dead.ops_after == graph.count()


def test_dumps_come_after_all_changed_or_one_pass():
    assert len(managed("canonicalize,canonicalize,dce,cse", print_ir_after="all")[2]) == 4
    assert len(managed("canonicalize,canonicalize,cse", print_ir_after="changed")[2]) == 2
    (text,) = managed("canonicalize,cse", print_ir_after="cse")[2]
    assert "test_manager.py" in text


def test_a_pipeline_stops_where_told():
    assert [s.name for s in managed("cse,dce,canonicalize", stop_after="dce")[1]] == ["cse", "dce"]
    assert [s.name for s in managed("cse,dce,canonicalize", bisect_limit=1)[1]] == ["cse"]
    graph, statistics, _ = managed("cse,dce", bisect_limit=0)
    assert statistics == () and names(graph) == names(read(program, X))


def test_the_empty_pipeline_does_nothing():
    assert parse_pipeline("") == parse_pipeline("  ") == ()


@pytest.mark.parametrize("text", ["cse,,dce", "cse;dce", "CSE", "canonicalise"])
def test_malformed_pipelines_name_what_is_known(text):
    with pytest.raises(ValueError, match="known: canonicalize, cse, dce, simplify"):
        parse_pipeline(text)


@pytest.mark.parametrize("options", [{"stop_after": "dce"}, {"print_ir_after": "dce"}, {"stop_after": "all"}])
def test_options_must_name_passes_of_the_pipeline(options):
    with pytest.raises(ValueError, match="must name a pass of the pipeline 'cse'"):
        PassManager(parse_pipeline("cse"), PassOptions(**options))


def break_graph(graph: Graph) -> PassResult:
    del graph.ops[0]
    return PassResult(1)


def test_verification_names_the_pass_that_broke_the_graph():
    registry = make_registry([*PASSES.values(), Pass("break_graph", break_graph, Numerics.APPROXIMATE)])
    pipeline = parse_pipeline("cse,break_graph,dce", registry)
    with pytest.raises(MalformedGraph, match="pass break_graph left a malformed graph"):
        PassManager(pipeline).run(read(program, X))


def test_the_registry_is_frozen_and_names_are_unique():
    with pytest.raises(TypeError):
        PASSES["other"] = PASSES["cse"]
    with pytest.raises(ValueError, match="'cse' twice"):
        make_registry([PASSES["cse"], PASSES["cse"]])


def test_remarks_name_the_operation_and_the_line():
    graph = read(program, X)
    remark = Remark.at(graph.ops[0], "the value escapes")
    assert PassResult(2, (remark,)).missed == 1
    assert str(remark).startswith("test_manager.py:") and str(remark).endswith("the value escapes")
