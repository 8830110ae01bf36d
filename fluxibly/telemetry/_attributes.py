"""The attributes of a call's spans and metrics, read from its request, response, error and record.

This module does not need OpenTelemetry. An attribute is absent if its value is unknown.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fluxibly.errors import ProviderError, error_type, root_cause
from fluxibly.telemetry import semconv
from fluxibly.types import Outcome, Request, Response, StreamStats, Usage

if TYPE_CHECKING:
    from fluxibly.types import CallRecord, ProviderInfo

_CODE = re.compile(r"[A-Za-z0-9][\w.\-]{0,63}")


_TEXT = ("text", {"type": "text"})
"""The response formats that ask for plain text."""
_latest: tuple[ProviderInfo | None, dict[str, Any]] = (None, {})


def provider_attributes(info: ProviderInfo) -> dict[str, Any]:
    """Return the attributes that name the provider and its server."""
    global _latest  # noqa: PLW0603  # caches the attributes of the latest provider
    attributes: dict[str, Any]
    of, attributes = _latest
    if of is not info:
        attributes = {semconv.PROVIDER: info.telemetry_name}
        if info.server_address is not None:
            attributes[semconv.SERVER_ADDRESS] = info.server_address
            if info.server_port is not None:
                attributes[semconv.SERVER_PORT] = info.server_port
        _latest = (info, attributes)
    return attributes.copy()


def request_attributes(request: Request) -> dict[str, Any]:
    """Return the attributes that are known when the call begins, so that samplers can see them.

    The conversation id is `request.metadata["conversation_id"]`, if present.
    """
    call = request.call
    attributes = provider_attributes(call.provider if request.target is call.target else asked_provider(request))
    attributes[semconv.OPERATION] = semconv.CHAT
    attributes[semconv.REQUEST_MODEL] = request.model
    if call.streaming:
        attributes[semconv.REQUEST_STREAM] = True
    # Written out, because a loop over a table of names takes three times as long. Numbers are converted to float,
    # because backends expect all values of an attribute to have the same type.
    if request.temperature is not None:
        attributes[semconv.REQUEST_TEMPERATURE] = float(request.temperature)
    if request.max_tokens is not None:
        attributes[semconv.REQUEST_MAX_TOKENS] = request.max_tokens
    if request.top_p is not None:
        attributes[semconv.REQUEST_TOP_P] = float(request.top_p)
    if request.top_k is not None:
        attributes[semconv.REQUEST_TOP_K] = request.top_k
    if request.frequency_penalty is not None:
        attributes[semconv.REQUEST_FREQUENCY_PENALTY] = float(request.frequency_penalty)
    if request.presence_penalty is not None:
        attributes[semconv.REQUEST_PRESENCE_PENALTY] = float(request.presence_penalty)
    if request.seed is not None:
        attributes[semconv.REQUEST_SEED] = request.seed
    if request.reasoning_effort is not None:
        attributes[semconv.REQUEST_REASONING_LEVEL] = request.reasoning_effort
    if request.stop:
        attributes[semconv.REQUEST_STOP_SEQUENCES] = request.stop
    if request.n is not None and request.n != 1:
        attributes[semconv.REQUEST_CHOICE_COUNT] = request.n
    if request.response_format is not None:
        attributes[semconv.OUTPUT_TYPE] = "text" if request.response_format in _TEXT else "json"
    if request.metadata and "conversation_id" in request.metadata:
        attributes[semconv.CONVERSATION_ID] = str(request.metadata["conversation_id"])
    return attributes


def add_response(attributes: dict[str, Any], response: Response) -> None:
    """Add the response's id, model and finish reasons, but not its usage."""
    if response.id:
        attributes[semconv.RESPONSE_ID] = response.id
    if response.model:
        attributes[semconv.RESPONSE_MODEL] = response.model
    if response.finish_reason:
        others = [other.finish_reason for other in response.alternatives if other.finish_reason]
        attributes[semconv.RESPONSE_FINISH_REASONS] = [response.finish_reason, *others]


def add_unstreamed(attributes: dict[str, Any], response: Response) -> None:
    """Count a response that was not streamed (a cache hit) as one chunk.

    The consumer of a stream receives it as one chunk, after all layers have finished.
    """
    if response.has_output or response.finish_reason:
        attributes[semconv.STREAM_CHUNKS] = 1
        attributes[semconv.STREAM_CHARACTERS] = len(response.text)


