"""Where `Guard` checks an answer, however it is cut into chunks: the same checks as of the whole, and nothing before them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import call
from support.strategies import Script, good_scripts

from fluxibly.errors import GuardRefused, root_cause
from fluxibly.middleware import Guard
from fluxibly.middleware._borders import Lengths, Sentences
from fluxibly.testing.modes import Mode
from fluxibly.types import Chunk, Image, Opaque, Reasoning, Request, Response, Text, ToolCallDelta, Usage

REQUEST = Request(model="m", messages="go on")
WHOLE, STREAM = Mode(streaming=False), Mode(streaming=True)
ALONE = "\u3002\uff01\uff1f"
STOPS = ".!?\u2026" + ALONE
CLOSING = "\"')]*\u201d\u300d"

texts = st.text(alphabet='ab .!?\n")\u3002\u300d\r', max_size=30)
releases = st.sampled_from(["all", "sentence", 1, 2, 3, 7, 1000])


def sentences(text):
    """Return where sentences end, looking at one place after the other."""
    borders = [0]
    for at in range(1, len(text)):
        before = text[borders[-1] : at]
        run = len(before) - len(before.rstrip(STOPS + CLOSING))
        # A run of stops and what they close begins with a stop.
        ended = before[len(before) - run :].lstrip(CLOSING)
        alone = any(sign in ALONE for sign in ended)
        of_sentence = ended and text[at] not in STOPS + CLOSING and (alone or text[at].isspace())
        of_line = before.endswith("\n") and before.split("\n")[-2].strip()
        if of_sentence or of_line:
            borders.append(at)
    return borders[1:]


def expected(text, release):
    """Return the texts at which an answer is checked."""
    borders = (
        [] if release == "all" else sentences(text) if release == "sentence" else range(release, len(text), release)
    )
    return [*[text[:at] for at in borders], text]


@st.composite
def cut(draw, text):
    """Draw the pieces of a text."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


cut_texts = texts.flatmap(lambda text: st.tuples(st.just(text), cut(text), cut(text)))
part_texts = texts.filter(bool)
parts = st.lists(
    st.one_of(
        part_texts.map(Text),
        part_texts.map(Text),
        part_texts.map(lambda text: Reasoning(text=text)),
        st.just(Image(data=b"png", media_type="image/png")),
        st.just(Opaque("anthropic", {"type": "server_tool_use"})),
    ),
    max_size=6,
)
calls = st.lists(st.sampled_from(["{}", '{"at": "here"}']), max_size=2)


@st.composite
def chunked(draw, given_parts, arguments, *, others=True):
    """Draw a stream of these parts and tool calls."""
    chunks = []
    for part in given_parts:
        if isinstance(part, Text):
            chunks += [Chunk(piece) for piece in draw(cut(part.text))]
        elif isinstance(part, Reasoning):
            chunks += [Chunk(reasoning=piece) for piece in draw(cut(part.text))]
        else:
            chunks.append(Chunk(parts=(part,)))
    for number, text in enumerate(arguments):
        chunks.append(Chunk(tool_calls=(ToolCallDelta(index=number, id=f"c{number}", name="look"),)))
        chunks += [
            Chunk(tool_calls=(ToolCallDelta(index=number, arguments=piece),)) for piece in draw(cut(text)) if piece
        ]
    # What stands beside the answer may come anywhere, and with text.
    for with_text in draw(
        st.lists(st.sampled_from([USAGE, CITED, MODEL, OTHER] if others else [USAGE, MODEL]), max_size=3)
    ):
        at = draw(st.integers(0, len(chunks)))
        if at < len(chunks) and chunks[at].text_only and draw(st.booleans()):
            chunks[at] = with_text(chunks[at].text)
        else:
            chunks.insert(at, with_text(""))
    return [*chunks, Chunk(finish_reason="stop")]


def USAGE(text):  # noqa: N802  # named as what it adds
    return Chunk(text, usage=Usage(input_tokens=1, output_tokens=1))


