"""No engine: the fastest matrix products that a library here reaches, which prefill is held against.

The one idea: a limit for arithmetic is taken as the one for memory is, in the same run and with the same threads; what
torch's own libraries reach on a prefill's largest matrix is a limit that somebody has met.
"""

from __future__ import annotations

import time
from typing import Any

import torch

ROWS, INNER, COLUMNS = 512, 2048, 5632
REPEATS = 7


class Engine:
    """Products of matrices in memory that stays."""

    vocab_size = 0

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def about(self) -> dict[str, Any]:
        return {"version": torch.__version__}

    def ceiling(self) -> dict[str, float]:
        """Operations a second by the type of the numbers, the best of several; a multiplication and a sum are two."""
        x, w = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)
        small = [(30 * m).clamp(-127, 127).to(torch.int8) for m in (x, w)]
        half = [m.to(torch.bfloat16) for m in (x, w)]
        return {
            "int8": _rate(lambda: torch._int_mm(*small)),
            "bfloat16": _rate(lambda: torch.mm(*half)),
            "float32": _rate(lambda: torch.mm(x, w)),
        }


def _rate(product: Any) -> float:
    product()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * ROWS * INNER * COLUMNS / min(seconds)
