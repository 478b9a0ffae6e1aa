"""From the fields of a request to `SamplingParams`.

Knows no route. The one idea: two families of fields ask for a form of the text (OpenAI's `response_format`, and vLLM's
`structured_outputs` with its older `guided_*`); one of them may be used, and all of them end as one value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.structured_params import StructuredOutputsParams
from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.limits import check_most, check_schema, check_vocabulary
from fastgpt_jax.serving.protocol_sampling import HANDED_ON, SamplingRequest
from fastgpt_jax.serving.settings import ServerSettings
from fastgpt_jax.serving.state import Server

_GUIDED = ("json", "regex", "choice", "grammar")


def make_sampling_params(
    request: SamplingRequest, server: Server, *, max_tokens: int | None, logprobs: int | None, **more: Any
) -> SamplingParams:
    """Makes the parameters; what is out of range, or what the model does not have, is an error that names its field."""
    fields = {name: getattr(request, name) for name in HANDED_ON if name in request.model_fields_set}
    constraint = _constraint(request, server.settings)
    if constraint is not None:
        fields["structured_outputs"] = constraint
    params = named_error(
        lambda: SamplingParams(**{**fields, "max_tokens": max_tokens, "logprobs": logprobs, **more}),
        type(request).model_fields,
    )
    _check_model(params, server.llm)
    return params


def _check_model(params: SamplingParams, llm: Any) -> None:
    check_vocabulary("stop_token_ids", params.stop_token_ids, llm.vocab_size)
    check_vocabulary("logit_bias", params.logit_bias, llm.vocab_size)
    check_most("logprobs", "likeliest tokens", params.logprobs or 0, llm.max_logprobs)
    check_most("prompt_logprobs", "likeliest tokens", params.prompt_logprobs or 0, llm.max_logprobs)
    if params.stop and llm.tokenizer is None:
        raise ApiError("tokenizer_missing", "the model has no tokenizer; use stop_token_ids in place of stop", "stop")


def check_stream_options(request: SamplingRequest) -> None:
    """Raises ApiError for options of a stream where none was asked for, and for padding of its chunks."""
    if request.stream_options is not None and not request.stream:
        raise ApiError("invalid_value", "stream_options goes with stream: true", "stream_options")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        param = "stream_options.include_obfuscation"
        raise ApiError("unsupported_parameter", f"{param} is not supported by this server; leave it out", param)


def named_error(make: Callable[[], Any], names: Mapping[str, Any]) -> Any:
    """Calls a function; its UserError becomes the answer, with the field that the message begins with."""
    try:
        return make()
    except UserError as error:
        first = str(error).split(" ")[0].split(".")[0]
        raise ApiError("invalid_value", str(error), first if first in names else None) from None


def _constraint(request: SamplingRequest, settings: ServerSettings) -> StructuredOutputsParams | None:
    """What the text must keep to; asking for it in two ways is refused."""
    found = [entry for entry in (_response_format(request), _structured(request), _guided(request)) if entry]
    if len(found) > 1:
        names = " and ".join(param for param, _ in found)
        raise ApiError("invalid_value", f"{names} ask for the form of the text in two ways; use one", found[1][0])
    if not found:
        return None
    ((param, fields),) = found
    for value in fields.values():
        check_schema(param, value, settings)
    try:
        return StructuredOutputsParams(**fields)
    except UserError as error:
        raise ApiError("invalid_value", str(error), param) from None


def _response_format(request: SamplingRequest) -> tuple[str, dict[str, Any]] | None:
    wanted = request.response_format
    if wanted is None:
        return None
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise ApiError(
            "invalid_value", "response_format.json_schema goes with the type json_schema", "response_format.json_schema"
        )
    if wanted.type == "text":
        return None
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        return "response_format", {"json_object": True}
    return "response_format", {"json": wanted.json_schema.schema_}


def _structured(request: SamplingRequest) -> tuple[str, dict[str, Any]] | None:
    wanted = request.structured_outputs
    return None if wanted is None else ("structured_outputs", wanted.model_dump(by_alias=True, exclude_unset=True))


def _guided(request: SamplingRequest) -> tuple[str, dict[str, Any]] | None:
    given = {kind: value for kind in _GUIDED if (value := getattr(request, f"guided_{kind}")) is not None}
    return ("guided_" + next(iter(given)), given) if given else None
