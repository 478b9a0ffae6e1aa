"""What fails ends its own request: the others keep their tokens, and nothing is left behind."""

from __future__ import annotations

import pytest

from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.engine.outputs import RequestOutput
from fastgpt_jax.engine.shapes import Shapes
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


def test_what_a_long_prompt_costs_is_known_whatever_the_buckets():
    shapes = Shapes(Buckets(((16, 1), (4096, 1)), (1,)), is_ragged=True, min_first_chunk=1)
    assert shapes._cost_of_rest(4095) == 64 + 4096 and shapes._cost_of_rest(40) == 3 * (64 + 16)
    assert shapes._cost_of_rest(2 * 4096 + 16) == 2 * (64 + 4096) + 64 + 16


def test_an_error_in_planning_ends_who_has_just_come(monkeypatch):
    engine = make_engine()
    engine.add_request("short", [1, 2, 3], greedy(8))
    engine.step()
    engine.step()
    choose = Shapes.choose

    def refuse(shapes, decodes, prompts, **needs):
        if any(item.request.group.request_id == "long" for item in prompts):
            raise ValueError("too long")
        return choose(shapes, decodes, prompts, **needs)

    monkeypatch.setattr(Shapes, "choose", refuse)
    engine.add_request("long", [4] * 9, greedy(4))
    done = finish(engine)
    assert done["long"].error == "ValueError: too long"
    assert done["short"].error is None and done["short"].outputs[0].token_ids == continue_greedily([1, 2, 3], 8)
    assert engine.stats().num_failed_steps == 1


def test_a_copy_that_fails_leaves_no_page_behind(monkeypatch):
    engine = make_engine(fields={"num_pages": 6})
    prompt = list(range(8))
    engine.add_request("first", prompt, greedy(2))
    finish(engine)

    def fail(state, sources, targets):
        monkeypatch.undo()
        raise RuntimeError("the copy failed")

    monkeypatch.setattr(engine.compiled, "copy_pages", fail)
    engine.add_request("second", prompt, greedy(2))
    assert finish(engine)["second"].error == "RuntimeError: the copy failed"
    assert engine.stats().kv_cache_usage == 0
