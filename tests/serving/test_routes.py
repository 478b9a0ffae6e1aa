"""Completions, embeddings, models and tokens in OpenAI's forms, over a fake engine."""

import asyncio
import base64
import json
import logging
import struct
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from fastgpt_jax.engine.outputs import CompletionOutput, RequestOutput
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.serving.answers import follow
from fastgpt_jax.serving.logs import AccessLog
from fastgpt_jax.serving.protocol import EmbeddingList, ModelCard, ModelList
from fastgpt_jax.serving.protocol_completions import Completion
from tests.serving.fake_llm import END, FakeLLM, make_server, make_tokenizer


@pytest.fixture
def served():
    llm, app = make_server()
    return SimpleNamespace(llm=llm, client=TestClient(app, raise_server_exceptions=False))


def complete(served, **body):
    response = served.client.post("/v1/completions", json={"model": "fake", "prompt": "hi", **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(served, path="/v1/completions", **body):
    """The chunks of a stream; checks that it ends as it must."""
    body = {"model": "fake", "stream": True, **({"prompt": "hi"} if path == "/v1/completions" else {}), **body}
    response = served.client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_has_openais_form(served):
    answer = complete(served, max_tokens=3)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert answer["object"] == "text_completion" and answer["model"] == "fake" and answer["id"].startswith("cmpl-")
    assert answer["usage"]["prompt_tokens"] == 2 and answer["usage"]["total_tokens"] == 5
    Completion.model_validate(answer, extra="forbid")


def test_sixteen_tokens_where_nothing_is_said_and_none_where_none_are_asked_for(served):
    assert len(complete(served)["choices"][0]["text"]) == 16
    answer = complete(served, max_tokens=0)
    assert answer["choices"][0]["text"] == "" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [("hi", "hi")]),
        (["hi", "x"], [("hi", "hi"), ("x", "x")]),
        ([71, 72], [(None, "hi")]),
        ([[71], [72, 71]], [(None, "h"), (None, "ih")]),
    ],
)
def test_prompts_come_in_four_forms(served, prompt, expected):
    answer = complete(served, prompt=prompt, max_tokens=1)
    tokenizer = make_tokenizer()
    assert [(asked.text, asked.ids) for asked in served.llm.asked] == [
        (text, tokenizer.encode(spelled)) for text, spelled in expected
    ]
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(len(spelled) for _, spelled in expected)


def test_choices_of_prompt_i_begin_at_i_times_n(served):
    answer = complete(served, prompt=["a", "b"], n=2, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 8
    assert {chunk["choices"][0]["index"] for chunk in stream(served, prompt=["a", "b"], n=2)} == {0, 1, 2, 3}


def test_every_field_of_sampling_reaches_the_engine(served):
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "typical_p": 0.8,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.2,
        "seed": 11,
        "stop": ["x", "yy"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 1,
    }
    complete(served, **fields, logit_bias={"5": -100, "6": 1.5}, max_tokens=4, logprobs=2, priority=-3, cache_salt="s")
    (asked,) = served.llm.asked
    assert asked.params == SamplingParams(**fields, logit_bias={5: -100.0, 6: 1.5}, max_tokens=4, logprobs=2)
    assert (asked.priority, asked.cache_salt) == (-3, "s")


def test_null_is_as_good_as_absent(served):
    complete(served, temperature=None, stop=None, logit_bias=None, tools=None, best_of=None, max_tokens=None)
    assert served.llm.asked[0].params == SamplingParams(max_tokens=16)


def test_fields_that_ask_for_nothing_are_taken(served):
    complete(served, best_of=1, suffix="", store=False, service_tier="auto", user="me")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}},
            {"json": {"type": "null"}},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_regex": "a"}, {"regex": "a"}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ],
)
def test_the_form_of_a_text_can_be_asked_for_in_several_words(served, asked, expected):
    complete(served, **asked)
    assert served.llm.asked[0].params == SamplingParams(structured_outputs=expected)


def test_a_stop_string_ends_a_text_and_says_so(served):
    choice = complete(served, stop=["de"])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "de")


