"""What a step spends on expanding cached latents, which absorbing the expansion into the query would save.

Only products that the cut prices as absorbed count (MLA's up-projections, arXiv:2405.04434): anything else made again
for every cached row is a recomputation, which the certificate's bound must see.
"""

from __future__ import annotations

from passes.cost import op_cost
from passes.incremental.cut import is_expansion
from passes.incremental.plan import Frame, Plan


def expansion_flops(plan: Plan) -> int:
    """FLOPs that each step spends on expanding all cached rows of latents."""
    return sum(_of_frame(plan, frame) for frame in plan.frame.frames() if not frame.over_time)


def _of_frame(plan: Plan, frame: Frame) -> int:
    users = frame.graph.users()
    values = {d.value for d in frame.nodes if d.roles and not d.wants_rows and plan.times.is_dependent(d.value)}
    kept = {value for kind, value in frame.states if kind == "kv"}
    trips = 1 if frame.loop is None else frame.loop.op.params["length"]
    expanded = [
        value.op
        for value in values - kept
        if value.op is not None and is_expansion(value.op, value, users, plan.times.dims(value)[0])
    ]
    return trips * sum(op_cost(op).flops for op in expanded)
