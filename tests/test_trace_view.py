"""Trace files read back: as trees, as a waterfall in the terminal, and as a page."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from rich.console import Console
from tracing_tools import CHAT, TOOL, Remote

from fluxibly import trace_file, trace_html, trace_view
from fluxibly.errors import Overloaded, ProviderError
from fluxibly.middleware import Retry, StreamMeter, Tracing
from fluxibly.otlp_file import OTLPFileSpanExporter
from fluxibly.pipeline import Pipeline
from fluxibly.testing import Delay, VirtualClock
from fluxibly.trace_plot import plot
from fluxibly.types import Image, Message, Request, Response, ToolCall, Usage


@pytest.fixture
def path(tmp_path):
    """A file of five calls: a tool call, a retried one, a stream with a stall, one given up, and one that failed."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    path = tmp_path / "trace.jsonl"
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPFileSpanExporter(path)))
    clock = VirtualClock()
    usage = Usage(input_tokens=1200, output_tokens=34)
    call = ToolCall("c1", "look", {"word": "<life>"})
    answers = (
        Response("", tool_calls=[call], finish_reason="tool_call", usage=usage),
        Overloaded("full & <busy>", code="overloaded_error"),
        Response("It is <42> & more", finish_reason="stop", usage=usage),
        [Delay(1), "a ", Delay(0.1), "b ", Delay(5), "c ", Delay(0.1), "d"],
        ["one ", "two ", "three"],
        ProviderError("no such thing", code="not_found"),
    )
    stack = [Tracing(capture="span", tracer_provider=provider), StreamMeter(), Retry(max_retries=1, base_delay=0)]
    pipeline = Pipeline(Remote(*answers, clock=clock), stack, clock=clock)
    request = Request(model="m-1", messages=CHAT, tools=[TOOL])
    pipeline.complete(request)
    image = Image(data=b"ab", media_type="image/png")
    pipeline.complete(
        request.evolve(
            messages=[*CHAT, Message.assistant("", tool_calls=[call]), Message.tool("42", call), Message.user(image)]
        )
    )
    with pipeline.stream(request) as stream:
        for _ in stream:
            pass
    with pipeline.stream(request) as stream:
        next(stream)
    with pytest.raises(ProviderError):
        pipeline.complete(request)
    provider.shutdown()
    return path


def terminal(path, width=140):
    console = Console(width=width, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(trace_view.render(path))
    console.file.close()
    return console.export_text()


def test_the_terminal_shows_each_span_with_a_bar(path):
    """Names, outcomes, times, tokens and errors, in the order of the calls."""
    text = terminal(path)
    assert text.count("chat m-1") == 5
    assert text.count("attempt 1") == 5
    assert text.count("attempt 2") == 1
    assert text.count("━") > 50
    assert "overloaded_error: full & <busy>" in text
    assert "1200 → 34 tokens" in text
    assert "longest wait 5.00 s" in text
    assert text.index("abandoned") < text.index("not_found: no such thing")


@pytest.mark.parametrize("width", [40, 80, 250])
def test_any_width_will_do(path, width):
    """No line is wider than the terminal."""
    assert all(len(line) <= width for line in terminal(path, width).splitlines())


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what a page would fetch."""

    VOID = {"meta", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_fetches_nothing(path):
    """One page, well formed, without scripts or addresses; only images of the conversation, inline."""
    html = trace_html.render(path)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert page.fetched == ["data:image/png;base64,YWI="]
    assert "http://" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_the_page_shows_messages_errors_and_arrivals(path):
    """Texts are escaped; the stall is marked; what was cut off says so."""
    html = trace_html.render(path)
    page = Page()
    page.feed(html)
    for text in (
        "Be terse.",
        "What is the meaning of life?",
        'look({"word": "<life>"})',
        "It is <42> & more",
        "overloaded_error: full & <busy>",
        "stall 5.00 s",
        "assistant · cut off",
        "Tools offered: look",
        "1200 → 34 tokens",
    ):
        assert text in page.text
    assert "<42>" not in html
    assert page.tags.count("svg") == 2
    assert "5calls" in page.text
    assert "2,400tokens in" in page.text


def test_a_plot_marks_the_first_chunk_stalls_and_the_reader():
    """Short waits are not marked."""
    drawn = plot([(2.0, 2.0, 5), (2.1, 0.1, 9), (6.0, 3.9, 12), (9.0, 0.1, 20), (9.1, 0.1, 24)], 9.1)
    assert drawn.count("first chunk 2.00 s") == 1
    assert drawn.count("stall 3.90 s") == 1
    assert drawn.count("reader 2.90 s") == 1
    assert drawn.count("<rect") == 3


def test_a_plot_of_one_chunk_is_a_plot():
    """Also if it came at once and had no text."""
    assert plot([(0.0, 0.0, 0)], 0.0).startswith("<svg")


def test_spans_of_others_are_shown_too(tmp_path):
    """A file of some collector: unknown parents are roots, and values of every type are read."""
    span = {
        "traceId": "ab" * 16,
        "spanId": "cd" * 8,
        "parentSpanId": "ef" * 8,
        "name": "GET",
        "startTimeUnixNano": "1000",
        "endTimeUnixNano": 3000,
        "status": {"code": "STATUS_CODE_ERROR"},
        "attributes": [
            {"key": "list", "value": {"arrayValue": {"values": [{"intValue": "1"}, {"boolValue": True}]}}},
            {"key": "map", "value": {"kvlistValue": {"values": [{"key": "a", "value": {"doubleValue": 1.5}}]}}},
            {"key": "none", "value": {}},
        ],
    }
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}) + "\n\n")
    (root,) = trace_file.read(path)
    assert root.attributes == {"list": [1, True], "map": {"a": 1.5}, "none": None}
    assert root.outcome == "failed"
    assert "GET" in terminal(path)
    assert "GET" in trace_html.render(path)


def test_a_last_line_cut_short_is_left_out(path):
    """A program that was killed leaves one."""
    whole = len(trace_file.read(path))
    with path.open("a") as file:
        file.write('{"resourceSpans": [{"sco')
    assert len(trace_file.read(path)) == whole


@pytest.mark.parametrize(
    "text", ["hello\n", "[1]\n", '{"a": 1}\n', '{"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]}\n']
)
def test_what_is_no_trace_is_refused_by_line(tmp_path, text):
    """The error names the file and the line."""
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.jsonl, line 1: this is not OTLP JSON"):
        trace_file.read(path)


def test_a_file_without_spans_says_how_to_get_some(tmp_path):
    """Empty, it is no trace."""
    path = tmp_path / "x.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="has no spans in it"):
        trace_file.read(path)