def test_echo_begins_with_the_prompt_and_its_logprobs_as_lm_eval_reads_them(served):
    answer = complete(served, prompt=[[71, 72, 73]], max_tokens=1, logprobs=1, echo=True, temperature=0)
    choice = answer["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == "hija"
    assert told["tokens"] == ["h", "i", "j", "a"] and told["text_offset"] == [0, 1, 2, 3]
    assert told["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert told["top_logprobs"] == [None, {"i": -0.5, "z": -0.25}, {"j": -0.5, "z": -0.25}, {"a": -0.5, "z": -0.25}]
    none = complete(served, prompt=[[71, 72, 73]], max_tokens=0, logprobs=1, echo=True)["choices"][0]
    assert none["text"] == "hij" and none["logprobs"]["tokens"] == ["h", "i", "j"]


def test_logprobs_are_of_the_text_alone_without_echo_and_hold_what_json_can_say(served):
    told = complete(served, max_tokens=2, logprobs=3)["choices"][0]["logprobs"]
    assert told["tokens"] == ["a", "b"] and told["text_offset"] == [0, 1]
    assert told["top_logprobs"][0] == {"a": -0.5, "z": -0.25, "y": -9999.0}
    assert complete(served, max_tokens=1, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5}]


def test_prompt_logprobs_come_in_vllms_form(served):
    told = complete(served, max_tokens=1, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert told[0] is None and told[1]["72"] == {"logprob": -0.5, "rank": 2, "decoded_token": "i"}


def test_token_ids_are_told_where_asked_for(served):
    choice = complete(served, max_tokens=2, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == [64, 65] and choice["prompt_token_ids"] == [71, 72]
    chunks = [chunk["choices"][0] for chunk in stream(served, max_tokens=2, return_token_ids=True)]
    assert [chunk["token_ids"] for chunk in chunks] == [[64], [65]]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[71, 72], None]


def test_a_model_without_tokenizer_is_served_on_ids():
    llm, app = make_server(FakeLLM(tokenizer=None))
    served = SimpleNamespace(llm=llm, client=TestClient(app))
    chunks = stream(served, prompt=[1, 2], max_tokens=3, return_token_ids=True)
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[0], [1], [2]]
    answer = complete(served, prompt=[1, 2], max_tokens=2, logprobs=1, echo=True)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:1", "token_id:2", "token_id:0", "token_id:1"]
    response = served.client.post("/v1/completions", json={"prompt": "hi"})
    assert response.json()["error"]["code"] == "tokenizer_missing"


def test_chunks_add_up_to_the_answer(served):
    body = {"max_tokens": 5, "logprobs": 1, "echo": True, "prompt": ["hi", "you"]}
    chunks, answer = stream(served, **body), complete(served, **body)
    for chunk in chunks:
        Completion.model_validate(chunk, extra="forbid")
        assert "usage" not in chunk and chunk["id"] == chunks[0]["id"]
    for choice in answer["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_a_choice_that_has_ended_is_told_once_while_its_siblings_run():
    def output(*lengths):
        ends = [CompletionOutput(i, "ab"[:n], (1, 2)[:n], 0.0, None, "stop" if n == 1 else None) for i, n in lengths]
        return 0, RequestOutput("r", "", (1,), None, tuple(ends), False)

    async def outputs():
        yield output((0, 1), (1, 0))
        yield output((0, 1), (1, 2))

    async def told():
        return [(news.continuation.index, news.token_ids) async for news in follow(outputs(), {}, every_token=True)]

    assert asyncio.run(told()) == [(0, (1,)), (1, (1, 2))]


def test_usage_comes_last_where_asked_for_and_is_null_before(served):
    *chunks, last = stream(served, max_tokens=3, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3


def test_no_chunk_comes_for_tokens_without_text(served):
    """A stop string holds text back: the tokens come with the next text."""
    chunks = stream(served, stop="cd", max_tokens=8, logprobs=0)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_earlier_of_two_deadlines_reaches_the_engine():
    llm, app = make_server(request_timeout_s=5.0)
    client = TestClient(app)
    for asked, expected in ((None, 5.0), (2.0, 2.0), (9, 5.0)):
        assert client.post("/v1/completions", json={"prompt": "a", "deadline_s": asked}).status_code == 200
        assert llm.asked[-1].deadline_s == expected


def test_embeddings_come_as_numbers_and_as_base64(served):
    body = {"model": "fake", "input": ["hi", "you"]}
    answer = served.client.post("/v1/embeddings", json=body).json()
    EmbeddingList.model_validate(answer, extra="forbid")
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, -0.8])
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    packed = served.client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    vector = struct.unpack("<2f", base64.b64decode(packed["data"][1]["embedding"]))
    assert vector == pytest.approx((0.6, -0.8))


def test_embeddings_keep_their_deadline_and_their_salt(served):
    body = {"input": "a", "deadline_s": 0.05, "cache_salt": "s"}
    assert served.client.post("/v1/embeddings", json=body).status_code == 200
    assert served.llm.asked[0].cache_salt == "s"
    served.llm.delay_s = 5.0
    response = served.client.post("/v1/embeddings", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a", "user": "me"}),
        ("/v1/completions", {"prompt": "a", "safety_identifier": "me"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "user": "me"}),
        ("/v1/embeddings", {"input": "a", "user": "me"}),
    ],
)
def test_who_asked_goes_into_the_log(path, fields, caplog):
    client = TestClient(AccessLog(make_server()[1]))
    with caplog.at_level(logging.INFO, "fastgpt_jax.serving.access"):
        assert client.post(path, json=fields).status_code == 200
    (record,) = [record for record in caplog.records if record.name == "fastgpt_jax.serving.access"]
    assert (record.user, record.path, record.status) == ("me", path, 200)


