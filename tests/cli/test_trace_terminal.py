"""The waterfall of `fluxibly trace` in the terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from support.trace_files import answered, failing, said, span, write

from fluxibly.cli.trace import terminal

DASH = "\N{EN DASH}"


def lines(path, width=80, *, messages=False, **options):
    """Return what a pipe of this width gets."""
    file = io.StringIO()
    Console(width=width, file=file, **options).print(terminal.render(path, messages=messages))
    return file.getvalue().splitlines()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


def test_guides_lead_from_a_span_to_its_children(path):
    """Each child has a branch, the last one a corner; the lines below a span go on with the guides beside them."""
    write(
        path,
        span("agent", took=100, gen_ai__usage__input_tokens=5),
        span("first", 1, 50, "0", gen_ai__usage__input_tokens=6),
        span("second", 60, 10, "0", gen_ai__usage__input_tokens=7),
        span("inner", 2, 10, "1"),
    )
    path.write_text(path.read_text().replace(f'"traceId": "{1:032x}"', f'"traceId": "{0:032x}"'))  # of one trace
    assert [line[:9].rstrip() for line in lines(path)[1:]] == [
        "agent",
        f"│ 5 → {DASH} t",
        "├ first",
        f"│ │ 6 → {DASH}",
        "│ └ inner",
        "└ second",
        f"    7 → {DASH}",
    ]


def test_the_calls_of_a_batch_are_drawn_below_it(path):
    """A batch has one drawing, on its own scale, with the calls whose traces are linked to it; other traces have their own."""
    counts = {"gen_ai__operation__name": None, "fluxibly__batch__asked": 2, "fluxibly__batch__failed": 1}
    batch = span("fluxibly.batch", took=100, **counts, fluxibly__batch__stopped="disk full")
    links = [{"traceId": batch["traceId"], "spanId": batch["spanId"]}]
    calls = [{**span(f"chat {at}", at, 20), "links": links} for at in (10, 50)]
    lost = {**span("chat lost", 60), "links": [{"traceId": "f" * 32, "spanId": "f" * 16}]}
    write(path, *calls, span("chat other", 5), lost, batch)
    shown = lines(path)
    assert [line.split("completed")[0].rstrip() for line in shown] == [
        shown[0],
        "fluxibly.batch",
        "│ 2 rows asked · 1 failed · stopped: disk full · 2 linked traces",
        "├ chat 10",
        "└ chat 50",
        shown[5],
        "chat other",
        shown[7],
        "chat lost",
    ]
    assert [line.startswith("trace ") for line in shown].count(True) == 3
    assert shown[3].index("━") < shown[4].index("━")


def test_batches_that_link_to_each_other(path):
    """A damaged file, whose batches are linked to each other, is drawn with every span."""
    both = [span("fluxibly.batch", at, took=100, gen_ai__operation__name=None) for at in (0, 1)]
    for one, other in (both, both[::-1]):
        one["links"] = [{"traceId": other["traceId"], "spanId": other["spanId"]}]
    write(path, *both)
    assert [line for line in lines(path) if "fluxibly.batch" in line] != []
    assert "".join(lines(path)).count("fluxibly.batch") == 2


@pytest.mark.parametrize("width", [80, 200])
def test_lines_fit_and_are_plain_in_a_pipe(path, width):
    """No line is wider than the pipe, none has colours, and none ends in blanks; bars begin in the same column."""
    write(path, span("chat a"), failing(span("chat a-much-longer-name", 200), "no " * 100))
    shown = lines(path, width)
    assert max(map(len, shown)) == width
    assert "\x1b" not in "".join(shown)
    assert [line for line in shown if line != line.rstrip()] == []
    assert len({line.index("━") for line in shown if line.startswith("chat")}) == 1


def test_the_bar_shows_the_first_chunk_and_stalls(path):
    """The wait for the first chunk is thin, and a stall is dashed; both are where they were, and explained once."""
    arrivals = [[25_000, 25_000, 1], [26_000, 1000, 2], [27_000, 1000, 3], [75_000, 48_000, 4], [76_000, 1000, 5]]
    write(path, span("s", fluxibly__stream__arrivals=json.dumps(arrivals), fluxibly__stream__chunks=5), span("w", 200))
    _, streamed, facts, _, whole, legend = lines(path, 80)
    bar = "".join(each for each in streamed if each in "─━╌")
    assert (bar.index("━") / len(bar), bar.index("╌") / len(bar)) == pytest.approx((0.25, 0.27), abs=0.02)
    assert (bar.rindex("╌") + 1) / len(bar) == pytest.approx(0.75, abs=0.02)
    assert bar.endswith("━")
    assert "first chunk after 25.0 ms" in facts
    assert "─" not in whole
    assert legend == "─── until the first chunk   ╌╌╌ stall"


def test_the_first_chunk_is_marked_also_without_arrivals(path):
    """Where only the time to the first chunk is recorded, it is on the bar and among the facts."""
    write(path, span(gen_ai__response__time_to_first_chunk=0.05, fluxibly__stream__chunks=2))
    _, line, facts, _ = lines(path)
    bar = "".join(each for each in line if each in "─━")
    assert bar.count("─") / len(bar) == pytest.approx(0.5, abs=0.02)
    assert "first chunk after 50.0 ms" in facts


def test_messages_are_shown_if_they_are_asked_for(path):
    """--messages shows what was said under each call, and what earlier calls have said only as a number."""
    first = {"gen_ai__input__messages": said("one?"), "gen_ai__output__messages": answered("ONE")}
    second = {"gen_ai__input__messages": said("one?", "ONE", "two?"), "gen_ai__output__messages": answered("TWO")}
    write(path, span(**first), span(at=200, **second))
    assert "one?" not in "".join(lines(path))
    shown = [" ".join(line.split()) for line in lines(path, messages=True)]
    assert [line for line in shown if line.split()[0] not in ("trace", "chat")] == [
        "user one?",
        "assistant ONE",
        "2 earlier messages, shown above",
        "user two?",
        "assistant TWO",
    ]


def test_messages_that_were_not_captured_say_how_to(path):
    """Without content in the file, the last lines say how to capture it."""
    write(path, span())
    shown = lines(path, messages=True)
    assert any("fluxibly chat --trace FILE --capture" in line for line in shown)
    assert any('Tracing(capture="span")' in line for line in shown)
    assert not any("--capture" in line for line in lines(path))


def test_the_messages_of_a_tool_are_its_arguments_and_its_result(path):
    """The run of a tool's function shows what it got and what it gave back."""
    given = {"gen_ai__tool__call__arguments": '{"word": "life"}', "gen_ai__tool__call__result": "42"}
    write(path, span("execute_tool look", gen_ai__operation__name="execute_tool", gen_ai__tool__name="look", **given))
    text = "\n".join(lines(path, messages=True))
    assert 'look({"word": "life"})' in text
    assert "tool      42" in text


