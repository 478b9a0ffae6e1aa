"""The prompts that were asked most often are run before the first request comes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.prewarm import prewarm
from fastgpt_jax.tokenizer.chat_template import ChatTemplate
from tests.serving.fake_llm import CHATML, make_server
from tests.serving.scripted_engine import ScriptedEngine


class Recording(ScriptedEngine):
    def __init__(self, num_pages=100, page_size=4):
        super().__init__(max_num_seqs=1)
        self.compiled.layout = SimpleNamespace(page_size=page_size, num_pages=num_pages)
        self.ran = []

    def add_request(self, request_id, prompt, params=None, **options):
        self.ran.append((tuple(prompt["prompt_token_ids"]), options.get("cache_salt", "")))
        super().add_request(request_id, prompt, params, **options)


def write(folder, *lines):
    path = folder / "log.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_the_most_frequent_run_last_and_the_rare_ones_not_at_all(tmp_path):
    often, sometimes, rare = {"prompt": [1, 2]}, {"body": {"prompt": [3]}}, {"prompt": [9]}
    engine = Recording()
    done = prewarm(engine, write(tmp_path, *[often] * 6, *[sometimes] * 3, "", rare))
    assert [ids for ids, _ in engine.ran] == [(3,), (1, 2)] and not engine.has_unfinished_requests()
    assert (done.num_prompts, done.num_run, done.num_tokens, done.share) == (10, 2, 3, 0.9)


def test_no_more_than_the_pages_hold(tmp_path):
    engine = Recording(num_pages=2, page_size=4)
    prewarm(engine, write(tmp_path, *({"prompt": [index] * 3} for index in range(5))))
    assert len(engine.ran) == 2
    engine = Recording(num_pages=2, page_size=4)
    prewarm(engine, write(tmp_path, *({"prompt": [index] * 3} for index in range(5))), salts=("a/", "b/"))
    assert [salt for _, salt in engine.ran] == ["a/", "b/"]


def test_text_and_chats(tmp_path):
    engine = Recording()
    log = write(tmp_path, {"prompt": "ab"}, {"messages": [{"role": "user", "content": "c"}]})
    prewarm(engine, log, template=ChatTemplate("<{{ messages[0].content }}>"))
    assert {ids for ids, _ in engine.ran} == {tuple(engine.tokenizer.encode(text)) for text in ("ab", "<c>")}
    with pytest.raises(UserError, match="line 2: the model has no chat template"):
        prewarm(Recording(), log)


def test_a_chat_has_the_tokens_that_it_has_when_it_is_asked(tmp_path):
    chat = {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "<|end|>"}]}],
        "add_generation_prompt": False,
    }
    llm, app = make_server()
    assert TestClient(app).post("/v1/chat/completions", json=chat).status_code == 200
    engine = Recording()
    engine.tokenizer = llm.tokenizer
    prewarm(engine, write(tmp_path, {"body": {**chat, "max_tokens": 3}}), template=ChatTemplate(CHATML))
    assert engine.ran[0][0] == tuple(llm.asked[0].ids)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1: Expecting"), ("[1]", "JSON object"), ({"prompt": [1] * 70}, "context"), ({"x": 1}, "JSON object")],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        prewarm(Recording(), write(tmp_path, line))


def test_a_log_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read --prewarm"):
        prewarm(Recording(), tmp_path / "none")
