"""Text files, documents and windows."""

import numpy as np
import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.training import data

STREAM = np.arange(100, dtype=np.int32)


def test_a_batch_is_a_function_of_seed_and_step():
    first, again = (data.random_windows(STREAM, 4, 8, seed=1, step=7) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, data.random_windows(STREAM, 4, 8, seed=1, step=8))
    assert not np.array_equal(first, data.random_windows(STREAM, 4, 8, seed=2, step=7))


def test_windows_are_runs_of_the_stream():
    windows = data.random_windows(STREAM, 50, 8, seed=0, step=0)
    assert windows.shape == (50, 9)
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)


def test_validation_windows_predict_each_token_once():
    windows = data.all_windows(STREAM, 10)
    np.testing.assert_array_equal(windows[:, 1:].reshape(-1), np.arange(1, 91))


def test_a_stream_of_exactly_one_window_is_used():
    np.testing.assert_array_equal(data.all_windows(STREAM, 99), STREAM[None])
    np.testing.assert_array_equal(data.random_windows(STREAM, 1, 99, seed=0, step=0), STREAM[None])


def test_a_text_shorter_than_a_window_is_a_user_error():
    with pytest.raises(UserError, match="at least data.window_tokens"):
        data.random_windows(STREAM, 4, 100, seed=0, step=0)


def test_documents_join_paragraphs_and_lose_no_words():
    text = "a\nb\n\nc\n \n\nd\n\ne"
    assert data.documents(text, 2) == ["a\nb\n\nc\n\n", "d\n\ne\n\n"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such text file"), (b" \n", "is empty"), (b"ab\xff", "UTF-8.*byte 2")]
)
def test_an_unusable_text_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        data.read_text(path)
    assert "\n" not in str(caught.value)