def test_control_characters_never_reach_the_terminal(path):
    """Escapes in names, errors and messages, also those that JSON hides, are replaced."""
    evil = "\x1b[31mred\x07\x9b2J\rgone"
    write(
        path,
        failing(span(f"chat {evil}", gen_ai__input__messages=said(evil), gen_ai__provider__name=evil), evil),
        span(evil, 200, fluxibly__outcome=evil),
    )
    text = "\n".join(lines(path, messages=True))
    assert "red" in text
    assert [each for each in text if (ord(each) < 32 and each != "\n") or 127 <= ord(each) < 160] == []


def test_what_other_instrumentations_wrote_is_shortened(path):
    """Long names, errors and messages of their spans are cut, and say how long they are; one's own are whole."""
    long = "word " * 1000
    write(path, failing(span(f"POST {long}", gen_ai__input__messages=said(long)), long), scope="langchain")
    text = " ".join(" ".join(lines(path, messages=True)).split())
    assert text.count("(5,000 characters)") == 2
    assert len(text) < 1500
    assert all(len(line) <= 80 for line in lines(path, messages=True))
    path.unlink()
    write(path, span(gen_ai__input__messages=said(long)))
    assert " ".join(lines(path, messages=True)).count("word") == 1000


def test_a_deep_trace_leaves_room_for_the_names(path):
    """Guides stop to grow at some depth, and a thousand spans within each other are no problem."""
    spans = [
        {**span(f"deep {n}", took=1000 - n, key=f"{n + 1:016x}"), "parentSpanId": f"{n:016x}"} for n in range(1000)
    ]
    write(path, *spans)
    shown = lines(path)
    assert len(shown) == 1001
    assert all(f"deep {n}" in line for n, line in enumerate(shown[1:]))


def test_a_pipe_without_box_drawing_gets_plain_characters(path):
    """Where the encoding has no box-drawing characters, ASCII stands in for them."""
    write(path, span("agent"), span("inner", 1, 50, "0"))
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(width=80, file=file, force_terminal=False).print(terminal.render(path))
    file.flush()
    text = file.buffer.getvalue().decode()
    assert "`- inner" in text
    assert "=====" in text
