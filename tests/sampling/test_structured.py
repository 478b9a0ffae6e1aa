"""Forms of text: what a matcher allows is what the form says, at a bounded cost, and what cannot be held is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.structured_output_table import EOS, ByteTokenizer, is_accepted, make_compiler
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling import structured
from fastgpt_jax.sampling.structured import CompilersBusy, StructuredCompiler, StructuredOutput
from fastgpt_jax.sampling.structured_grammar import make_grammar
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams
from fastgpt_jax.sampling.structured_vocabulary import token_bytes
from fastgpt_jax.tokenizer import load_tokenizer
from tests.engine.fake import CharTokenizer
from tests.sampling.walk import allowed_ids, walk
from tests.shared_data import shared_path

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SHARED = make_compiler()
"""For property tests, whose examples may not share a fixture."""
DEMO = "fastgpt_jax/assets/demo"


@pytest.fixture(scope="module")
def compiler():
    return make_compiler()


@pytest.fixture(scope="module")
def demo():
    return load_tokenizer(DEMO)


def compiler_of(tokenizer, vocab_size=None):
    return StructuredCompiler(tokenizer, vocab_size or tokenizer.vocab_size, tokenizer.eos_token_ids)


def accepts(compiler, text, **params):
    return is_accepted(compiler, StructuredOutputsParams(**params), text.encode())


# Vocabularies.


@pytest.mark.parametrize(
    "where",
    [
        DEMO,
        "models/stories260K",
        pytest.param("tokenizers/phi-3", marks=pytest.mark.slow),
        pytest.param("tokenizers/qwen2", marks=pytest.mark.slow),
    ],
)
def test_the_bytes_of_tokens_spell_what_the_tokenizer_decodes(where):
    tokenizer = load_tokenizer(where if where == DEMO else shared_path(where))
    spelled = token_bytes(tokenizer, tokenizer.vocab_size)
    text = 'Once, {"naïve": [1, 2.5]}\n\t日本 🐢 <0x41> ▁ end'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(spelled[token_id] for token_id in ids).decode().removeprefix(" ").replace("▁", " ") == text.replace(
        "▁", " "
    )
    context = tokenizer.encode("a", add_special_tokens=False)
    alone = tokenizer.decode(context)
    for token_id in range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 700)):
        decoded = tokenizer.decode([*context, token_id])
        if spelled[token_id] and "\ufffd" not in decoded:
            assert decoded.removeprefix(alone).encode() == spelled[token_id]
    assert all(spelled[token_id] == b"" for token_id in tokenizer.special_token_ids)


def test_a_tokenizer_of_a_users_own_needs_decode_alone():
    compiler = StructuredCompiler(CharTokenizer(), 32, [31])
    state = StructuredOutput(StructuredOutputsParams(regex="ab?"), compiler)
    assert allowed_ids(state) == [0]
    state.accept(0)
    assert allowed_ids(state) == [1, 31]
    state.accept(31)
    assert state.is_terminated and state.failure is None


def test_a_tokenizer_that_spells_otherwise_is_refused():
    class WordPieces(ByteTokenizer):
        def describe(self):
            return json.dumps({"decoder": {"type": "WordPiece"}})

    with pytest.raises(UserError, match="decodes by WordPiece"):
        StructuredCompiler(WordPieces(), 257, [256]).compile(StructuredOutputsParams(regex="a"))
    with pytest.raises(UserError, match="no tokenizer"):
        StructuredCompiler(None, 257, [256]).compile(StructuredOutputsParams(regex="a"))


@pytest.mark.parametrize("vocab_size", [257, 288, 289, 320])
def test_a_mask_covers_the_logits_and_nothing_past_the_tokens_is_allowed(vocab_size):
    compiler = StructuredCompiler(ByteTokenizer(), vocab_size, [EOS])
    state = StructuredOutput(StructuredOutputsParams(regex="[^b]*"), compiler)
    bits = state.bitmask()
    assert bits.shape == (-(-vocab_size // 32),) and bits.dtype == np.uint32
    allowed = allowed_ids(state)
    assert EOS in allowed and ord("a") in allowed and ord("b") not in allowed and max(allowed) == EOS


def test_a_model_without_an_end_of_text_stops_where_the_form_does():
    class Endless(ByteTokenizer):
        eos_token_ids = special_token_ids = ()

    state = StructuredOutput(StructuredOutputsParams(choice=["ab"]), StructuredCompiler(Endless(), 256, []))
    for letter in b"ab":
        assert allowed_ids(state) == [letter]
        state.accept(letter)
    assert state.is_terminated and state.failure is None
    # Within the last word of the mask, a bit for an end that does not exist would lie past the vocabulary.
    open_end = StructuredOutput(StructuredOutputsParams(regex="a+"), StructuredCompiler(Endless(), 250, []))
    open_end.accept(ord("a"))
    assert allowed_ids(open_end) == [ord("a")]


def test_every_end_of_text_is_allowed_where_the_form_may_end():
    compiler = StructuredCompiler(CharTokenizer(), 32, [30, 31])
    state = StructuredOutput(StructuredOutputsParams(regex="a*"), compiler)
    assert allowed_ids(state) == [0, 30, 31]


# What matchers allow.


def test_json_of_a_schema_comes_out_whatever_tokens_are_drawn(demo):
    compiler = compiler_of(demo)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = walk(StructuredOutputsParams(json=PERSON), compiler, rng, num_tokens=30)
        person = json.loads(demo.decode(ids))
        assert set(person) == {"name", "age"} and len(person["name"]) <= 12 and person["age"] >= 0


@pytest.mark.parametrize("where", [DEMO, "models/stories260K"])
def test_any_object_comes_out_for_json_object(where):
    tokenizer = load_tokenizer(where if where == DEMO else shared_path(where))
    rng = np.random.default_rng(1)
    compiler, spelled = compiler_of(tokenizer), token_bytes(tokenizer, tokenizer.vocab_size)
    for _ in range(5):
        ids = walk(StructuredOutputsParams(json_object=True), compiler, rng, num_tokens=40)
        text = b"".join(spelled[token_id] for token_id in ids).decode()
        assert isinstance(json.loads(text), dict)


def test_white_space_is_bounded_and_can_be_left_out(compiler):
    for text in ('{"name": "a", "age": 3}', '{\n    "name": "a",\n    "age": 3\n}', '{"name":"a","age":3}'):
        assert accepts(compiler, text, json=PERSON)
    assert not accepts(compiler, '{"name":  "a","age":3}', json=PERSON)
    assert not accepts(compiler, '{"name": "a","age":3}', json=PERSON, disable_any_whitespace=True)
    assert accepts(compiler, '{"name":"a","age":3}', json=PERSON, disable_any_whitespace=True)


REGEXES = [r"[a-c]+x?", r"(ab|cd){2,3}", r"\d{3}-\d{2}", r"^a.c$", r"[^a-y]{1,4}", r"(a|b)*abb", r"a/b|/c\.d"]


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_allows_what_it_matches_and_no_more(compiler, regex):
    rng = np.random.default_rng(2)
    params = StructuredOutputsParams(regex=regex)
    for _ in range(10):
        text = bytes(walk(params, compiler, rng, num_tokens=6)).decode()
        assert re.fullmatch(regex, text), text


@settings(max_examples=60)
@given(st.sampled_from(REGEXES), st.text("abcdx-./125", max_size=8))
def test_a_regex_accepts_what_python_matches(regex, text):
    assert accepts(SHARED, text, regex=regex) == bool(re.fullmatch(regex, text))


@settings(max_examples=30)
@example(["\x7f", 'a"\\b\n', "\U0001f422", "\u2028"])
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_choice_is_one_of_its_texts(texts):
    params = StructuredOutputsParams(choice=texts)
    rng = np.random.default_rng(3)
    assert bytes(walk(params, SHARED, rng, num_tokens=3)).decode() in texts
    for text in texts:
        assert is_accepted(SHARED, params, text.encode())
    assert not is_accepted(SHARED, params, ("".join(texts) * 2).encode())


def test_as_many_choices_as_there_may_be(compiler):
    texts = [f"{index:04d}" * 12 for index in range(1024)]
    assert all(accepts(compiler, text, choice=texts) for text in texts[::100])
    assert not accepts(compiler, texts[3][:-1], choice=texts)
    nested = ["no", "nope", "no way", "n"]
    assert all(accepts(compiler, text, choice=nested) for text in nested) and not accepts(
        compiler, "nop", choice=nested
    )


@pytest.mark.parametrize(
    "grammar",
    ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'],
    ids=["lark", "gbnf"],
)
def test_a_grammar_may_nest(compiler, grammar):
    assert accepts(compiler, "(((x)))", grammar=grammar)
    assert not accepts(compiler, "((x)", grammar=grammar)
    assert not accepts(compiler, "(x))", grammar=grammar)


def test_a_name_has_one_spelling(compiler):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert accepts(compiler, '{"a":1,"b":"x"}', json=schema)
    assert not accepts(compiler, '{"\\u0061":"x"}', json=schema)
    assert accepts(compiler, json.dumps({"k/": '"\\\n'}), json_object=True)


def test_the_state_is_that_of_its_tokens(compiler):
    params = StructuredOutputsParams(json=PERSON)
    text = b'{"name": "Tom", "age": 3'
    state = StructuredOutput(params, compiler)
    for length, letter in enumerate(text):
        again = StructuredOutput(params, compiler, list(text[:length]))
        assert np.array_equal(again.bitmask(), state.bitmask())
        state.accept(letter)
    assert not state.is_terminated
    state.accept(ord("}"))
    assert state.is_terminated and state.failure is None


def test_a_token_that_is_not_allowed_fails_the_request(compiler):
    state = StructuredOutput(StructuredOutputsParams(choice=["ab"]), compiler)
    state.accept(ord("b"))
    assert state.is_terminated and "\n" not in state.failure
    early = StructuredOutput(StructuredOutputsParams(choice=["ab"]), compiler)
    early.accept(EOS)
    assert early.is_terminated and "before its form was complete" in early.failure


# Refusals and bounds.


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar, got none"),
        ({"regex": "a", "choice": ["a"]}, "exactly one of"),
        ({"json": [1]}, "must be a JSON schema or its text, got list"),
        ({"json": "{"}, "is no JSON"),
        ({"json": '{"const": ' + "1" * 5_000 + "}"}, "is no JSON: Exceeds the limit"),
        ({"json": {"format": []}}, "the format [] at #/format cannot be enforced"),
        ({"json": '{"a": 1, "a": 2}'}, "names a key twice"),
        ({"json": {"description": "x" * 70_000}}, "at most 65536 bytes"),
        ({"json": nested(70)}, "may nest 64 schemas at most"),
        ({"json": "[" * 60_000}, "nested too deeply"),
        ({"json": False}, "no text satisfies it"),
        ({"json": {"$ref": "#"}}, "no text of this model's tokens satisfies it"),
        ({"json_object": False}, "must be True"),
        ({"regex": ""}, "non-empty"),
        ({"regex": "a" * 5000}, "at most 4096 characters"),
        ({"regex": "(" * 65 + ")" * 65}, "deeper than 64"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "(a"}, "unclosed group"),
        ({"choice": []}, "at least one non-empty string"),
        ({"choice": "yes"}, "a list"),
        ({"choice": ["x"] * 1025}, "at most 1024 strings"),
        ({"choice": ["\ud800"]}, "valid Unicode"),
        ({"grammar": "start: y"}, 'unknown name: "y"'),
        ({"grammar": 'start: %json {"not": {}}'}, "'%json', which is not supported"),
        ({"grammar": "start[temperature=0.5]: /a/"}, "'temperature', which is not supported"),
        ({"grammar": "start: X\nX: " + " & ".join(f"/.*{n}.*/" for n in range(12))}, "at most 8 expressions by &"),
        ({"grammar": 'start: a\n\n \t@x\na: "a"'}, "'@', which is not supported"),
        ({"grammar": "nothing of the kind"}, "neither Lark nor GBNF"),
        ({"regex": "a", "disable_any_whitespace": True}, "is for JSON"),
    ],
)
def test_what_cannot_be_enforced_is_one_line(compiler, params, message):
    with pytest.raises(UserError) as error:
        compiler.compile(StructuredOutputsParams(**params))
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


HARD = [
    "(a+)+b",
    "(a|aa)+b",
    "(.*a){12}",
    "(a?){2000}a{2000}",
    "((a{1,100}){1,100}){1,100}",
    ".*.*.*.*.*=.*",
    "(.*a.{40})",
]


@pytest.mark.parametrize("regex", HARD)
def test_hard_patterns_cost_a_bounded_time_a_token(compiler, regex):
    start = time.perf_counter()
    state = StructuredOutput(StructuredOutputsParams(regex=regex), compiler)
    for _ in range(100):
        state.bitmask()
        if state.is_terminated:
            break
        state.accept(ord("a"))
    # 100 tokens take 0.1 s on an idle core; what would blow up takes for ever.
    assert time.perf_counter() - start < 5
    assert state.failure is None or "\n" not in state.failure


def test_an_ambiguous_grammar_costs_a_bounded_time_a_token(compiler):
    state = StructuredOutput(StructuredOutputsParams(grammar='start: x\nx: x x | "a" | x x x'), compiler)
    slowest_s = 0.0
    for _ in range(1500):
        start = time.thread_time()
        state.bitmask()
        if not state.is_terminated:
            state.accept(ord("a"))
        slowest_s = max(slowest_s, time.thread_time() - start)
        if state.is_terminated:
            break
    # 0.01 s on an idle core, where without limits it grows to 0.5 s.
    assert slowest_s < 0.2 and "structured_outputs failed" in state.failure


@pytest.mark.parametrize("rule", ['start: "a"', 'root ::= "a"'], ids=["lark", "gbnf"])
def test_blank_lines_of_a_grammar_cost_little(rule):
    start = time.thread_time()
    make_grammar(StructuredOutputsParams(grammar=rule + "\n" * 60_000))
    # 0.05 s; a search that began anew at each of them took 6 s.
    assert time.thread_time() - start < 1


def test_a_form_is_compiled_once_and_few_are_kept(monkeypatch):
    made = []
    original = structured.make_grammar
    monkeypatch.setattr(structured, "make_grammar", lambda params: made.append(params) or original(params))
    compiler = StructuredCompiler(ByteTokenizer(), EOS + 1, (EOS,), max_cached=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        StructuredOutput(StructuredOutputsParams(choice=[text]), compiler)
    assert [params.choice[0] for params in made] == ["a", "b", "c", "b"]


def test_copies_of_a_form_do_not_share_their_place(compiler):
    first, second = (StructuredOutput(StructuredOutputsParams(choice=["ab", "cd"]), compiler) for _ in range(2))
    first.accept(ord("a"))
    assert allowed_ids(first) == [ord("b")] and allowed_ids(second) == [ord("a"), ord("c")]


def test_many_threads_may_ask_one_compiler():
    compiler = StructuredCompiler(ByteTokenizer(), EOS + 1, (EOS,), max_cached=3)

    def spell(index):
        text = f"{index % 7}"
        state = StructuredOutput(StructuredOutputsParams(choice=[text]), compiler)
        return allowed_ids(state) == [ord(text)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(spell, range(200)))


def test_what_takes_too_long_to_compile_is_refused(monkeypatch):
    monkeypatch.setattr(structured, "make_grammar", lambda params: time.sleep(0.5))
    compiler = StructuredCompiler(ByteTokenizer(), EOS + 1, (EOS,), deadline_s=0.05)
    with pytest.raises(UserError, match="longer than 0.05 s to compile"):
        compiler.compile(StructuredOutputsParams(choice=["a"]))


def test_a_deadline_counts_from_where_a_form_begins_to_compile(monkeypatch):
    monkeypatch.setattr(structured, "make_grammar", lambda params: time.sleep(0.4) or make_grammar(params))
    compiler = StructuredCompiler(ByteTokenizer(), EOS + 1, (EOS,), deadline_s=0.7)
    compiler.prepare()
    forms = [StructuredOutputsParams(choice=[text]) for text in "abc"]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(compiler.compile, forms))  # the last waits 0.4 s and compiles for another 0.4 s
    assert all(map(compiler.is_compiled, forms))


def test_a_form_that_finds_all_compilers_at_work_is_no_wrong_form(monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(structured, "make_grammar", lambda params: may_end.wait(10) and make_grammar(params))
    compiler = StructuredCompiler(ByteTokenizer(), EOS + 1, (EOS,), deadline_s=0.05)
    forms = [StructuredOutputsParams(choice=[text]) for text in "abc"]
    for form in forms[:2]:
        with pytest.raises(UserError, match="longer than 0.05 s to compile"):
            compiler.compile(form)
    with pytest.raises(CompilersBusy, match="waited 0.05 s for other forms") as error:
        compiler.compile(forms[2])
    assert error.value.retry_after_s == 1
    may_end.set()
    deadline_s = time.monotonic() + 10
    while not all(map(compiler.is_compiled, forms[:2])):  # late, and not for nothing
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install llguidance"):
        make_compiler().compile(StructuredOutputsParams(choice=["a"]))


def test_serving_does_not_load_llguidance_before_it_is_asked_for():
    code = (
        "import sys; import fastgpt_jax.engine.llm, fastgpt_jax.sampling.structured\n"
        "from fastgpt_jax.sampling.params import SamplingParams\n"
        "SamplingParams(structured_outputs={'regex': 'a'}); print('llguidance' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