def test_a_special_token_spelled_in_an_input_is_text(served):
    answer = served.client.post("/v1/embeddings", json={"input": "<|end|>"}).json()
    assert answer["usage"]["prompt_tokens"] == len("<|end|>")


def test_models_are_listed_under_each_name(served):
    answer = served.client.get("/v1/models").json()
    ModelList.model_validate(answer, extra="forbid")
    assert [card["id"] for card in answer["data"]] == ["fake", "org/alias"]
    card = served.client.get("/v1/models/org/alias").json()
    ModelCard.model_validate(card, extra="forbid")
    assert card["id"] == "org/alias" and card["max_model_len"] == 64
    assert complete(served, model="org/alias")["model"] == "org/alias"


def test_tokenize_and_detokenize_are_inverse(served):
    answer = served.client.post("/tokenize", json={"prompt": "hé<|end|>", "return_token_strs": True}).json()
    assert answer["tokens"][-1] == END and answer["count"] == 4 and answer["max_model_len"] == 64
    assert answer["token_strs"][0] == "h"
    assert served.client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé<|end|>"}
    assert served.client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    chat = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    tokens = served.client.post("/tokenize", json=chat).json()["tokens"]
    assert served.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "<|start|>user\nx<|end|>"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("prompt", ["hi", ["hi", "you"]])
def test_a_client_that_leaves_ends_its_requests(is_stream, prompt):
    llm, app = make_server(FakeLLM(max_model_len=4096))
    llm.delay_s = 0.01
    body = json.dumps({"prompt": prompt, "max_tokens": 4000, "stream": is_stream}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    sent = []

    async def leave_after_a_moment():
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            message = next(messages, None)
            if message is None:
                await asyncio.sleep(0.05)
                return {"type": "http.disconnect"}
            return message

        async def send(message):
            sent.append(message)

        await asyncio.wait_for(app(scope, receive, send), 2)

    asyncio.run(leave_after_a_moment())
    assert len(llm.asked) == llm.num_left == (1 if prompt == "hi" else 2)
    assert sent[0]["status"] == (200 if is_stream else 499)
    assert not is_stream or any(b'"text":' in message.get("body", b"") for message in sent)
