"""Trace files read back: as trees, as a waterfall in the terminal, and as a page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from importlib.resources import files

import pytest
from rich.console import Console
from support.trace_page import Page
from support.tracing_tools import CHAT, TOOL, Remote

from fluxibly.cli.trace import file as trace_file, html as trace_html, terminal as trace_view
from fluxibly.cli.trace.conversation import readable
from fluxibly.cli.trace.plot import plot, ticks
from fluxibly.errors import Overloaded, ProviderError
from fluxibly.flow import ask, sleep
from fluxibly.middleware import Retry, StreamMeter, Tools, Tracing
from fluxibly.pipeline import Pipeline
from fluxibly.telemetry._file_exporter import OTLPFileSpanExporter
from fluxibly.testing import Delay, VirtualClock
from fluxibly.types import Image, Message, Request, Response, ToolCall, Usage


@pytest.fixture
def path(tmp_path):
    """Write a file of five calls: a tool call, a retried call, a stream with a stall, an abandoned stream, a failure."""
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
    console = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
    console.print(trace_view.render(path))
    console.file.close()
    return console.export_text()


def test_the_terminal_shows_each_span_with_a_bar(path):
    """The terminal shows names, outcomes, times, tokens and errors, in the order of the calls."""
    text = terminal(path)
    assert text.count("chat m-1") == 5
    assert text.count("attempt 1") == 1
    assert text.count("attempt 2") == 1
    assert text.count("━") > 50
    assert text.count("overloaded_error: full & <busy>") == 1
    assert "1,200 → 34 tokens" in text
    assert "longest wait 5.00 s" in text
    assert text.index("abandoned") < text.index("not_found: no such thing")
    assert text.count("not_found: no such thing") == 1
    bars = [re.search("[━─╌]", line) for line in text.splitlines() if line.startswith("chat m-1")]
    assert len({bar.start() for bar in bars}) == 1


@pytest.mark.parametrize("width", [40, 80, 250])
def test_the_waterfall_fits_any_width(path, width):
    """No line is wider than the terminal."""
    assert all(len(line) <= width for line in terminal(path, width).splitlines())


def test_the_page_is_whole_and_fetches_nothing(path):
    """The page is well formed, and its one script is its own; images of the conversation are inline."""
    html = trace_html.render(path)
    page = Page(html)
    assert page.open == []
    assert page.all("script") == [{}]
    assert page.script == files("fluxibly.cli.trace").joinpath("page.js").read_text()
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    )
    assert page.fetched == ["data:image/png;base64,YWI="]
    assert "http://" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_the_page_shows_messages_errors_and_arrivals(path):
    """Texts are escaped, the stall is marked, and an answer that was cut off says so."""
    html = trace_html.render(path)
    page = Page(html)
    for text in (
        "Be terse.",
        "What is the meaning of life?",
        'look({"word": "<life>"})',
        "It is <42> & more",
        "overloaded_error: full & <busy>",
        "stall 5.00 s",
        "assistant · cut off",
        "Tools offered: look",
        "1,200 → 34 tokens",
        "tool · look",
    ):
        assert text in page.text
    assert "<42>" not in html
    assert page.tags.count("figure") == 2
    assert page.text.count("overloaded_error: full & <busy>") == 1
    assert html.count('<div class="why">not_found: no such thing</div>') == 1
    assert "1abandoned" in page.text
    assert "5calls" in page.text
    assert "2,400tokens in" in page.text


def test_the_runs_of_tools_are_shown_and_are_no_calls(tmp_path):
    """They stand among the attempts of their call, and are not counted among the calls."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    def look(word: str) -> str:
        raise LookupError

    path = tmp_path / "trace.jsonl"
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPFileSpanExporter(path)))
    answer = Response("", tool_calls=[ToolCall("c1", "look", {"word": "life"})], finish_reason="tool_call")
    stack = [Tracing(tracer_provider=provider), Tools(look)]
    Pipeline(Remote(answer, "It is 42."), stack).complete(Request(model="m-1", messages=CHAT))
    provider.shutdown()
    text = terminal(path)
    assert text.index("attempt 1") < text.index("execute_tool look") < text.index("attempt 2")
    assert "LookupError" in text
    page = Page(trace_html.render(path))
    assert "execute_tool look" in page.text
    assert "1call" in page.text
    assert "0failed" in page.text


