"""The table of all names that traces and metrics use.

The names are those of OpenTelemetry's semantic conventions for generative AI, as released with opentelemetry-util-genai
1.3b0. The metrics also have the names of the unreleased edition (open-telemetry/semantic-conventions-genai, October
2026), which renames the metrics and splits tokens by kind. The constants are defined here because the `gen_ai.*`
constants of opentelemetry-semantic-conventions are deprecated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

CHAT: Final = "chat"
"""The operation of every call."""
EXECUTE_TOOL: Final = "execute_tool"
"""The operation of every run of a tool's function."""

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
OUTPUT_TYPE: Final = "gen_ai.output.type"

REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
REQUEST_STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
REQUEST_REASONING_LEVEL: Final = "gen_ai.request.reasoning.level"
REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"

RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
"""Seconds."""

USAGE_INPUT: Final = "gen_ai.usage.input_tokens"
"""Includes cached tokens."""
USAGE_OUTPUT: Final = "gen_ai.usage.output_tokens"
"""Includes reasoning tokens."""
USAGE_CACHE_READ: Final = "gen_ai.usage.cache_read.input_tokens"
USAGE_CACHE_WRITE: Final = "gen_ai.usage.cache_write.input_tokens"
USAGE_REASONING: Final = "gen_ai.usage.reasoning.output_tokens"

INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
SYSTEM_INSTRUCTIONS: Final = "gen_ai.system_instructions"
TOOL_DEFINITIONS: Final = "gen_ai.tool.definitions"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_DESCRIPTION: Final = "gen_ai.tool.description"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
TOOL_CALL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_CALL_RESULT: Final = "gen_ai.tool.call.result"
DETAILS_EVENT: Final = "gen_ai.client.inference.operation.details"

EXCEPTION_EVENT: Final = "exception"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"

# Names of fluxibly

ATTEMPT_SPAN: Final = "fluxibly.attempt"
ATTEMPT_INDEX: Final = "fluxibly.attempt.index"
"""From 0."""
ATTEMPT_PROVIDER: Final = "fluxibly.attempt.provider"
ATTEMPT_MODEL: Final = "fluxibly.attempt.model"
"""The attempt attributes do not start with `gen_ai.`, because Phoenix takes an attempt with `gen_ai.provider.name` or
`gen_ai.request.model` for a separate call."""
ATTEMPT_RESPONSE_MODEL: Final = "fluxibly.attempt.response_model"
ATTEMPT_INPUT: Final = "fluxibly.attempt.input_tokens"
ATTEMPT_OUTPUT: Final = "fluxibly.attempt.output_tokens"
"""The tokens of an attempt at another provider or model than those that the call's span names. The tokens of all other
attempts are on the call's span."""
ATTEMPTS: Final = "fluxibly.attempts"
"""The number of requests that were sent, without those of an `ask`."""
TOTAL_INPUT: Final = "fluxibly.usage.total_input"
TOTAL_OUTPUT: Final = "fluxibly.usage.total_output"
"""The tokens of all attempts of a call and of its `ask`s, if they are more than the call's span itself has."""
OUTCOME: Final = "fluxibly.outcome"
REQUESTED_MODEL: Final = "fluxibly.requested_model"
"""The requested model, if another model answered."""
DECISION_EVENT: Final = "fluxibly.decision"
"""An event of a call's span: a middleware has decided where the call goes, or when."""
DECISION_BY: Final = "fluxibly.decision.middleware"
DECISION: Final = "fluxibly.decision.what"
CACHE_HIT: Final = "fluxibly.cache.hit"
BATCH_SPAN: Final = "fluxibly.batch"
BATCH_ASKED: Final = "fluxibly.batch.asked"
"""The rows that the batch has asked, without those of earlier runs."""
BATCH_ANSWERED: Final = "fluxibly.batch.answered"
BATCH_FAILED: Final = "fluxibly.batch.failed"
BATCH_STOPPED: Final = "fluxibly.batch.stopped"
"""Why the batch has ended before its last row."""
COST: Final = "fluxibly.cost"
"""US dollars, of all attempts of the call; on the span of a call, and a histogram."""
STREAM_CHUNKS: Final = "fluxibly.stream.chunks"
STREAM_CHARACTERS: Final = "fluxibly.stream.characters"
STREAM_GAP_P50: Final = "fluxibly.stream.gap_p50"
STREAM_GAP_P95: Final = "fluxibly.stream.gap_p95"
STREAM_GAP_MAX: Final = "fluxibly.stream.gap_max"
STREAM_LONGEST_STALL: Final = "fluxibly.stream.longest_stall"
STREAM_ARRIVALS: Final = "fluxibly.stream.arrivals"
"""JSON: up to 200 chunks as [arrival, wait, characters]. The arrival is in microseconds since the span began. The wait
is the microseconds spent waiting for the stream, without the consumer's own time. The characters include this chunk and
all chunks before it."""

# Metrics

METER: Final = "fluxibly"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105  # not a security token
TOKEN_MODALITY: Final = "gen_ai.token.modality"  # noqa: S105  # not a security token


class MetricNames(NamedTuple):
    """The names of a call's metrics in one edition of the conventions."""

    duration: str
    input_tokens: str
    output_tokens: str
    time_to_first_chunk: str
    time_per_output_chunk: str
    usage: Mapping[str, str]
    """The names of the token counters, by the field of `Usage` that they count."""
    waiting: str
    """The instrument that records waiting measurements. It has no values and is never exported (see `_metrics.py`)."""


RELEASED: Final = MetricNames(
    duration="gen_ai.client.operation.duration",
    input_tokens="gen_ai.client.token.usage",
    output_tokens="gen_ai.client.token.usage",
    time_to_first_chunk="gen_ai.client.operation.time_to_first_chunk",
    time_per_output_chunk="gen_ai.client.operation.time_per_output_chunk",
    usage={},
    waiting="fluxibly.waiting",
)
LATEST: Final = MetricNames(
    duration="gen_ai.client.inference.duration",
    input_tokens="gen_ai.client.inference.operation.input_tokens",
    output_tokens="gen_ai.client.inference.operation.output_tokens",
    time_to_first_chunk="gen_ai.client.inference.time_to_first_chunk",
    time_per_output_chunk="gen_ai.client.inference.time_per_output_chunk",
    usage={
        "input_tokens": "gen_ai.client.inference.usage.input_tokens",
        "output_tokens": "gen_ai.client.inference.usage.output_tokens",
        "cached_tokens": "gen_ai.client.inference.usage.cache_read.input_tokens",
        "cache_write_tokens": "gen_ai.client.inference.usage.cache_write.input_tokens",
        "reasoning_tokens": "gen_ai.client.inference.usage.reasoning.output_tokens",
    },
    waiting="fluxibly.waiting.latest",
)

DURATION_BOUNDARIES: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""Seconds."""
COST_BOUNDARIES: Final = tuple(10.0**n for n in range(-6, 3))
"""US dollars."""
TOKEN_BOUNDARIES: Final = tuple(float(4**n) for n in range(14))
"""1 to 67,108,864 tokens."""
