"""Named shapes that every implementation of attention is tested on, and that benchmarks may measure.

Leaves have fixed numbers, so that a mask can be written here and its arrays made elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt_jax.kernels.attention.spec import AttentionSpec
from passes.masks import (
    All,
    BlockTable,
    KeyFlag,
    KeyLength,
    KeyRange,
    Mask,
    Nothing,
    Offset,
    QueryRange,
    Segment,
    Shifted,
    Tree,
    causal,
    window,
)
from passes.scores import Alibi

LENGTHS, QUERY_SEGMENTS, KEY_SEGMENTS, FLAGS, TABLE, ANCESTORS, SLOPES, STARTS = range(8)
TABLE_BLOCK = (16, 128)


@dataclass(frozen=True)
class NamedShape:
    """One problem.

    Attributes:
      alibi: Whether scores have slopes, which lie in leaf `SLOPES`.
      length: Least number of keys that a request has; the leaf `LENGTHS` lies between it and S.
    """

    mask: Mask
    B: int = 2
    T: int = 40
    S: int = 160
    N: int = 4
    K: int = 2
    H: int = 16
    E: int = 16
    dtype: str = "float32"
    soft_cap: float | None = None
    has_sinks: bool = False
    alibi: bool = False
    length: int = 1
    block_q: int = 16
    block_k: int = 128

    @property
    def spec(self) -> AttentionSpec:
        score = Alibi(SLOPES, self.S - self.T) if self.alibi else None
        return AttentionSpec(self.H**-0.5, self.mask, self.soft_cap, score)


_LAST = Offset(40 - 160, None)  # causal where the 40 queries are the last of 160 positions

SHAPES: dict[str, NamedShape] = {
    "causal": NamedShape(causal(), T=160),
    "causal, odd lengths": NamedShape(causal(), T=131, S=131, N=3, K=1),
    "causal, fewer queries than keys": NamedShape(_LAST),
    "causal, more queries than keys": NamedShape(Offset(70, None), T=200, S=130),
    "bidirectional": NamedShape(All(), S=256),
    "bidirectional, odd lengths": NamedShape(All(), T=7, S=133),
    "window": NamedShape(window(33), T=300, S=300),
    "window and sinks": NamedShape(causal() & (window(33) | KeyRange(0, 5)), T=300, S=300, has_sinks=True),
    "prefix": NamedShape(causal() | KeyRange(0, 50), T=160),
    "packed segments": NamedShape(causal() & Segment(KEY_SEGMENTS, KEY_SEGMENTS), T=160),
    "cross segments": NamedShape(Segment(QUERY_SEGMENTS, KEY_SEGMENTS)),
    "lengths": NamedShape(KeyLength(LENGTHS), S=300),
    "causal and lengths": NamedShape(causal() & KeyLength(LENGTHS), T=300, S=300, length=140),
    "flags": NamedShape(_LAST & KeyFlag(FLAGS)),
    "block table": NamedShape(BlockTable(TABLE, *TABLE_BLOCK), T=48, S=300),
    "tree": NamedShape(KeyLength(LENGTHS) | Tree(ANCESTORS, LENGTHS, 2), length=100),
    "some queries": NamedShape(causal() & ~QueryRange(20, 90), T=160),
    "nothing visible": NamedShape(Nothing()),
    "nothing visible, sinks": NamedShape(Offset(100, None), T=120, has_sinks=True),
    "multi-query": NamedShape(_LAST, N=8, K=1),
    "one query head a KV head": NamedShape(_LAST, N=3, K=3),
    "decode": NamedShape(KeyLength(LENGTHS), T=1, N=8, K=2, S=260),
    "behind what is cached": NamedShape(Shifted(causal(), STARTS), T=40, S=300),
    "behind what is cached, window": NamedShape(Shifted(window(33), STARTS), T=40, S=300, has_sinks=True),
    "soft-cap": NamedShape(_LAST, soft_cap=3.0, has_sinks=True),
    "ALiBi": NamedShape(_LAST, alibi=True, soft_cap=20.0),
    "values of another width": NamedShape(_LAST, H=24, E=40),
    "wide heads": NamedShape(_LAST, B=1, H=144, E=130),
    "bfloat16": NamedShape(causal() & (window(33) | KeyRange(0, 5)), T=160, dtype="bfloat16", has_sinks=True),
    "bfloat16, bidirectional": NamedShape(All(), dtype="bfloat16", S=200),
    "everything": NamedShape(
        (causal() & (window(70) | KeyRange(0, 5)) & Segment(KEY_SEGMENTS, KEY_SEGMENTS)) & KeyLength(LENGTHS),
        T=203,
        S=203,
        N=6,
        soft_cap=8.0,
        has_sinks=True,
        alibi=True,
        length=150,
    ),
}
