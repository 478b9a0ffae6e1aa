"""OpenAI's own client over a real socket: a fake engine for the forms, and trained models for the words."""

import contextlib
import json
import threading
import time

import jsonschema
import numpy as np
import openai
import pytest

from fastgpt_jax import CompileConfig
from fastgpt_jax import compile as compile_model
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.serving.app import make_app
from fastgpt_jax.serving.async_llm import AsyncLLM
from fastgpt_jax.serving.metrics import ServerMetrics
from fastgpt_jax.serving.settings import ServerSettings
from fastgpt_jax.serving.unavailable import Overloaded
from tests.serving.fake_llm import FakeLLM, make_server
from tests.serving.live import listening, until
from tests.shared_data import shared_path

DEMO = "fastgpt_jax/assets/demo"
HI = [{"role": "user", "content": "Speak, speak."}]


def client_of(url, key="sk-test", **options):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **options)


@pytest.fixture(scope="module")
def fake():
    llm, app = make_server(FakeLLM(max_model_len=4096), api_keys=("sk-test",), max_body_bytes=100_000)
    with listening(app) as url:
        yield llm, client_of(url)


def test_the_client_reads_what_is_answered(fake):
    _, client = fake
    answer = client.completions.create(model="fake", prompt="hi", max_tokens=3, logprobs=1)
    assert answer.choices[0].text == "abc" and answer.choices[0].logprobs.tokens == ["a", "b", "c"]
    answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=2, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == ["ab", "ab"]
    assert answer.choices[1].logprobs.content[0].top_logprobs[0].token == "z"
    vectors = client.embeddings.create(model="fake", input=["a", "b"])  # base64 on the wire
    assert vectors.data[1].embedding == pytest.approx([0.6, -0.8])
    assert [model.id for model in client.models.list()] == ["fake", "org/alias"]
    assert client.models.retrieve("org/alias").owned_by == "fastgpt-jax"


def test_the_client_reads_streams_with_usage(fake):
    _, client = fake
    options = {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model="fake", prompt="hi", **options))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "abc" and chunks[-1].usage.completion_tokens == 3
    chunks = list(client.chat.completions.create(model="fake", messages=HI, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "abc"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 3


def test_the_client_raises_its_own_errors(fake):
    llm, client = fake
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="hi", extra_body={"colour": 1})
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "unsupported_parameter",
        "colour",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt-4", prompt="hi")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="fake", input="hi")
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="fake", prompt="x" * 200_000)
    assert caught.value.status_code == 413
    llm.error = Overloaded("busy", 3)
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="fake", prompt="hi")
        assert caught.value.response.headers["retry-after"] == "3"
        llm.error_after = 2
        with pytest.raises(openai.APIError, match="busy"):
            list(client.completions.create(model="fake", prompt="hi", stream=True))
    finally:
        llm.error, llm.error_after = None, 0


def test_the_first_chunk_is_there_before_the_last_is_made(fake):
    llm, client = fake
    llm.delay_s = 0.02
    try:
        started = time.monotonic()
        stream = client.completions.create(model="fake", prompt="hi", max_tokens=20, stream=True)
        next(iter(stream))
        first = time.monotonic() - started
        list(stream)
        assert first < (time.monotonic() - started) / 2
    finally:
        llm.delay_s = 0.0


def test_a_client_that_hangs_up_aborts_its_request(fake):
    llm, client = fake
    llm.delay_s, before = 0.01, llm.num_left
    try:
        stream = client.completions.create(model="fake", prompt="hi", max_tokens=4000, stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: llm.num_left == before + 1)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1).completions.create(model="fake", prompt="hi", max_tokens=4000)
        until(lambda: llm.num_left == before + 2)
    finally:
        llm.delay_s = 0.0