def usage_attributes(usage: Usage | None, total: Usage | None) -> dict[str, Any]:
    """Return the token counts of a span that the services reported, and those of the whole call if they are more."""
    attributes: dict[str, Any] = {}
    if usage is not None:
        if usage.input_tokens is not None:
            attributes[semconv.USAGE_INPUT] = usage.input_tokens
        if usage.output_tokens is not None:
            attributes[semconv.USAGE_OUTPUT] = usage.output_tokens
        if usage.cached_tokens is not None:
            attributes[semconv.USAGE_CACHE_READ] = usage.cached_tokens
        if usage.cache_write_tokens is not None:
            attributes[semconv.USAGE_CACHE_WRITE] = usage.cache_write_tokens
        if usage.reasoning_tokens is not None:
            attributes[semconv.USAGE_REASONING] = usage.reasoning_tokens
    if total is not None and (total.total_tokens or 0) > (0 if usage is None else usage.total_tokens or 0):
        if total.input_tokens is not None:
            attributes[semconv.TOTAL_INPUT] = total.input_tokens
        if total.output_tokens is not None:
            attributes[semconv.TOTAL_OUTPUT] = total.output_tokens
    return attributes


def record_attributes(call: CallRecord, attempts: int) -> dict[str, Any]:
    """Return the attributes that are known when the call ends: attempts, cache hit and stream statistics."""
    attributes: dict[str, Any] = {semconv.ATTEMPTS: attempts}
    if call.cache_hit:
        attributes[semconv.CACHE_HIT] = True
    if call.cost is not None:
        attributes[semconv.COST] = float(call.cost)
    if call.streaming:
        attributes[semconv.STREAM_CHUNKS] = call.chunks
        attributes[semconv.STREAM_CHARACTERS] = call.characters
        first = time_to_first_chunk(call)
        if first is not None:
            attributes[semconv.RESPONSE_TIME_TO_FIRST_CHUNK] = first
        if call.stats is not None:
            attributes |= _statistics(call.stats)
    return attributes


def _statistics(stats: StreamStats) -> dict[str, Any]:
    measured = {
        semconv.STREAM_GAP_P50: stats.gap_p50,
        semconv.STREAM_GAP_P95: stats.gap_p95,
        semconv.STREAM_GAP_MAX: stats.gap_max,
        semconv.STREAM_LONGEST_STALL: stats.longest_stall,
    }
    return {key: seconds for key, seconds in measured.items() if seconds is not None}


def time_to_first_chunk(call: CallRecord) -> float | None:
    """Return the seconds from sending the first attempt to delivering the first chunk.

    It is None if a middleware let out a chunk of its own before anything was sent.
    """
    if call.first_chunk_at is None or call.sent_at is None or call.first_chunk_at < call.sent_at:
        return None
    return call.first_chunk_at - call.sent_at


def asked_provider(request: Request) -> ProviderInfo:
    """Return the provider that a request goes to, or the pipeline's own if that provider is not made yet."""
    call = request.call
    if request.target is not call.target and call.targets.is_made(request.target):
        return call.info_of(request.target)
    return call.provider


def named(request: Request, outcome: Outcome) -> tuple[ProviderInfo, str, str | None]:
    """Return the provider and the model that a call is named after, and the name of the model in the answer.

    These are the provider and the model that the last attempt asked (perhaps a fallback) if they answered, else those
    that `request` asks for. A provider that turns to another service by itself names it in the record.
    """
    call = request.call
    if outcome == "completed" or call.chunks > 0:
        return call.provider, call.sent_model or request.model, call.model
    provider = asked_provider(request)
    is_latest = provider is call.provider and request.model == call.sent_model
    return provider, request.model, call.model if is_latest else None


def error_name(error: BaseException) -> str:
    """Return the value of `error.type`: the service's error code if it looks like a code, or else the error's class."""
    cause = root_cause(error)
    if isinstance(cause, ProviderError) and cause.code is not None and _CODE.fullmatch(cause.code):
        return cause.code
    return error_type(cause)
