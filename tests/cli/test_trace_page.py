"""The page of `fluxibly trace --html`: its table, its folds, and its script."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console
from support.trace_files import answered, failing, said, span, write
from support.trace_page import Page

from fluxibly.cli.trace import file as trace_file, html, terminal
from fluxibly.telemetry import semconv

EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;<!--"
DASH = "\N{EN DASH}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.jsonl"


def rows(page):
    """Return the texts of the table's cells, row by row."""
    body = re.search(r'<table id="calls">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    ]


def test_the_table_has_a_row_for_each_call(path):
    """A row has the time, name, outcome, tokens, cost and duration of a call; what is not known is a dash."""
    known = {"gen_ai__usage__input_tokens": 1200, "gen_ai__usage__output_tokens": 34, "fluxibly__cost": 0.00027}
    write(path, span("chat a", **known), failing(span("chat b", 1500, 2000, gen_ai__usage__output_tokens=0), "full"))
    page = html.render(path)
    assert rows(page) == [
        ["01:46:40.000", "chat a", "completed", "1,200 → 34", "$0.00027", "100.0 ms"],
        ["01:46:41.500", "chat bfull", "failed", f"{DASH} → 0", DASH, "2.00 s"],
    ]
    parsed = Page(page)
    assert parsed.links == ["#call-1", "#call-2", "#capture", "#capture"]
    assert len(parsed.all("article")) == 2
    assert "$0.00027cost of 1 of 2 calls" in parsed.text


def test_unknown_totals_are_dashes(path):
    """Where no call says its tokens or its cost, the totals are no zeros."""
    write(path, span())
    text = Page(html.render(path)).text
    assert f"{DASH}tokens in{DASH}tokens out{DASH}cost" in text


def test_calls_within_a_call_have_rows_and_count_once(path):
    """An `ask` has a row and an anchor of its own; its time and cost are within those of its call."""
    write(path, span("chat a", fluxibly__cost=0.5), span("chat judge", 10, 50, "0", fluxibly__cost=0.2))
    page = html.render(path)
    assert [row[1] for row in rows(page)] == ["chat a", "↳ chat judge"]
    parsed = Page(page)
    assert "$0.50cost" in parsed.text
    assert "100.0 msin calls" in parsed.text
    assert parsed.all("section", id="call-2")


def test_a_file_without_calls_is_shown_and_says_so(path):
    """A trace without calls has a row for its first span."""
    write(path, span("GET", gen_ai__operation__name=None), span("dns", 1, 10, "0", gen_ai__operation__name=None))
    page = html.render(path)
    assert [row[1] for row in rows(page)] == ["GET"]
    assert "No span of this file is the call of a model." in page
    assert "0calls" in Page(page).text


def test_headers_are_buttons_and_controls_have_labels(path):
    """A screen reader is told what sorts the table and how it is sorted, and what each control is for."""
    write(path, span())
    page = html.render(path)
    parsed = Page(page)
    heads = parsed.all("th", scope="col")
    assert [head["aria-sort"] for head in heads] == ["ascending", *["none"] * 5]
    assert len(re.findall(r'<th scope="col"[^>]*><button type="button">', page)) == 6
    assert re.findall(r"<label>(\w+) <(\w+)", page) == [("Search", "input"), ("Outcome", "select")]
    assert parsed.all("output", **{"aria-live": "polite"})
    assert parsed.all("div", role="region", tabindex="0", **{"aria-label": "Calls"})


def test_cards_beyond_twenty_are_folded(path):
    """The first cards are unfolded; the others show their call's name, and what was asked."""
    write(path, *[span(f"chat {n}", n * 200, gen_ai__input__messages=said(f"question {n}")) for n in range(30)])
    page = Page(html.render(path))
    cards = page.all("details", **{"class": "card"})
    assert ["open" in card for card in cards] == [True] * 20 + [False] * 10


def test_the_history_of_a_conversation_is_folded(path):
    """A call shows the messages that are new; those of earlier calls are in a fold, by their numbers."""
    texts = ["one?", "ONE", "two?", "TWO", "three?", "THREE"]
    system = json.dumps([{"type": "text", "content": "Be terse."}])
    for turn in range(3):
        asked = {"gen_ai__input__messages": said(*texts[: turn * 2 + 1]), "gen_ai__system_instructions": system}
        write(path, span(at=turn * 200, gen_ai__output__messages=answered(texts[turn * 2 + 1]), **asked))
    page = html.render(path)
    for text in [*texts, "Be terse."]:
        assert page.count(f'dir="auto">{text}</p>') == 1
    folds = Page(page).all("details", **{"class": "earlier"})
    assert [fold["data-messages"] for fold in folds] == ["0-2", "0-4"]
    assert re.findall(r"<summary>(\d earlier messages?)", page) == ["3 earlier messages", "5 earlier messages"]


def test_the_same_question_again_is_shown(path):
    """Only what comes before the last question is history, and another conversation's messages are not."""
    write(path, *[span(at=at, gen_ai__input__messages=said("Why?")) for at in (0, 200)])
    write(path, span(at=400, gen_ai__input__messages=said("Why?", "Because.", "And?")))
    write(path, span(at=600, gen_ai__input__messages=said("When?", "Because.", "And?")))
    page = html.render(path)
    assert page.count('dir="auto">Why?</p>') == 2
    assert page.count('dir="auto">And?</p>') == 2
    assert [fold["data-messages"] for fold in Page(page).all("details", **{"class": "earlier"})] == ["0-0"]


def test_the_table_says_what_was_asked(path):
    """The last question is in the table and on the folded card, also if it is in the fold of earlier messages."""
    long = "Why is the sky blue? " * 20
    write(path, span(gen_ai__input__messages=said(long), gen_ai__output__messages=answered("Let me look.")))
    turns = [*json.loads(said(long, "Let me look.")), {"role": "tool", "parts": [{"type": "text", "content": "air"}]}]
    write(path, span(at=200, gen_ai__input__messages=json.dumps(turns)))
    page = html.render(path)
    assert [row[1] for row in rows(page)] == [f"chat m{long[:90]}…"] * 2
    assert page.count(f'<span class="about">{long[:90]}…</span>') == 2
    assert page.count(long) == 1


def test_a_message_that_was_cut_does_not_stand_for_the_whole(path):
    """The messages of another instrumentation's span, which are shortened, are not the history of one's own."""
    long = "word " * 1000
    write(path, span(gen_ai__input__messages=said(long)), scope="langchain")
    write(path, span(at=200, gen_ai__input__messages=said(long, "yes", "so?")))
    page = html.render(path)
    assert page.count("(5,000 characters)") >= 1
    assert page.count(long) == 1


def test_content_that_was_not_captured_says_how_to_capture_it(path):
    """The page has one line about it, which the cards without messages link to; with all messages it has none."""
    write(path, span(gen_ai__input__messages=said("Why?")), span(at=200))
    page = html.render(path)
    assert "The messages of 1 of 2 calls were not captured." in page
    assert page.count("fluxibly chat --trace FILE --capture") == 1
    assert "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=SPAN_ONLY" in page
    assert page.count('<a href="#capture">') == 1
    path.unlink()
    write(path, span(gen_ai__input__messages=said("Why?")))
    assert "capture" not in Page(html.render(path)).text


def test_a_card_has_one_first_chunk(path):
    """The bar, the plot and the caption say the same time, though the attribute counts from when it was sent."""
    arrivals = json.dumps([[40_000, 40_000, 3], [60_000, 20_000, 5]])
    first = {"gen_ai__response__time_to_first_chunk": 0.03, "fluxibly__stream__chunks": 2}
    write(path, span(fluxibly__stream__arrivals=arrivals, **first))
    page = html.render(path)
    assert page.count("first chunk after 40.0 ms") == 4  # the bar's title, the plot's label and title, the caption
    assert "first chunk after 30" not in page
    assert 'class="first" style="left:0.00%;width:40.00%"' in page


def test_stalls_are_on_the_bar(path):
    """A stall has its place on the bar of the waterfall, and the legend explains it."""
    arrivals = json.dumps([[1000, 1000, 1], [2000, 1000, 2], [3000, 1000, 3], [53_000, 50_000, 4], [54_000, 1000, 5]])
    write(path, span(fluxibly__stream__arrivals=arrivals, fluxibly__stream__chunks=5))
    page = html.render(path)
    assert '<i class="stall" style="left:3.00%;width:50.00%"></i>' in page
    assert '<i class="stall"></i> stall' in page


@pytest.mark.parametrize("scope", ["fluxibly", "httpx"])
def test_every_value_is_escaped(path, scope):
    """No name, attribute, error, message or time of a file becomes markup, nor a part of the script or the policy."""
    parts = [
        {"type": "text", "content": EVIL},
        {"type": EVIL, "content": EVIL},
        {"type": "tool_call", "id": EVIL, "name": EVIL, "arguments": {EVIL: EVIL}},
        {"type": "tool_call_response", "id": EVIL, "response": EVIL},
        {"type": "blob", "mime_type": f"image/{EVIL}", "content": EVIL},
    ]
    messages = json.dumps([{"role": EVIL, "parts": parts, "finish_reason": EVIL}])
    values = {name.replace(".", "__"): EVIL for name in vars(semconv).values() if isinstance(name, str)}
    values |= {
        "gen_ai__input__messages": messages,
        "gen_ai__output__messages": messages,
        "gen_ai__system_instructions": json.dumps(parts),
        "gen_ai__tool__definitions": json.dumps([{"name": EVIL, "description": EVIL}]),
        EVIL: EVIL,
    }
    found = failing(span(EVIL, **values), EVIL)
    event = {"name": semconv.DECISION_EVENT, "attributes": [{"key": semconv.DECISION, "value": {"stringValue": EVIL}}]}
    write(path, {**found, "traceId": EVIL, "events": [event]}, scope=scope)
    renamed = path.rename(path.with_name("<b>'\".jsonl"))
    page = Page(html.render(renamed))
    assert page.all("script") == [{}]
    assert page.script.startswith('"use strict";')
    assert len(page.all("img")) == (3 if scope == "fluxibly" else 0)
    assert all(image["alt"] == "image" for image in page.all("img"))
    assert "alert(1)" not in page.script
    assert page.text.count("<script>alert(1)</script>") > 10


VALUES = {
    "text": "soon",
    "list": [1, "two"],
    "map": {"a": 1},
    "negative": -5,
    "huge": 10**400,
    "nan": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "json": '[[1, 2], "x", null, [NaN, Infinity, -1], {"parts": [3]}]',
    "deep": "[" * 100_000,
    "surrogate": '[{"role": "\\ud800", "parts": [{"type": "text", "content": "\\udc00"}]}]',
}


@pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))
@pytest.mark.parametrize("scope", ["fluxibly", "langchain"])
def test_values_of_wrong_types_do_not_matter(path, value, scope):
    """Whatever an attribute holds, the page and the waterfall are drawn, and the page can be written."""
    names = [name for name in vars(semconv).values() if isinstance(name, str) and "." in name]
    given = [{name.replace(".", "__"): value} for name in names]
    write(path, *[span(f"chat {at}", at * 200, **each) for at, each in enumerate(given)], scope=scope)
    write(path, span("all", -500, **{name.replace(".", "__"): value for name in names}), scope=scope)
    page = html.render(path)
    page.encode()
    assert len(rows(page)) >= len(names)
    Console(width=80, quiet=True).print(terminal.render(path, messages=True))