def CITED(text):  # noqa: N802  # as above
    return Chunk(text, details={"cited": ["there"]})


def MODEL(text):  # noqa: N802  # as above
    return Chunk(text, model="m-2")


def OTHER(text):  # noqa: N802  # as above
    return Chunk(text, alternatives=((1, Chunk("other")),))


def shown(response):
    """Return what a check sees of a response."""
    return (
        response.text,
        response.reasoning,
        response.media,
        response.opaque,
        response.tool_calls,
        [other.text for other in response.alternatives],
        response.finish_reason,
    )


class Watched:
    """A guard that notes its checks, and refuses the one of a number, counted from 1."""

    def __init__(self, release, refuse=0):
        self.checks = []
        self.log = []
        self.refuse = refuse
        self.guard = Guard(output=self.check, release=release)

    def check(self, response):
        self.checks.append(response)
        self.log.append(response)
        return "no more" if len(self.checks) == self.refuse else None

    def run(self, mode, steps):
        return call(mode, self.guard, steps, request=REQUEST, watch=self.log.append)


class TestBorders:
    @pytest.mark.parametrize(
        ("text", "cut_text"),
        [
            ("One. Two! Three? Four… Five", "One.| Two!| Three?| Four…| Five"),
            ("The end.", "The end."),
            ("Pi is 3.14, see http://a.b/c?d=e. So", "Pi is 3.14, see http://a.b/c?d=e.| So"),
            ("e.g. this", "e.g.| this"),
            ('"Why?" (So.) **Yes.** Go', '"Why?"| (So.)| **Yes.**| Go'),
            ("Wait... what?! Oh", "Wait...| what?!| Oh"),
            ("one\ntwo\r\n\n  three \n\n", "one\n|two\r\n|\n  three \n|\n"),
            ("One.\n\nTwo", "One.|\n\nTwo"),
            ("\u597d\u3002\u300c\u597d\uff01\u300d\u597d\uff1f", "\u597d\u3002|\u300c\u597d\uff01\u300d|\u597d\uff1f"),
            ("...", "..."),
            ("", ""),
        ],
    )
    def test_a_sentence(self, text, cut_text):
        """It ends at a stop before white space, with what it closes, and at the end of a line."""
        borders = [*Sentences().find(text)]
        assert "|".join(text[i:j] for i, j in zip([0, *borders], [*borders, len(text)], strict=True)) == cut_text

    @given(cut_texts, releases.filter(lambda release: release != "all"))
    def test_they_do_not_depend_on_the_cuts(self, drawn, release):
        """However a text comes, the same borders are found, each as soon as a character has followed it."""
        text, pieces, _ = drawn
        borders = Sentences() if release == "sentence" else Lengths(release)
        found, at = [], 0
        for piece in pieces:
            if not borders.skip(piece):
                found += [at + border for border in borders.find(piece)]
            at += len(piece)
            assert found == [len(so_far) for so_far in expected(text[:at], release)[:-1]]

    def test_a_long_run_takes_no_longer(self):
        """A million stops are searched once."""
        assert [*Sentences().find('."' * 500_000 + " a")] == [1_000_000]


