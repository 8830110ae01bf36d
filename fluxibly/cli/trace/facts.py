"""Facts about spans, in the words that every view uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs

from fluxibly.cli.trace.file import TracedSpan, duration
from fluxibly.telemetry import semconv

UNKNOWN = "\N{EN DASH}"
OUTCOMES = ("completed", "failed", "stalled", "cancelled", "abandoned")
LONG_NAME, LONG_TEXT = 80, 300
"""The most characters of a name, and of a message of another instrumentation, that are shown."""


@attrs.frozen(eq=False)
class Entry:
    """A call of the file, or the first span of a trace that has no calls.

    Numbers count from 1, in the order of the file's traces. `outer` is false for a call within another call.
    """

    number: int
    span: TracedSpan
    root: TracedSpan
    outer: bool


def entries(roots: Sequence[TracedSpan]) -> list[Entry]:
    """Return the calls of all traces, and the first span of each trace that has no calls."""
    found: list[Entry] = []
    for root in roots:
        calls = [*_calls(root)] or [(root, True)]
        found += [Entry(number, span, root, outer) for number, (span, outer) in enumerate(calls, len(found) + 1)]
    return found


def _calls(root: TracedSpan) -> Iterator[tuple[TracedSpan, bool]]:
    """Yield the calls of a trace, and whether they are within no other call."""
    call_at: int | None = None
    for depth, span in root.walk():
        if call_at is not None and depth <= call_at:
            call_at = None
        if is_call(span):
            yield span, call_at is None
            call_at = depth if call_at is None else call_at


def is_call(span: TracedSpan) -> bool:
    """Whether a span is the call of a model. The run of a tool is none."""
    return span.attributes.get(semconv.OPERATION) not in (None, semconv.EXECUTE_TOOL)


def label(span: TracedSpan) -> str:
    """Return the displayed name of a span; an attempt is named by its number and its requested model."""
    index = span.attributes.get(semconv.ATTEMPT_INDEX)
    if index is None:
        return shortened(span.name, LONG_NAME)
    return shortened(f"attempt {int(index) + 1} {span.attributes.get(semconv.ATTEMPT_MODEL, '')}".rstrip(), LONG_NAME)


def shortened(text: str, limit: int = LONG_TEXT) -> str:
    """Return a text on one line, or the beginning of a long one, and how long it is."""
    return one_line(cut(text, limit))


def cut(text: str, limit: int = LONG_TEXT) -> str:
    """Return a text, or the beginning of a long one, and how long it is."""
    return f"{text[:limit]}… ({len(text):,} characters)" if len(text) > limit else text


def one_line(text: str) -> str:
    return " ".join(text.split())


def error_of(span: TracedSpan) -> str:
    """Return the error of a span, or "" if there is none; a long one of another instrumentation is cut."""
    return shortened(span.error) if span.foreign else span.error


def call_facts(span: TracedSpan) -> list[str]:
    """Return the facts about a call, an attempt or a batch that every view shows: provider, cache hit, tokens, and so on."""
    given = span.attributes
    facts = [*_batch_facts(span)]
    if semconv.ATTEMPT_PROVIDER in given:
        facts.append(f"at {shortened(str(given[semconv.ATTEMPT_PROVIDER]), LONG_NAME)}")
    if given.get(semconv.CACHE_HIT) is True:
        facts.append("cache hit")
    if semconv.REQUESTED_MODEL in given:
        facts.append(f"asked for {shortened(str(given[semconv.REQUESTED_MODEL]), LONG_NAME)}")
    if given.get(semconv.ATTEMPTS, 1) > 1:
        facts.append(f"{given[semconv.ATTEMPTS]} attempts")
    for keys, which in (
        ((semconv.USAGE_INPUT, semconv.USAGE_OUTPUT), ""),
        ((semconv.ATTEMPT_INPUT, semconv.ATTEMPT_OUTPUT), ""),
        ((semconv.TOTAL_INPUT, semconv.TOTAL_OUTPUT), " in all"),
    ):
        tokens_in, tokens_out = map(given.get, keys)
        if tokens_in is not None or tokens_out is not None:
            facts.append(f"{_count(tokens_in)} → {_count(tokens_out)} tokens{which}")
    if semconv.COST in given:
        facts.append(money(given[semconv.COST]))
    return facts


def _batch_facts(span: TracedSpan) -> Iterator[str]:
    if semconv.BATCH_ASKED in span.attributes:
        asked, failed = (span.attributes.get(key) for key in (semconv.BATCH_ASKED, semconv.BATCH_FAILED))
        yield f"{_count(asked)} row{'' if asked == 1 else 's'} asked"
        if failed:
            yield f"{_count(failed)} failed"
    if semconv.BATCH_STOPPED in span.attributes:
        yield f"stopped: {shortened(str(span.attributes[semconv.BATCH_STOPPED]))}"
    if span.linked:
        yield f"{_count(len(span.linked))} linked trace{'' if len(span.linked) == 1 else 's'}"


def stream_facts(span: TracedSpan) -> list[str]:
    """Return the facts about a stream that every view shows: size, wait for the first chunk, longest wait after that."""
    given = span.attributes
    if semconv.STREAM_CHUNKS not in given:
        return []
    chunks, characters = given[semconv.STREAM_CHUNKS], given.get(semconv.STREAM_CHARACTERS)
    facts = [f"{_count(chunks)} chunk{'' if chunks == 1 else 's'}, {_count(characters)} characters"]
    if span.first_chunk is not None:
        facts.append(f"first chunk after {duration(span.first_chunk)}")
    longest = given.get(semconv.STREAM_LONGEST_STALL, 0)
    if longest > given.get(semconv.RESPONSE_TIME_TO_FIRST_CHUNK, 0) * 1.05:  # otherwise, it is the same wait
        facts.append(f"longest wait {duration(longest)}")
    return facts


def tokens(span: TracedSpan) -> tuple[float | None, float | None]:
    """Return the tokens of a call, with those of all its attempts and `ask`s, as far as they are known."""
    given = span.attributes
    return (
        given.get(semconv.TOTAL_INPUT, given.get(semconv.USAGE_INPUT)),
        given.get(semconv.TOTAL_OUTPUT, given.get(semconv.USAGE_OUTPUT)),
    )


def money(dollars: float) -> str:
    """Format US dollars; less than a cent has two digits that say something."""
    if not dollars:
        return "$0"
    digits = min(max(2, 1 - math.floor(math.log10(abs(dollars)))), 9)
    return f"${dollars:,.{digits}f}"


def _count(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"
