"""What counts as the id of a model on a hub, and what looking it up may use.

Knows no network. The one idea: a path that exists is a path; `org/name`, `org/name@revision` and the same after
`modelscope:` are ids; what is written as a path (`./x`, `/x`, `x/`, `x.gguf`) never is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_ID = re.compile(r"(?:(?P<hub>modelscope):)?(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
_FILE_SUFFIXES = (".gguf", ".py", ".json", ".safetensors")


@dataclass(frozen=True)
class ModelId:
    """`revision` is a branch, tag or commit, None for the hub's default branch."""

    hub: Literal["huggingface", "modelscope"]
    owner: str
    name: str
    revision: str | None = None

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        prefix = "modelscope:" if self.hub == "modelscope" else ""
        return prefix + self.repository + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubSettings:
    """Where ids are looked up.

    What is None for Hugging Face is decided by its own library, which reads its own environment variables (HF_HOME,
    HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) and settings, so that a cache and a token are shared with every
    other program. ModelScope's are these; whoever wants them from the environment reads it and fills them in.

    Attributes:
      modelscope_cache: The folder that holds `models/OWNER/NAME`; None for `~/.cache/modelscope/hub`.
      is_offline: Whether the caches are all there is.
      timeout_s: How long a server may take to connect and to begin an answer.
    """

    huggingface_cache: Path | None = None
    huggingface_endpoint: str | None = None
    modelscope_cache: Path | None = None
    modelscope_endpoint: str = "https://modelscope.cn"
    is_offline: bool = False
    timeout_s: float = 10.0


def parse_model_id(model: str | Path) -> ModelId | None:
    """The id that this text is; None where it is a path."""
    text = str(model)
    found = _ID.fullmatch(text)
    if isinstance(model, Path) or found is None or text.endswith(_FILE_SUFFIXES) or Path(text).exists():
        return None
    hub = "modelscope" if found["hub"] else "huggingface"
    return ModelId(hub, found["owner"], found["name"], found["revision"])
