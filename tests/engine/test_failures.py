"""What fails ends its own request: the others keep their tokens, and nothing is left behind."""

from __future__ import annotations

import pytest

from fastgpt_jax.engine.outputs import RequestOutput
from tests.engine.fake import CharTokenizer, continue_greedily
from tests.engine.test_scheduling import finish, greedy, make_engine


class Unreadable(CharTokenizer):
    """Knows no text of the tokens from 20 on."""

    letters = CharTokenizer.letters[:20]


GOOD = next([i, j] for i in range(32) for j in range(32) if max(continue_greedily([i, j], 8)) < 20)
BAD = next(
    [i, j] for i in range(32) for j in range(32) if [t < 20 for t in continue_greedily([i, j], 2)] == [True, False]
)


@pytest.mark.parametrize("options", [{}, {"logprobs": 0}])
def test_a_tokenizer_that_raises_ends_its_own_request(options):
    engine = make_engine(fields={"tokenizer": Unreadable(), "max_num_batched_tokens": 1, "is_fast": not options})
    engine.add_request("bad", BAD, greedy(5, **options))
    engine.add_request("good", GOOD, greedy(8, **options))
    done = finish(engine)
    assert done["good"].outputs[0].token_ids == continue_greedily(GOOD, 8) and done["good"].error is None
    assert done["bad"].error.startswith("IndexError") and done["bad"].outputs[0].finish_reason == "error"
    assert done["bad"].outputs[0].text == Unreadable().decode(continue_greedily(BAD, 1))
    assert engine.stats().kv_cache_usage == 0


def test_what_no_tokenizer_reads_can_be_aborted():
    class Held(CharTokenizer):
        """Waits for ever for the rest of a character, and cannot do without it."""

        def decode(self, ids):
            if len(ids) > 2:
                raise ValueError("unfinished")
            return "\ufffd"

    engine = make_engine(fields={"tokenizer": Held()})
    engine.add_request("a", [1], greedy(8))
    while not engine.step():
        pass
    engine._processor._groups["a"].continuations[0].text._detokenizer._pending += [1, 2]
    (output,) = engine.abort_request("a")
    assert (
        isinstance(output, RequestOutput)
        and output.outputs[0].finish_reason == "abort"
        and len(output.outputs[0].token_ids) == 1
    )
    assert engine.stats().num_running == 0 and engine.stats().kv_cache_usage == 0
    engine.check_integrity()
