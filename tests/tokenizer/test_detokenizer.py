"""Streamed text is the decoded text."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt_jax.tokenizer import load_tokenizer
from tests.shared_data import shared_path
from tests.tokenizer.tokenizers_to_try import BYTE_TOKENS, MAKERS

make_tokenizer = functools.cache(lambda kind: MAKERS[kind]())
load_shared = functools.cache(lambda name: load_tokenizer(shared_path(name)))


def stream(detokenizer, ids):
    return "".join(detokenizer.add([token_id]) for token_id in ids) + detokenizer.finish()


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(kind, data, skip):
    tokenizer = make_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=12))
    assert stream(tokenizer.detokenizer(skip), ids) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", ["models/stories260K", "tokenizers/gpt2", "tokenizers/phi-3"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_of_real_tokenizers(name, data):
    tokenizer = load_shared(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    assert stream(tokenizer.detokenizer(), ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_prompt_is_context_and_is_not_given_out(kind, data):
    tokenizer = make_tokenizer(kind)
    token_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8)
    prompt, ids = data.draw(token_ids), data.draw(token_ids)
    certain = tokenizer.detokenizer().add(prompt)
    streamed = stream(tokenizer.detokenizer(prompt_ids=prompt), ids)
    assert certain + streamed == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize("kind", ["byte_fallback", "byte_level"])
def test_no_piece_shows_part_of_a_character(kind):
    tokenizer = make_tokenizer(kind)
    text = "a é 世界 🚀 b"
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add([token_id]) for token_id in ids] + [detokenizer.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 4


def test_text_is_given_out_with_its_token_where_no_later_token_can_change_it():
    tokenizer = make_tokenizer("byte_level")
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add([token_id]) for token_id in tokenizer.encode("abc a")] == ["a", "b", "c", " a"]


def test_a_run_of_byte_tokens_waits_for_its_end():
    tokenizer = make_tokenizer("byte_fallback")
    byte_ids = [3 + BYTE_TOKENS.index(f"<0x{byte:02X}>") for byte in "世".encode()]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add([token_id]) for token_id in byte_ids] == ["", "", ""]
    assert detokenizer.add([3 + 256 + 2]) == "世a"


def test_the_leading_space_stays_after_a_prompt():
    tokenizer = make_tokenizer("byte_fallback")
    the = 3 + 256 + 1
    assert tokenizer.detokenizer().add([the]) == "the"
    assert tokenizer.detokenizer(prompt_ids=[1, the]).add([the]) == " the"
    # A prompt of skipped tokens alone leaves the stream at the beginning of a text.
    assert tokenizer.detokenizer(prompt_ids=[1]).add([the]) == "the"


def test_work_per_token_does_not_grow_with_the_stream():
    tokenizer = make_tokenizer("byte_level")
    detokenizer = tokenizer.detokenizer()
    for token_id in tokenizer.encode("some words " * 50):
        detokenizer.add([token_id])
        assert len(detokenizer._window) <= 2