@contextlib.contextmanager
def serving(model, **settings):
    """A trained model, compiled for few shapes, behind a real socket."""
    config = CompileConfig(
        max_model_len=256, max_num_seqs=4, max_num_batched_tokens=32, prefill_buckets=(32,), decode_buckets=(4,)
    )
    engine = LLMEngine(compile_model(load_model(str(model)), config=config))
    llm = AsyncLLM(engine, max_queue_len=400, max_queued_tokens=2**20, model_name="m")
    app = make_app(llm, ServerSettings(served_model_names=("m",), **settings), counted=ServerMetrics(llm))
    with listening(app) as url:
        yield llm, client_of(url)


@pytest.fixture(scope="module")
def demo():
    with serving(DEMO) as served:
        yield served


@pytest.mark.slow
def test_the_demo_model_speaks_and_chats_the_same_whole_and_in_pieces(demo):
    _, client = demo
    options = {"model": "m", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(prompt="First Citizen:", **options).choices[0].text
    pieces = client.completions.create(prompt="First Citizen:", stream=True, **options)
    assert whole and whole == "".join(chunk.choices[0].text for chunk in pieces)
    said = client.chat.completions.create(messages=HI, **options).choices[0].message.content
    pieces = client.chat.completions.create(messages=HI, stream=True, **options)
    assert said == "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    as_prompt = client.completions.create(prompt="USER:\nSpeak, speak.\n\nASSISTANT:\n", **options)
    assert as_prompt.choices[0].text == said


@pytest.mark.slow
def test_the_demo_model_keeps_to_a_schema(demo):
    _, client = demo
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="m",
        messages=HI,
        max_tokens=128,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="a", extra_body={"guided_regex": "(a"})
    assert caught.value.status_code == 400


@pytest.mark.slow
def test_the_demo_model_embeds(demo):
    _, client = demo
    vectors = client.embeddings.create(model="m", input=["To be", "or not to be", "To be"])
    matrix = np.array([entry.embedding for entry in vectors.data])
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(matrix[0], matrix[2], atol=1e-5)
    assert np.abs(matrix[0] - matrix[1]).max() > 1e-2


@pytest.mark.slow
def test_300_clients_that_hang_up_leave_nothing_behind(demo):
    llm, client = demo
    client.completions.create(model="m", prompt="First Citizen:", max_tokens=4)  # nothing is compiled after this
    compiled_before = llm.stats().num_compiles
    problems = []

    def hang_up(index):
        try:
            with client.copy(timeout=120, http_client=openai.DefaultHttpxClient()) as own:
                stream = own.completions.create(model="m", prompt=f"Citizen {index}:", max_tokens=200, stream=True)
                for _ in range(1 + index % 3):
                    next(iter(stream))
                stream.close()
        except Exception as error:  # told by the test's own thread
            problems.append(error)

    for start in range(0, 300, 30):
        threads = [threading.Thread(target=hang_up, args=(start + i,)) for i in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    until(lambda: llm.num_unfinished == 0)
    until(lambda: llm.stats().num_running == llm.stats().num_waiting == 0)
    assert llm.stats().kv_cache_usage == 0 and llm.stats().num_compiles == compiled_before
    assert client.completions.create(model="m", prompt="First Citizen:", max_tokens=2).choices[0].text


@pytest.mark.slow
def test_stories_continue_and_score_as_their_golden_text():
    golden = json.loads((shared_path("models/stories260K") / "golden.json").read_text())
    with serving(shared_path("models/stories260K")) as (_, client):
        for case in golden[:3]:
            ids = case["prompt_ids"]
            options = {"model": "m", "prompt": [ids], "temperature": 0, "extra_body": {"return_token_ids": True}}
            num = min(len(case["greedy_ids"]), 32)
            answer = client.completions.create(max_tokens=num, **options).choices[0]
            assert answer.token_ids == case["greedy_ids"][:num]
            scored = client.completions.create(max_tokens=1, logprobs=1, echo=True, **options).choices[0].logprobs
            assert scored.token_logprobs[0] is None and len(scored.tokens) == len(ids) + 1
            np.testing.assert_allclose(scored.token_logprobs[1:-1], case["prompt_logprobs"], atol=1e-4)
