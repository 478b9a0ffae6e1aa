"""From the arrays of a step to what they say of one request.

Knows no scheduling. The one idea: what a request asked for is read here and nowhere else, row by row.
"""

from __future__ import annotations

from typing import Any

from fastgpt_jax.engine.request import Request
from fastgpt_jax.engine.runner import Fetched
from fastgpt_jax.engine.shapes import Row
from fastgpt_jax.engine.updates import TokenScore


def read_token(request: Request, index: int, fetched: Fetched) -> TokenScore:
    """The token sampled in a row, with the most likely ones where the request wants them."""
    token_id, logprob = int(fetched.ids[index]), float(fetched.logprobs[index])
    if not request.group.wants_logprobs:
        return TokenScore(token_id, logprob)
    rank, top_ids = int(_asked(fetched.ranks)[index]), _asked(fetched.top_ids)[index]
    return TokenScore(token_id, logprob, rank, top_ids, _asked(fetched.top_logprobs)[index])


def read_hidden(index: int, fetched: Fetched) -> Any:
    """What the projection to the vocabulary read in a row."""
    return _asked(fetched.hidden)[index]


def read_prompt_scores(row: Row, first: int, fetched: Fetched) -> tuple[TokenScore, ...]:
    """The scores of the prompt tokens that follow a row's tokens, but for those that are known already.

    Args:
      first: Where the row's tokens begin among those of the step.
    """
    request, score = row.request, _asked(fetched.score)
    if request.is_scored:
        return ()
    scores = []
    for position in range(max(row.start, request.num_scored) + 1, min(row.stop + 1, request.num_prompt)):
        index = first + position - row.start - 1
        token_id, logprob, rank = request.prompt_token_ids[position], score.logprobs[index], score.ranks[index]
        top = (score.top_ids[index], score.top_logprobs[index])
        scores.append(TokenScore(token_id, float(logprob), int(rank), *top))
    request.num_scored = max(request.num_scored, min(row.stop, request.num_prompt - 1))
    request.is_scored = request.num_scored == request.num_prompt - 1
    return tuple(scores)


def follow_form(request: Request, token_id: int) -> str | None:
    """Tells the form of a text of its next token, which may end the request; returns what went wrong."""
    if request.structured is None:
        return None
    try:
        request.structured.accept(token_id)
        failure = request.structured.failure
    except Exception as error:
        failure = describe(error)
    if failure is not None:
        request.end("error")
    elif request.structured.is_terminated and request.finish_reason in (None, "length"):
        request.end("stop")  # also where the last token that it may have completes it
    return failure


def describe(error: Exception) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {error}"


def _asked(values: Any) -> Any:
    """What was asked for must have come."""
    if values is None:
        raise RuntimeError("the runner did not fetch what a request asked for")
    return values