def test_tokens_of_other_attempts_and_of_asks_are_shown(tmp_path):
    """An attempt at another model and an ask have their own tokens, and the call also says the sum of all."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    def guard(request, call_next):
        yield from ask(request.evolve(model="judge"))
        yield from call_next(request)
        return (yield from call_next(request.evolve(model="m-2")))

    path = tmp_path / "trace.jsonl"
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPFileSpanExporter(path)))
    usages = [Usage(input_tokens=1000 * n, output_tokens=n) for n in (1, 2, 3)]
    answers = [Response("a", usage=usage) for usage in usages]
    Pipeline(Remote(*answers), [Tracing(tracer_provider=provider), guard]).complete(Request(model="m-1", messages="Hi"))
    provider.shutdown()
    text = terminal(path)
    assert [line.split()[1:4] for line in text.splitlines() if line[:1] in "├└" and line] == [
        ["chat", "judge", "completed"],
        ["attempt", "1", "m-1"],
        ["attempt", "2", "m-2"],
    ]
    assert "2 attempts · 3,000 → 3 tokens · 6,000 → 6 tokens in all" in text
    assert text.count("  at openai") == 2, "an attempt says whom it asked"
    for tokens in ("1,000 → 1 tokens", "2,000 → 2 tokens"):
        assert text.count(tokens) == 1
    page = Page(trace_html.render(path))
    assert "6,000tokens in" in page.text
    assert "6tokens out" in page.text


def test_decisions_are_shown(tmp_path):
    """The decisions of middleware stand under the call, in order, and not under its attempts."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    def router(request, call_next):
        with pytest.raises(Overloaded):
            yield from call_next(request)
        request.call.decide("Router", "asks <m-2> after Overloaded")
        response = yield from call_next(request.evolve(model="m-2"))
        request.call.decide("Router", "is content")
        return response

    path = tmp_path / "trace.jsonl"
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPFileSpanExporter(path)))
    stack = [Tracing(tracer_provider=provider), router]
    Pipeline(Remote(Overloaded("full"), "Paris."), stack).complete(Request(model="m-1", messages="Hi"))
    provider.shutdown()
    lines = [line.strip("│ ") for line in terminal(path).splitlines()]
    place = lines.index("Router asks <m-2> after Overloaded")
    assert lines[place - 1].startswith("chat m-2")
    assert lines[place + 1] == "Router is content"
    page = trace_html.render(path)
    assert page.count('<div class="decision">Router asks &lt;m-2&gt; after Overloaded</div>') == 1
    call, *attempts = trace_file.read(path).roots[0].walk()
    assert call[1].decisions == ["Router asks <m-2> after Overloaded", "Router is content"]
    assert [span.decisions for _, span in attempts] == [[], []]


POINTS = [(2.0, 2.0, 5), (2.1, 0.1, 9), (6.0, 3.9, 12), (9.0, 0.1, 20), (9.1, 0.1, 24)]


def labels(drawn):
    """Return the texts above a plot."""
    return re.findall(r'<span class="(?:first|stall|reader|pause)(?: wide)?"[^>]*>([^<]*)', drawn)


def test_a_plot_marks_the_first_chunk_stalls_and_the_reader():
    """The plot marks long waits, and leaves short waits unmarked."""
    drawn = plot(POINTS, 9.1)
    assert sorted(labels(drawn)) == ["first chunk after 2.00 s", "reader 2.90 s", "stall 3.90 s"]
    assert drawn.count("<rect") == 3


def test_a_plot_of_a_stalled_stream_marks_the_final_wait():
    """The time from the last chunk to the end is marked for a stalled stream only."""
    assert "stall 20.0 s" not in str(labels(plot(POINTS, 29.1)))
    assert "stall 20.00 s" in labels(plot(POINTS, 29.1, stalled=True))


def test_a_plot_without_all_chunks_does_not_blame_the_reader_for_a_pause():
    """A gap is a "pause" if chunks were left out: the missing chunk may have arrived in it."""
    assert sorted(labels(plot(POINTS, 9.1, thinned=True))) == [
        "first chunk after 2.00 s",
        "pause 2.90 s",
        "stall 3.90 s",
    ]


