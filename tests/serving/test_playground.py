"""The page at `/`: its files are safe to serve, and it works in a browser, by mouse and by keyboard."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient

from fastgpt_jax.serving.async_llm import Overloaded
from tests.serving.chromium import open_page
from tests.serving.fake_llm import FakeLLM, make_server
from tests.serving.live import listening, until

FILES = ("index.html", "playground.css", "playground.js", "api.js", "tokens.js", "icon.svg")
LAST = "document.querySelector('#log article:last-child p')"


@pytest.fixture(scope="module")
def client():
    return TestClient(make_server(api_keys=("sesame",))[1])


def test_the_page_and_its_files_need_no_key_and_name_no_other_host(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    for name in FILES:
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|\beval\(|innerHTML|onclick=|style=", answer.text), (
            name
        )
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "connect-src 'self'" in policy


def test_no_other_file_can_be_had(client):
    for name in ("nothing.js", "..%2fplayground.py", "%2e%2e/playground.py", "../playground.py"):
        assert client.get(f"/static/{name}").status_code in (401, 404), name
    assert client.get("/static/nothing.js").json()["error"]["code"] == "route_not_found"


def test_what_the_browser_has_is_not_sent_again(client):
    tag = client.get("/").headers["etag"]
    assert client.get("/", headers={"if-none-match": tag}).status_code == 304


@pytest.fixture(scope="module")
def page_and_llm(tmp_path_factory):
    llm, app = make_server(FakeLLM(max_model_len=256))
    with listening(app) as address, open_page(tmp_path_factory.mktemp("chromium")) as page:
        page.goto(address)
        page.until("document.querySelector('#model-name').textContent.includes('fake')")
        yield page, llm


@pytest.fixture
def opened(page_and_llm):
    """A fresh page."""
    page, llm = page_and_llm
    llm.error, llm.delay_s, llm.asked, llm.num_left = None, 0.0, [], 0
    page.problems.clear()
    page.run("sessionStorage.clear(), localStorage.clear()")
    page.command("Page.reload")
    page.until("document.querySelector('#model-name')?.textContent.includes('256 tokens')")
    yield page, llm
    assert page.problems == [], "the console shows no error and no violation of the content policy"


def say(page, text):
    page.run("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")


def choose(page, mode):
    page.run(f"document.querySelector('input[value={mode}]').click()")


def until_done(page):
    page.until("document.querySelector('#stats').textContent !== '' && document.querySelector('#stop-button').hidden")


def test_a_chat_by_keyboard_remembers_what_was_said(opened):
    page, llm = opened
    assert page.run("document.activeElement.id") == "prompt"
    page.run("document.querySelector('#system').value = 'Be brief.'")
    page.run("document.querySelector('#max-tokens').value = 5")
    for text in ("hi", "and"):
        page.run("document.querySelector('#stats').textContent = ''")
        say(page, text)
        until_done(page)
    assert page.run(f"{LAST}.textContent") == "abcde"
    said = "<|start|>{}\n{}<|end|>".format
    expected = [("system", "Be brief."), ("user", "hi"), ("assistant", "abcde"), ("user", "and")]
    assert llm.asked[-1].text == "".join(said(*one) for one in expected) + "<|start|>assistant\n"
    assert "5 tokens" in page.run("document.querySelector('#stats').textContent")


def test_a_completion_goes_on_where_it_ended_and_breaks_lines(opened):
    page, llm = opened
    choose(page, "completion")
    page.run("document.querySelector('#max-tokens').value = 3")
    page.run("document.querySelector('#prompt').focus()")
    page.type("one")
    page.press("Enter", modifiers=8)
    page.type("two")
    page.press("Enter")
    until_done(page)
    assert llm.asked[0].text == "one\ntwo" and page.run(f"{LAST}.textContent") == "one\ntwoabc"
    assert page.run("document.querySelector('#prompt').value") == "one\ntwoabc"


@pytest.mark.parametrize("how", ["escape", "button"])
def test_stopping_keeps_what_is_there_and_aborts(opened, how):
    page, llm = opened
    llm.delay_s = 0.05
    say(page, "go")
    page.until("document.querySelector('article.model p')?.textContent.length > 1")
    if how == "escape":
        page.press("Escape")
    else:
        page.run("document.querySelector('#stop-button').click()")
    until_done(page)
    assert "stopped" in page.run("document.querySelector('#stats').textContent")
    assert 0 < len(page.run(f"{LAST}.textContent")) < 40
    until(lambda: llm.num_left == 1)


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_tokens_are_coloured_and_told_to_the_keyboard(opened, mode):
    page, llm = opened
    choose(page, mode)
    page.run("document.querySelector('#logprobs').click()")
    page.run("document.querySelector('#max-tokens').value = 4")
    say(page, "x")
    until_done(page)
    assert llm.asked[0].params.logprobs == 5
    assert page.run(f"[...{LAST}.querySelectorAll('.token')].map((one) => one.textContent).join('')") == "abcd"
    background = page.run(f"getComputedStyle({LAST}.querySelector('.token')).backgroundColor")
    assert background not in ("rgba(0, 0, 0, 0)", "transparent"), "a likelihood of 61% shows"
    page.run(f"{LAST}.focus()")
    page.press("End")
    page.press("ArrowLeft")
    assert page.run("document.querySelector('.token.current').textContent") == "c"
    tip = page.run("[...document.querySelectorAll('#tip div')].map((one) => one.textContent)")
    assert tip[0] == "c60.7%" and "z77.9%" in tip[1:]
    page.press("Tab")
    assert page.run("document.querySelector('#tip').hidden")


def test_what_a_model_writes_stays_text(opened):
    page, _ = opened
    choose(page, "completion")
    page.run("document.querySelector('#max-tokens').value = 1")
    say(page, "<img src=x onerror=alert(1)>")
    until_done(page)
    assert page.run(f"{LAST}.querySelectorAll('img').length") == 0
    assert page.run(f"{LAST}.textContent") == "<img src=x onerror=alert(1)>a"


def test_refusals_say_what_to_do(opened):
    page, llm = opened
    llm.error = Overloaded("the server is busy", 7)
    say(page, "x")
    page.until("document.querySelector('article.error') !== null")
    assert page.run(f"{LAST}.textContent") == "the server is busy\nTry again in 7 s."
    page.problems.clear()  # the browser notes the status


def test_light_and_dark(opened):
    page, _ = opened
    colour = "getComputedStyle(document.body).backgroundColor"
    page.prefer("dark")
    dark = page.run(colour)
    page.prefer("light")
    light = page.run(colour)
    assert dark != light
    page.run("document.querySelector('#theme').click()")
    assert page.run(colour) == dark
    page.command("Page.reload")
    page.until("document.readyState === 'complete' && document.documentElement.dataset.theme === 'dark'")
    assert page.run(colour) == dark, "the choice stays"


def test_a_key_is_asked_for_and_kept_for_the_tab(tmp_path_factory):
    llm = FakeLLM(max_model_len=256)
    _, app = make_server(llm, api_keys=("sesame",))
    with listening(app) as address, open_page(tmp_path_factory.mktemp("keyed"), width=420, height=800) as page:
        page.goto(address)
        page.until("document.querySelector('#model-name').textContent === 'needs an API key'")
        say(page, "x")
        page.until("document.querySelector('article.error') !== null")
        assert page.run("document.activeElement.id") == "api-key", "the panel opens, on a narrow page too"
        page.type("sesame")
        page.press("Enter")
        page.press("Escape")
        page.run("document.querySelector('#stats').textContent = ''")
        say(page, "x")
        until_done(page)
        assert page.run(f"{LAST}.textContent").startswith("abc")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