class TestChecks:
    @given(cut_texts, releases)
    @settings(max_examples=60)
    def test_a_text(self, drawn, release):
        """Each text up to a border is checked once, and the whole at the end, in all modes; the same goes out."""
        text, *cuts = drawn
        outs = []
        for mode, pieces in [(WHOLE, cuts[0]), *[(STREAM, pieces) for pieces in cuts]]:
            watched = Watched(release)
            made = watched.run(mode, [Chunk(piece) for piece in pieces])
            assert made.response.text == text
            assert [response.text for response in watched.checks] == expected(text, release)
            if mode.streaming:
                outs.append([event.text for event in made.ran.events])
        assert all("".join(out) == text for out in outs)
        if release != "all":
            assert outs[0] == outs[1]  # what goes out is cut at the borders

    @given(st.data(), parts, calls, releases)
    @settings(max_examples=60)
    def test_all_else(self, data, given_parts, arguments, release):
        """The checks of an answer with reasoning, media, tool calls and other choices are those of the whole answer."""
        checks = []
        first = data.draw(chunked(given_parts, arguments))
        second = [*data.draw(chunked(given_parts, arguments, others=False))]
        for mode, steps in ((WHOLE, first), (STREAM, first), (STREAM, second)):
            watched = Watched(release)
            made = watched.run(mode, steps)
            checks.append([shown(response) for response in watched.checks])
            assert watched.checks[-1].text == made.response.text
            if mode.streaming:
                self.goes_out_after_its_check(watched, made)
        assert checks[0] == checks[1]
        # The other cutting may have no other choices.
        assert [seen[:5] for seen in checks[1]] == [seen[:5] for seen in checks[2]]

    def goes_out_after_its_check(self, watched, made):
        """Check that each event has been checked before, exactly, and that the events add up to the answer."""
        last = Response()
        out = []
        for entry in watched.log:
            if isinstance(entry, Response):
                last = entry
                continue
            out.append(entry)
            assert last.text.startswith("".join(chunk.text for chunk in out))
            assert last.reasoning.startswith("".join(chunk.reasoning for chunk in out))
            assert sum(len(chunk.parts) for chunk in out) <= len(last.media) + len(last.opaque)
            if entry.tool_calls or entry.alternatives or entry.details or entry.finish_reason or entry.usage:
                assert last is watched.checks[-1]
        assert "".join(chunk.text for chunk in out) == made.response.text
        assert "".join(chunk.reasoning for chunk in out) == made.response.reasoning
        pieces = [delta for chunk in out for delta in chunk.tool_calls]
        assert "".join(piece.arguments for piece in pieces) == "".join(
            each.raw_arguments for each in made.response.tool_calls
        )

    @given(st.data(), parts, calls, releases, st.integers(1, 5))
    @settings(max_examples=60)
    def test_a_refusal(self, data, given_parts, arguments, release, number):
        """Exactly what the checks before have passed has gone out. A whole call fails at the same check."""
        steps = data.draw(chunked(given_parts, arguments))
        whole, watched = Watched(release, number), Watched(release, number)
        whole_made, made = whole.run(WHOLE, steps), watched.run(STREAM, steps)
        assert [shown(r) for r in whole.checks] == [shown(r) for r in watched.checks]
        assert (whole_made.ran.error is None) == (made.ran.error is None) == (len(watched.checks) < number)
        if made.ran.error is not None:
            for error in (whole_made.ran.error, made.ran.error):
                assert isinstance(root_cause(error), GuardRefused)
                assert root_cause(error).reason == "no more"
            passed = watched.checks[-2] if number > 1 else Response()
            assert made.ran.text == passed.text
            assert "".join(event.reasoning for event in made.ran.events) == passed.reasoning
            assert not any(event.tool_calls or event.alternatives or event.details for event in made.ran.events)
            assert getattr(made.ran.error, "partial", Response()).text == passed.text

    @given(good_scripts, releases)
    @settings(max_examples=50)
    def test_any_stream(self, steps, release):
        """Chunks of every kind, in every order, are checked alike in whole and in stream mode, and add up."""
        watched, whole = Watched(release), Watched(release)
        made = watched.run(STREAM, Script(tuple(steps)).make())
        whole_made = whole.run(WHOLE, Script(tuple(steps)).make())
        assert made.response == whole_made.response
        assert [r.text for r in whole.checks] == [r.text for r in watched.checks]
        assert shown(whole.checks[-1]) == shown(watched.checks[-1])
        assert made.ran.text == made.response.text
        checked = ""
        out = ""
        for entry in watched.log:
            if isinstance(entry, Response):
                checked = entry.text
            else:
                out += entry.text
                assert checked.startswith(out)