def test_labels_of_a_plot_do_not_overlap():
    """The longest waits have labels, and all waits have marks with tooltips."""
    points = [(second + 0.9, 0.9, second) for second in range(19)]
    points += [(19.6 + step / 100, 0.001, 20) for step in range(30)]
    drawn = plot(points, 20)
    assert 3 <= len(labels(drawn)) <= 5
    assert drawn.count("<title>") == drawn.count("<rect") > 10


@pytest.mark.parametrize("whole", [3e-6, 1e-3, 0.0999, 0.6849, 0.999, 1.0, 1.83, 4.2, 59.9, 100, 3700])
def test_a_time_axis_has_a_few_round_times_in_the_same_unit(whole):
    """The times are evenly spaced, their labels are distinct, and none lies past the end."""
    found = ticks(whole)
    assert 3 <= len(found) <= 6
    assert found[0] == (0, "0")
    assert found[-1][0] <= whole * (1 + 1e-9)
    assert len({text.split(" ")[1] for _, text in found[1:]}) == 1
    assert len({text for _, text in found}) == len(found)
    assert all(float(text.split(" ")[0].replace(",", "")) for _, text in found[1:])


def test_a_single_chunk_can_be_plotted():
    """A chunk can be plotted even if it arrived at once and has no text."""
    assert "<svg" in plot([(0.0, 0.0, 0)], 0.0)


def spoken(tmp_path, asked, answers):
    """Return the page of a call with these messages."""
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.input.messages": json.dumps(asked),
        "gen_ai.output.messages": json.dumps(answers),
    }
    span = {
        "traceId": "ab" * 16,
        "spanId": "cd" * 8,
        "name": "chat m",
        "startTimeUnixNano": "1000",
        "endTimeUnixNano": "3000",
        "attributes": [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()],
    }
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}))
    html = trace_html.render(path)
    page = Page(html)
    assert page.open == []
    return html, page.text


def test_long_tool_calls_have_a_line_for_each_member(tmp_path):
    """Short tool calls stay on one line, and so do texts that are not JSON."""
    given = {"from": "OSL", "filters": {"stops": 0, "carriers": ["one", "two"]}, "query": "words " * 12}
    parts = [
        {"type": "tool_call", "id": "a", "name": "far", "arguments": given},
        {"type": "tool_call", "id": "b", "name": "near", "arguments": json.dumps({"city": "Oslo"})},
    ]
    answer = {"role": "tool", "parts": [{"type": "tool_call_response", "id": "a", "response": "[1] is " + "x" * 90}]}
    _, text = spoken(tmp_path, [{"role": "assistant", "parts": parts}, answer], [])
    assert 'far({\n  "from": "OSL",\n  "filters": {"stops": 0, "carriers": ["one", "two"]},\n' in text
    assert 'near({"city": "Oslo"})' in text
    assert "[1] is " + "x" * 90 in text


def test_several_choices_are_numbered_and_texts_have_their_own_direction(tmp_path):
    """A choice says in words why it ended, or that it has no text."""
    said = {"role": "assistant", "parts": [{"type": "text", "content": "שלום"}], "finish_reason": "length"}
    html, text = spoken(tmp_path, [], [said, {"role": "assistant", "parts": [], "finish_reason": "stop"}])
    assert "assistant · choice 1 of 2 · cut at the length limit" in text
    assert "assistant · choice 2 of 2no text" in text
    assert '<p class="text" dir="auto">שלום</p>' in html


def test_attributes_are_listed_by_span_and_numbers_are_short(tmp_path):
    """A span without attributes has no table; content is shown only among the messages."""
    html, text = spoken(tmp_path, [{"role": "user", "parts": [{"type": "text", "content": "Hi there"}]}], [])
    assert html.count('<p class="text" dir="auto">Hi there</p>') == 1
    assert "Hi there" not in text[text.index("Attributes") :]
    assert "<th>gen_ai.operation.name</th><td>chat</td>" in html
    path = tmp_path / "said.jsonl"
    trace = json.loads(path.read_text())
    (span,) = trace["resourceSpans"][0]["scopeSpans"][0]["spans"]
    span["attributes"] = [{"key": "gap", "value": {"doubleValue": 0.012593004832933087}}]
    path.write_text(json.dumps(trace))
    assert "<th>gap</th><td>0.012593</td>" in trace_html.render(path)
    span["attributes"] = []
    path.write_text(json.dumps(trace))
    assert "Attributes" not in trace_html.render(path)


