"""The plan of a derived step: which values are computed in which rows, from what, and what is kept between steps.

The derivation walks backwards from the logits. Each `Demand` (a value, and the rows wanted of it) becomes a `Node`: the
demands it is made from and a function that makes it. A graph or loop body is a `Frame`; a loop met under a demand is a
`Loop`, whose body is a frame of its own. Everything here is data; `derive` fills it in and `emit` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from passes.graph import Graph, Op, Value
from passes.incremental.roles import Demand, Role
from passes.incremental.state import State
from passes.incremental.time import Times

Emit = Callable[[Any, Sequence[Any]], Any]


@dataclass
class Recipe:
    """How a rule makes a demanded value: from which demands, and by which function `emit(context, arrays)`."""

    operands: list[Demand]
    emit: Emit


@dataclass
class Node:
    """One value in the rows wanted of it. With a `loop`, it is one of that loop's results instead of `emit`'s."""

    operands: list[Demand]
    emit: Emit | None = None
    loop: Loop | None = None


@dataclass(eq=False)
class Loop:
    """A scan under demand.

    Attributes:
      lead: What its trips are: None for layers, `ROWS` for the new tokens (recurrences, maps over queries), `KEYS` for
        the cached tokens (a reduction such as online softmax).
      wanted: Results of the body (index, roles) that are needed.
      sources: For each demand on the body's inputs the demand on the scan's operands that feeds it.
      initial: For each carry wanted the demand for its value before the first trip.
      carries: 'carry' states for a loop over the new tokens, by body output.
    """

    op: Op
    lead: Role | None
    frame: Frame
    wanted: dict[tuple[int, tuple[Role, ...]], None] = field(default_factory=dict)
    sources: dict[Demand, Demand] = field(default_factory=dict)
    initial: dict[tuple[int, tuple[Role, ...]], Demand] = field(default_factory=dict)
    carries: dict[tuple[int, tuple[Role, ...]], State] = field(default_factory=dict)

    @property
    def operands(self) -> list[Demand]:
        """What the loop reads of the frame around it."""
        return list(dict.fromkeys([*self.sources.values(), *self.initial.values()]))


@dataclass(eq=False)
class Frame:
    """The plan of one graph.

    Attributes:
      over_time: The frame is the body of a loop over tokens, so nothing may be kept inside it and values without a time
        axis belong to one token.
      keyed: Token-dependent values wanted in all rows, from which the cut is chosen.
      cut: The values to cache, once chosen.
    """

    graph: Graph
    loop: Loop | None = None
    over_time: bool = False
    nodes: dict[Demand, Node] = field(default_factory=dict)
    loops: dict[tuple[Op, Role | None], Loop] = field(default_factory=dict)
    keyed: dict[Value, None] = field(default_factory=dict)
    cut: set[Value] | None = None
    states: dict[tuple[str, Any], State] = field(default_factory=dict)

    def frames(self) -> Iterator[Frame]:
        """This frame and those of the loops in it."""
        yield self
        for loop in self.loops.values():
            yield from loop.frame.frames()

    def order(self, outputs: Sequence[Demand], given: Sequence[Demand] = ()) -> list[Demand]:
        """The demands needed for `outputs`, each after what it is made from; those `given` are there already."""
        done: dict[Demand, None] = dict.fromkeys(given)
        stack: list[tuple[Demand, bool]] = [(d, False) for d in reversed(outputs)]
        while stack:
            demand, ready = stack.pop()
            if demand in done:
                continue
            if ready:
                done[demand] = None
                continue
            stack.append((demand, True))
            node = self.nodes[demand]
            operands = node.loop.operands if node.loop is not None else node.operands
            stack.extend((d, False) for d in operands if d not in done)
        return [d for d in done if d not in given]

    def all_states(self) -> list[State]:
        """States of this frame and its loops, in a fixed order; `lead` tells the loops they are stacked over."""
        return [*self.states.values(), *(s for loop in self.loops.values() for s in loop.frame.all_states())]


@dataclass(eq=False)
class Plan:
    """A derived step.

    Attributes:
      output: The demand for the logits, in the rows of the new tokens.
      states: What is kept, in a fixed order.
      order: For each frame its demands in an order in which they can be made.
      hidden: The operand of the last product over the model's width, from which the logits of a row follow alone; the
        output itself where there is none.
      head: What leads from `hidden` to the logits.
    """

    frame: Frame
    times: Times
    token_input: Value
    output: Demand
    states: list[State]
    order: dict[Frame, list[Demand]]
    hidden: Demand
    head: list[Demand]

    @property
    def capacity(self) -> int:
        """The largest number of tokens of a request."""
        return self.times.long

    @property
    def hidden_size(self) -> int:
        """Numbers of a row of `hidden`; 0 where there is no product behind it."""
        value = self.hidden.value
        return math.prod(value.shape) // value.shape[self.times.dims(value)[0]] if self.head else 0