@pytest.mark.parametrize(
    "arrivals",
    ["[[1e300, 1, 1]]", "[[2, 1, 1], [1, 1, 2]]", "[[NaN, 1, 1]]", "[[1, 1]]", '[["1", 1, 1]]', "[[1, -1, 1]]"],
)
def test_arrivals_that_make_no_sense_are_not_drawn(path, arrivals):
    """A plot needs chunks in the order of time, with three numbers each."""
    write(path, span(fluxibly__stream__arrivals=arrivals, fluxibly__stream__chunks=1))
    assert "<figure>" not in html.render(path)


def test_what_other_instrumentations_wrote_is_shortened(path):
    """Long attributes, names and errors of their spans are cut with their size, and so are very many attributes."""
    many = {f"llm__input__{n}": "x" * 1000 for n in range(500)}
    write(path, failing(span("RunnableSequence" * 50, **many), "Traceback " * 500), scope="langchain")
    page = html.render(path)
    assert len(page) < 90_000
    assert "(800 characters)" in page
    assert "(5,000 characters)" in page
    assert "401 more attributes" in page


def test_texts_with_other_line_ends_are_whole(path):
    """A message may hold characters that end a line for Python, but not for JSON."""
    line = {"resourceSpans": [{"scopeSpans": [{"scope": {"name": "fluxibly"}, "spans": [span("a\u2028b\x85c")]}]}]}
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n")
    assert [root.name for root in trace_file.read(path).roots] == ["a\u2028b\N{REPLACEMENT CHARACTER}c"]


