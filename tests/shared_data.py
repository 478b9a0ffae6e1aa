"""Where the shared data lie (trained models, tokenizers, templates): in `shared/data` beside the checkout.

They are not part of the project; a test that needs them skips where they are absent.
"""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_path(relative: str) -> Path:
    """The path of a shared file or folder; skips the calling test where there is none."""
    path = SHARED_DATA / relative
    if not path.exists():
        pytest.skip(f"shared data are absent: {path}")
    return path
