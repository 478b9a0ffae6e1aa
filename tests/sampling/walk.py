"""Random walks through a form: texts that a sampler could draw."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastgpt_jax.sampling.structured import StructuredCompiler, StructuredOutput
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams

CLOSING, OPENING = frozenset(b'"}],:'), frozenset(b"{[ \r\n\t")


def allowed_ids(state: StructuredOutput) -> list[int]:
    """The tokens that may come next."""
    return np.flatnonzero(np.unpackbits(state.bitmask().view(np.uint8), bitorder="little")).tolist()


def walk(
    params: StructuredOutputsParams,
    compiler: StructuredCompiler,
    rng: np.random.Generator,
    *,
    num_tokens: int,
    must_end: bool = True,
) -> Any:
    """Draws a whole text, its end left out: anything for `num_tokens` tokens, then what closes soonest.

    Returns None for a text that went on and on all the same, where it need not end.
    """
    state, ids = StructuredOutput(params, compiler), []
    closing, opening = _ids_of(CLOSING, compiler), _ids_of(OPENING, compiler)
    for _ in range(num_tokens + 400):
        allowed = allowed_ids(state)
        ends = [token_id for token_id in allowed if token_id in compiler.eos_ids]
        if ends and (len(ids) > num_tokens or rng.random() < 0.3):
            break
        allowed = [token_id for token_id in allowed if token_id not in compiler.eos_ids] or ends
        if len(ids) > num_tokens:
            flat = [token_id for token_id in allowed if token_id not in opening]
            allowed = [token_id for token_id in allowed if token_id in closing] or flat or allowed
        token_id = int(rng.choice(allowed))
        state.accept(token_id)
        if token_id not in compiler.eos_ids:
            ids.append(token_id)
        if state.is_terminated:
            break
    else:
        assert not must_end, f"{params} did not end"
        return None
    assert state.failure is None
    return ids


def _ids_of(letters: frozenset[int], compiler: StructuredCompiler) -> frozenset[int]:
    """The tokens of one byte each."""
    texts = {bytes([letter]) for letter in letters}
    return frozenset(i for i in range(compiler.vocab_size) if compiler._vocabulary.decode_bytes([i]) in texts)