def test_lines_that_are_cut_short_are_counted(path):
    """The page says how many lines were left out; a file with no whole line is refused."""
    write(path, span(), span(at=200))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100] + b"\n" + whole)
    assert "1 line is cut short in the file, and left out" in html.render(path)
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="has no spans that are whole: the file is cut short"):
        trace_file.read(path)


def test_a_line_may_be_cut_within_a_character(path):
    """A crash may leave half a character at the end."""
    write(path, span())
    path.write_bytes(path.read_bytes() + '{"resourceSpans": "é'.encode()[:-1])
    assert len(trace_file.read(path).roots) == 1


def test_a_file_that_is_too_large_is_refused(path, monkeypatch):
    """The message says the limit, and how to look at a part."""
    monkeypatch.setattr(trace_file, "LIMIT", 1_000_000)
    write(path, *[span(at=at, note="x" * 10_000) for at in range(110)])
    with pytest.raises(ValueError, match=r"expected at most 1 MB of spans, got more; .* tail -n 1000"):
        html.render(path)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_script_sorts_filters_and_copies_in_a_real_browser(path, tmp_path):
    """The address sorts and filters the table, hides the other cards, and an open fold has the earlier messages."""
    asked = [said("one?"), said("one?", "ONE", "two?"), said("other?")]
    calls = [span("chat a", 0, 10), span("chat b", 200, 30), span("chat c", 400, 20), span("chat d", 600, 5)]
    for each, messages in zip(calls, asked, strict=False):
        each["attributes"].append({"key": "gen_ai.input.messages", "value": {"stringValue": messages}})
    write(path, *map(failing, calls[:3], ["no"] * 3), calls[3])
    page = html.render(path)
    assert page.count('<details class="earlier"') == 1
    out = tmp_path / "page.html"
    out.write_text(page.replace('<details class="earlier"', '<details open class="earlier"'))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    done = subprocess.run(
        [
            *(CHROMIUM, *options.split(), "--disable-component-update", "--disable-sync", "--dump-dom"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"{out.as_uri()}#sort=-duration&outcome=failed&search=ONE%3F",
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    dom = done.stdout
    assert [row[1] for row in rows(dom)] == ["chat bno", "chat cno", "chat ano", "chat d"]
    body = Page(dom.replace("<br>", ""))
    hidden = ["hidden" in row for row in body.all("tr") if "data-outcome" in row]
    assert hidden == [False, True, False, True]
    assert ["hidden" in card for card in body.all("article")] == [False, False, True, True]
    assert [head["aria-sort"] for head in body.all("th", scope="col")] == [*["none"] * 5, "descending"]
    assert "2 of 4 shown" in body.text
    assert dom.count('dir="auto">one?</p>') == 2
    assert "hidden" not in body.all("form")[0]
