"""The X-ray as one page that needs no network: the data beside a template, a style and a script of the package's own.

Knows no layout: `fastgpt_jax/assets/xray/` draws. The one idea: the page holds data and never markup made here, so that
nothing in a model's names or lines can become part of the page.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from fastgpt_jax.artifact.codec import encode
from fastgpt_jax.compiler.listing import Listing
from fastgpt_jax.compiler.xray import Stage, XRay

MAX_BYTES = 1_900_000
"""Above it the programs between the first and the last are left out, which the page says."""


def render_html(found: XRay, shown: str) -> str:
    """The page, opened at the stage `shown`."""
    data = _data(found, shown)
    for stage in _least_needed(data["stages"], shown):
        if len(_json(data)) <= MAX_BYTES:
            break
        stage["listing"], stage["is_left_out"] = None, True
    page = _asset("page.html")
    for mark, text in (("STYLE", _asset("style.css")), ("SCRIPT", _asset("script.js")), ("DATA", _json(data))):
        page = page.replace(f"<!--{mark}-->", text)
    return page


def _asset(name: str) -> str:
    return (resources.files("fastgpt_jax") / "assets" / "xray" / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that cannot end the script element it lies in."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _data(found: XRay, shown: str) -> dict[str, Any]:
    names = [stage.name for stage in found.stages]
    machine = {**encode(found.machine), "balance": found.machine.balance}
    return {
        **{key: getattr(found, key) for key in ("name", "step", "num_params", "capacity")},
        "shown": len(names) - 1 - names[::-1].index(shown),
        "machine": machine,
        "cache": encode(found.cache),
        "bytes_per_token": found.cache.bytes_per_token,
        "bytes_per_request": found.cache.bytes_per_request,
        "stages": [_stage(stage, names) for stage in found.stages],
        "compiled": encode(found.compiled),
        "sources": encode(found.sources),
        "masks": {
            "pictures": [{**encode(p), "layer_text": p.layer_text} for p in found.masks.pictures],
            "notes": [*found.notes, *found.masks.notes],
        },
    }


def _stage(stage: Stage, names: list[str]) -> dict[str, Any]:
    fields = ("name", "numerics", "seconds", "matched", "num_ops", "flops", "nbytes")
    return {
        **{key: getattr(stage, key) for key in fields},
        "made": encode(stage.made),
        "missed": list(stage.missed),
        "listing": None if stage.listing is None else _listing(stage.listing, names),
    }


def _listing(listing: Listing, names: list[str]) -> dict[str, Any]:
    """Rows as arrays, in the order that the script reads."""
    rows = [
        [
            row.name,
            encode(row.results),
            list(row.operands),
            row.params,
            row.source,
            names.index(row.made_by) if row.made_by else 0,
            int(row.is_gone),
            int(row.is_prepared),
            row.flops,
            row.nbytes,
            row.bound,
            row.depth,
        ]
        for row in listing.rows
    ]
    repeats = [[r.start, r.length, r.count] for r in listing.repeats]
    return {"inputs": encode(listing.inputs), "rows": rows, "repeats": repeats, "seconds": listing.seconds}


def _least_needed(stages: list[dict[str, Any]], shown: str) -> list[dict[str, Any]]:
    """Stages in the order in which their programs are given up: those in between first, the one shown last."""
    middle = [stage for stage in stages[1:-1] if stage["name"] != shown]
    ends = [stage for stage in (stages[0], stages[-1]) if stage["name"] != shown]
    return [*middle, *ends, *(stage for stage in stages if stage["name"] == shown)]
