"""Derives the cached step of a causal program: from the program at two lengths to a plan.

Meaning: the step is the program at its capacity S, restricted to the rows of the new tokens, where whatever it reads of
other rows comes from state. It is right whenever the program is causal, which is not a matter of structure: the
caller must certify values too. Does not know models, masks or kernels: attention is whatever contracts an axis of
time.

Two walks over the demands. The first finds which token-dependent values are wanted in all rows; then the cut decides
where to cache; the second makes the plan that `emit` runs.
"""

from __future__ import annotations

from passes.graph import Graph, Value
from passes.incremental.cut import CutProblem, minimum_cut
from passes.incremental.errors import NotServable
from passes.incremental.plan import Frame, Loop, Plan
from passes.incremental.roles import ROWS, Demand
from passes.incremental.rules import DELAY_PASSES, POINTWISE
from passes.incremental.time import Times
from passes.incremental.walk import Walk


def derive(graph: Graph, times: Times, token_input: Value) -> Plan:
    """Derives the step of a graph traced at its capacity.

    Args:
      graph: The program; its first output is `[1, T, ...]`, one row a token.
      times: Its time dimensions, with what depends on the tokens marked.
      token_input: The graph input that holds the token ids, i32 `[1, T]`.

    Raises:
      NotServable: the program mixes tokens in a way that has no exact incremental form; names the operation.
    """
    output = graph.outputs[0]
    if len(times.dims(output)) != 1:
        raise NotServable(f"the first output must have one time axis, got {times.describe(output)}", output.op)
    wanted = Demand(output, (ROWS,))
    scout = Walk(times, token_input, Frame(graph), cuts=None)
    scout.run(scout.top, [wanted])
    cuts = _choose_cuts(scout)
    walk = Walk(times, token_input, Frame(graph), cuts=cuts)
    walk.run(walk.top, [wanted])
    order: dict[Frame, list[Demand]] = {}
    for frame in walk.top.frames():
        outputs = [wanted] if frame.loop is None else [Demand(frame.graph.outputs[j], r) for j, r in frame.loop.wanted]
        order[frame] = frame.order(outputs)
    for loop in _loops(walk.top):
        if loop.lead is None:
            for state in loop.frame.all_states():
                state.lead = (loop.op.params["length"], *state.lead)
    hidden = _find_hidden(walk.top, times, wanted)
    head = walk.top.order([wanted], given=[hidden])
    return Plan(walk.top, times, token_input, wanted, walk.top.all_states(), order, hidden, head)


def _find_hidden(frame: Frame, times: Times, output: Demand) -> Demand:
    """Walks back from the logits through operations on single rows, up to the vocabulary projection's operand."""
    demand = output
    while (op := demand.value.op) is not None:
        dependent = [d for d in frame.nodes[demand].operands if times.is_dependent(d.value)]
        if len(dependent) != 1 or dependent[0].roles != (ROWS,):
            break
        if op.name == "dot_general":
            return dependent[0]
        if op.name not in POINTWISE and op.name not in DELAY_PASSES:
            break
        demand = dependent[0]
    return output


def _loops(frame: Frame) -> list[Loop]:
    """Loops, inner ones first."""
    return [loop for outer in frame.loops.values() for loop in (*_loops(outer.frame), outer)]


def _choose_cuts(scout: Walk) -> dict[Graph, set[Value]]:
    """The values to cache in each graph, bodies first: what a body takes from outside may be cut there."""
    cuts: dict[Graph, set[Value]] = {}
    for frame in reversed(list(scout.top.frames())):
        if not frame.keyed:
            continue
        invariant: set[Value] = set()
        if frame.loop is not None:
            invariant = set(frame.graph.inputs[: frame.loop.op.params["num_consts"]])
        cut = minimum_cut(CutProblem(frame.graph, scout.times, list(frame.keyed), invariant, scout.pulls_through))
        cuts[frame.graph] = {v for v in cut if v not in invariant}
        if frame.loop is not None and frame.loop.frame is frame:
            outer = scout.enclosing[frame]
            for v in cut & invariant:
                operand = frame.loop.op.operands[frame.graph.inputs.index(v)]
                outer.keyed.setdefault(operand)
    return cuts
