"""Models of the Hugging Face hub, by way of its own library.

Knows the layout of the library's cache; the protocol (listing, resuming, locks, tokens) is the library's. The one idea:
a model whose snapshot is complete on disk is used as it is, and nothing is asked of the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastgpt_jax.checkpoint.hub.files import BESIDE_WEIGHTS, check_sha256, choose_files, is_complete
from fastgpt_jax.checkpoint.hub.model_id import HubSettings, ModelId
from fastgpt_jax.errors import UserError

_DEFAULT_REVISION = "main"


class _Progress(tqdm):
    """A bar that is drawn on a terminal and nowhere else."""

    def __init__(self, *args: Any, **options: Any):
        options.pop("name", None)  # of the library's own bars
        options["disable"] = options.get("disable") or None
        super().__init__(*args, **options)


def find_on_huggingface(model: ModelId, settings: HubSettings) -> Path:
    """The snapshot in the cache, downloaded first where it is not there or not whole.

    Raises:
      UserError: It is not in the cache and cannot be fetched; the message says why, and what to do.
    """
    # Only models given by an id need the library, which takes 0.2 s to import.
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub import constants, errors  # noqa: PLC0415

    cache = settings.huggingface_cache or Path(constants.HF_HUB_CACHE)
    snapshot = _cached_snapshot(cache, model)
    if snapshot is not None:
        return snapshot
    endpoint = settings.huggingface_endpoint or constants.ENDPOINT
    if settings.is_offline or constants.HF_HUB_OFFLINE:
        raise _unreachable(model, cache, "working offline was asked for")
    try:
        return _download(model, cache, endpoint, settings, huggingface_hub)
    except errors.GatedRepoError as error:
        raise UserError(
            f"{model} is gated: accept its terms at {endpoint}/{model.repository}, then set HF_TOKEN or run "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{model.repository} has no revision {model.revision or _DEFAULT_REVISION!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is neither a folder {model} nor a model of that id at {endpoint}; check the name, and for a "
            "private model set HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{endpoint} refused {model}: {_first_line(error)}; try again later") from error
    except UserError:
        raise
    except OSError as error:
        # The library's own errors of the network are OSErrors without a number.
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise _unreachable(model, cache, f"{endpoint} cannot be reached: {_first_line(error)}") from error
        raise UserError(f"cannot write {error.filename or cache}: {error.strerror}") from error
    except Exception as error:  # The library's HTTP client, and so its errors, differ between its versions.
        raise _unreachable(model, cache, f"{endpoint} cannot be reached: {_first_line(error)}") from error


def _download(model: ModelId, cache: Path, endpoint: str, settings: HubSettings, library: Any) -> Path:
    api = library.HfApi(endpoint=endpoint)
    info = api.model_info(model.repository, revision=model.revision, timeout=settings.timeout_s, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    names = choose_files(siblings, model)

    def fetch(wanted: list[str]) -> Path:
        return Path(
            library.snapshot_download(
                model.repository,
                revision=model.revision,
                cache_dir=cache,
                endpoint=endpoint,
                etag_timeout=settings.timeout_s,
                allow_patterns=wanted,
                tqdm_class=_Progress,
            )
        )

    beside = [name for name in names if name in BESIDE_WEIGHTS]
    if beside:
        fetch(beside)
    folder = fetch([name for name in names if name not in beside])  # last, because weights make a snapshot complete
    for name in names:
        large = siblings[name].lfs
        check_sha256(folder / name, large.sha256 if large else None, model)
    return folder


def _cached_snapshot(cache: Path, model: ModelId) -> Path | None:
    """`models--OWNER--NAME/snapshots/COMMIT`; the commit is the revision itself or what `refs/REVISION` names."""
    revision = model.revision or _DEFAULT_REVISION
    folder = cache / f"models--{model.owner}--{model.name}"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() and is_complete(snapshot) else None


def _unreachable(model: ModelId, cache: Path, reason: str) -> UserError:
    return UserError(
        f"there is no folder {model} and no whole model of that id in {cache}, and {reason}; fetch it where there is a "
        "network, or give the path of a model folder"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