def luminance(colour):
    """Return the relative luminance of #rrggbb, as defined by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_of_the_page_have_enough_contrast(scheme):
    """The contrast of text and background is at least 4.5 to 1, as WCAG 2.1 requires (1.4.3)."""
    style = files("fluxibly.cli.trace").joinpath("page.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w{6})", re.findall(r":root {(.*?)}", style, re.DOTALL)[scheme]))
    behind = ("paper", "card", "user", "assistant", "system", "tool", "wash")
    pairs = [(text, back) for text in ("ink", "soft") for back in behind] + [("failed", "card"), ("cancelled", "card")]
    outcomes = ("completed", "failed", "abandoned", "cancelled", "stalled")
    pairs += [(text, back) for text in ("accent", *outcomes) for back in ("card", "wash")] + [("accent", "paper")]
    assert {pair for pair in pairs if contrast(*(colours[name] for name in pair)) < 4.5} == set()
    on_badge = ("#ffffff", "#0f131a")[scheme]
    assert {name for name in outcomes if contrast(colours[name], on_badge) < 4.5} == set()


def test_spans_of_other_programs_are_shown(tmp_path):
    """In another collector's file, spans with unknown parents are roots, and values of every type are read."""
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
    (root,) = trace_file.read(path).roots
    assert root.attributes == {"list": [1, True], "map": {"a": 1.5}, "none": None}
    assert root.outcome == "failed"
    assert "GET" in terminal(path)
    assert "GET" in trace_html.render(path)


def test_a_last_line_that_is_cut_short_is_left_out(path):
    """A program that was killed may leave an incomplete last line, which is ignored."""
    whole = len(trace_file.read(path).roots)
    with path.open("a") as file:
        file.write('{"resourceSpans": [{"sco')
    assert len(trace_file.read(path).roots) == whole


@pytest.mark.parametrize(
    "text", ["hello\n", "[1]\n", '{"a": 1}\n', '{"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]}\n']
)
def test_a_file_that_is_not_a_trace_is_refused(tmp_path, text):
    """The error names the file and the line."""
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: this is not OTLP JSON"):
        trace_file.read(path)


def test_a_file_without_spans_says_how_to_get_some(tmp_path):
    """The error for an empty file says that it has no spans."""
    path = tmp_path / "x.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="has no spans in it"):
        trace_file.read(path)


def test_json_that_is_nested_too_deeply_is_shown_as_it_is():
    """Deeply nested JSON, as text or as data, does not fail the page."""
    deep = []
    for _ in range(600):
        deep = [deep]
    for value in ("[" * 100_000 + "]" * 100_000, deep, json.dumps(deep)):
        assert "".join(readable(value)[:100].split()).startswith(
            "[[[["
        )  # newer Pythons can lay out the shorter of them
    assert readable({"a": ["b" * 60, "c" * 30]}).startswith('{\n  "a": [\n')


def test_arrivals_count_from_the_beginning_of_the_span(tmp_path):
    """What a layer outside of Tracing did before is in no span, so it is not before the first chunk either."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    def slow(request, call_next):
        yield from sleep(5)
        return (yield from call_next(request))

    path = tmp_path / "trace.jsonl"
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPFileSpanExporter(path)))
    clock = VirtualClock()
    pipeline = Pipeline(
        Remote([Delay(1), "a ", Delay(2), "b"], clock=clock), [slow, Tracing(tracer_provider=provider)], clock=clock
    )
    with pipeline.stream(Request(model="m-1", messages="Hi")) as stream:
        assert [chunk.text for chunk in stream if chunk.text] == ["a ", "b"]
    provider.shutdown()
    (root,) = trace_file.read(path).roots
    assert [point[0] for point in root.arrivals[:2]] == [1, 3]
    assert root.first_chunk == 1
