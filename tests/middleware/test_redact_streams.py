"""`Redact` in streams: the same text as of a whole answer, nothing let out too early, and little held back."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings, strategies as st
from support.calling import call

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import hold_back
from fluxibly.middleware import Redact, Retry
from fluxibly.pipeline import Pipeline
from fluxibly.testing import Cut, check_middleware
from fluxibly.testing.modes import MODES, run
from fluxibly.types import Chunk, Reasoning, Request, Response, Restart, ToolCall, ToolCallDelta

PEM = "-----BEGIN PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA\n" * 3 + "-----END PRIVATE KEY-----"
KEY = "sk-proj-" + "a1B2c3D4" * 3
FRAGMENTS = [
    *[
        "joe@x.com",
        "joe.o'neil@a.b.co",
        "@",
        "a",
        "bob",
        ".com",
        ".",
        "+49 171 1234567",
        "(030) 123456",
        "06 12 34 56 78",
    ],
    *["4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "BE68 5390 0754 7034", KEY, "sk-", "Bearer ", PEM, "-----"],
    *[
        "-----BEGIN PRIVATE KEY-----",
        "\n",
        " ",
        "-",
        "1",
        "23",
        "0171",
        "/1234567",
        "T-1",
        "12",
        "[email_1]",
        "[",
        "email_1",
    ],
    *["]", "hi", "! ", "? ", "x" * 70, "192.168.1.1", "fe80::1:", "A", "é", "Ada Lovelace", "Ada"],
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join)


def people(text):
    return [match.span() for match in re.finditer("Ada( Lovelace)?", text)]


WAYS = [
    Redact(),
    Redact(patterns=["ip", "email"]),
    Redact(patterns={"email": True, "ticket": r"T-\d+", "word": r"\bhi\b|x+$"}),
    Redact(patterns={"person": people, "phone": True}),
    Redact(patterns={"quoted": r"\[.*?\]", "twice": r"(.)\1"}),
    Redact(patterns={"secret": r"(?<=email_)\d|A(?!d)|[^ ]+@[^ ]+"}),
]


@st.composite
def cuts(draw, text):
    """Return a text in pieces."""
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def whole_and_streamed(redact, pieces, prompt="hi"):
    """Return the text of a whole answer, and the texts of the chunks of a streamed one."""

    class Provider:
        def complete(self, request):
            return "".join(pieces)

        def stream(self, request):
            yield from map(Chunk, pieces)

    pipeline = Pipeline(Provider(), [redact])
    request = Request(model="m", messages=prompt)
    with pipeline.stream(request) as stream:
        chunks = [chunk.text for chunk in stream]
        assert stream.response.text == "".join(chunks)
    return pipeline.complete(request).text, chunks


class TestTheSameText:
    @settings(max_examples=150)
    @given(st.data(), texts, st.sampled_from(WAYS))
    def test_a_stream_gives_the_text_of_a_whole_answer(self, data, text, redact):
        """However a text is cut into chunks, the same comes out."""
        pieces = data.draw(cuts(text))
        whole, chunks = whole_and_streamed(redact, pieces)
        assert "".join(chunks) == whole
        one_by_one = whole_and_streamed(redact, list(text))[1]
        assert "".join(one_by_one) == whole

    @settings(max_examples=100)
    @given(
        st.data(),
        st.lists(st.sampled_from(["joe@x.com", "+49 171 1234567", KEY, "DE89370400440532013000"]), min_size=1),
    )
    def test_no_original_goes_out(self, data, originals):
        """No chunk, and no text so far, has anything that is to be replaced."""
        pieces = data.draw(cuts(", so ".join(originals) + "!"))
        chunks = whole_and_streamed(Redact(), pieces)[1]
        so_far = ""
        for chunk in chunks:
            so_far += chunk
            assert not any(original in so_far for original in originals)
            assert not re.search(r"joe|\+49|sk-|DE8", so_far)

    @settings(max_examples=150)
    @given(st.data(), texts.filter(str.strip), st.booleans())
    def test_an_echo_comes_back_as_it_was(self, data, prompt, incoming):
        """What a model says with the placeholders has the originals for the caller, however it is cut."""

        class Echo:
            def complete(self, request):
                return request.messages[0].text

            def stream(self, request):
                yield from map(Chunk, data.draw(cuts(request.messages[0].text)))

        pipeline = Pipeline(
            Echo(), [Redact(patterns=["email", "phone", "card", "iban", "key", "ip"], restore=True, incoming=incoming)]
        )
        request = Request(model="m", messages=prompt)
        assert pipeline.complete(request).text == prompt
        with pipeline.stream(request) as stream:
            assert "".join(chunk.text for chunk in stream) == prompt

    @pytest.mark.parametrize(
        "replace", ["[{name}]", "<{name} {number}>", "{{{name}}}", "({number}. {name})", "<redacted {name}>"]
    )
    def test_all_kinds_of_placeholders(self, replace):
        """Placeholders may look like anything, also like the beginning of one another."""
        prompt = " ".join([f"u{number}@x.com" for number in range(12)]) + " email_1 <email 2> {email_3}"
        redact = Redact(restore=True, replace=replace)
        sent = []

        class Echo:
            def complete(self, request):
                sent.append(request.messages[0].text)
                return sent[0]

            def stream(self, request):
                yield from map(Chunk, self.complete(request))

        pipeline = Pipeline(Echo(), [redact])
        request = Request(model="m", messages=prompt)
        assert pipeline.complete(request).text == prompt
        assert "@" not in sent[0]
        with pipeline.stream(request) as stream:
            assert "".join(chunk.text for chunk in stream) == prompt


class TestWhatIsHeldBack:
    def test_what_can_be_no_match_goes_out_at_once(self):
        """Only the end of a text is held back, and only if a match may begin there."""
        chunks = whole_and_streamed(
            Redact(patterns={"ticket": r"T-\d+"}), ["See ", "the", " T", "able, T", "-1", "2, T-x"]
        )[1]
        assert chunks == ["See ", "the", " ", "Table, ", "[ticket], T-x"]
        chunks = whole_and_streamed(Redact(), ["Hello ", "the", "re, ", "joe", "@x", ".com", " and 20", "24 ", "x"])[1]
        assert chunks == ["Hello ", "there, ", "[email] and ", "2024 ", "x"]

    @settings(max_examples=100)
    @given(texts)
    def test_it_is_bounded(self, text):
        """No more is held back than the longest match of the patterns."""
        redact = Redact(patterns=["email", "phone", "card", "iban"])
        came = out = 0
        outs = []

        class Provider:
            def stream(self, request):
                nonlocal came
                for character in text:
                    came += 1
                    yield Chunk(character)

        # Replacements are as long as what they stand for at least, so lengths can be compared.
        redact = Redact(patterns=["email", "phone", "card", "iban"], replace="{name}" + "*" * 400)
        with Pipeline(Provider(), [redact]).stream(Request(model="m", messages="hi")) as stream:
            for chunk in stream:
                out += len(chunk.text)
                outs.append((came, out))
        assert all(came - out <= 640 for came, out in outs)

    @pytest.mark.parametrize("redact", [Redact(patterns={"any": r"x.*?y"}), Redact(patterns={"any": people})])
    def test_patterns_without_a_longest_match_hold_back_no_more_than_2000_characters(self, redact):
        """An expression, or a function, that waits for more does not hold a stream back for ever."""
        came = 0
        held = []

        class Provider:
            def stream(self, request):
                nonlocal came
                for _ in range(5_000):
                    came += 1
                    yield Chunk("x")

        out = 0
        with Pipeline(Provider(), [redact]).stream(Request(model="m", messages="hi")) as stream:
            for chunk in stream:
                out += len(chunk.text)
                held.append(came - out)
        assert out == 5_000
        assert max(held) <= 2_000

    def test_a_function_gets_sentences(self):
        """A function gets each sentence of an answer once, as soon as it has ended."""
        got = []

        def find(text):
            got.append(text)
            return people(text)

        pieces = ["I am A", "da. She is Ada", " Lovelace! Dr. No", "\nEnd Ada"]
        chunks = whole_and_streamed(Redact(patterns={"person": find}), pieces)[1]
        assert chunks == ["I am [person]. ", "She is [person]! Dr. ", "No\n", "End [person]"]
        assert got[-5:] == ["I am Ada. ", "She is Ada Lovelace! ", "Dr. ", "No\n", "End Ada"]

    def test_a_long_sentence_ends_at_a_space(self):
        """A function gets at most 1,000 characters at a time, without a word cut in two."""
        got = []
        text = "Ada " * 300
        redact = Redact(patterns={"person": lambda text: got.append(text) or people(text)}, outgoing=False)
        whole, chunks = whole_and_streamed(redact, list(text))
        assert whole == "".join(chunks) == "[person] " * 300
        assert [len(each) for each in got] == [1000, 200] * 2


class TestFailures:
    def test_a_function_that_raises_lets_nothing_out(self, mode):
        """The call fails, because nobody knows what the text has in it."""

        def find(text):
            if "Ada" in text:
                raise LookupError("no model")
            return []

        made = call(mode, Redact(patterns={"person": find}), ["Hello. ", "I am Ada."])
        error = made.ran.error
        assert isinstance(error.__cause__ if mode.streaming else error, LookupError)
        assert "Ada" not in made.ran.text

    def test_an_interrupted_stream(self, stream_mode):
        """What was held back does not go out, and the partial answer has what was let out."""
        made = call(stream_mode, Redact(), ["Write to joe", "@x", ServerError("gone")])
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == made.ran.text == "Write to "

    def test_a_stream_that_is_dropped(self, stream_mode):
        """A consumer that leaves gets nothing of what is held back, and nothing stays open."""
        made = call(stream_mode, Redact(restore=True), ["Write ", "to joe", "@x.com", " now"], stop_after=1)
        assert made.ran.text == "Write "

    def test_before_output_the_cause_is_raised(self, stream_mode):
        """As long as everything is held back, a layer further out may retry."""
        made = call(stream_mode, [Retry(), Redact()], ["joe", Cut()], ["hi ", "there"])
        assert made.response.text == made.ran.text == "hi there"

    def test_a_restart_begins_anew(self, stream_mode):
        """What was held back of an attempt that is void goes into no other answer."""
        stack = [Redact(), Retry(on_interrupt="restart")]
        made = call(stream_mode, stack, ["Mail joe", Cut()], ["Write to @x.com or joe@x.com"], restarts=True)
        assert any(isinstance(event, Restart) for event in made.ran.events)
        assert made.response.text == made.ran.text == "Write to @x.com or [email]"

    def test_a_hold_back_further_out_gets_the_changed_text(self, stream_mode):
        """What it checks, and lets out, is what `Redact` has let out."""
        seen = []

        def holding(request, call_next):
            return (yield from hold_back(call_next(request), check=lambda response: seen.append(response.text)))

        made = call(stream_mode, [holding, Redact()], ["Mail joe", "@x.com", " now"])
        assert seen == [made.ran.text] == ["Mail [email] now"]

    @pytest.mark.parametrize(
        "redact", [Redact(), Redact(restore=True), Redact(patterns={"hello": "[Hh]ello,? ?", "p": people})]
    )
    def test_the_laws_of_middleware(self, redact):
        """It keeps them in all modes."""
        check_middleware(redact)


def deltas(arguments, index=0):
    """Return the chunks of a tool call, one for each character of its arguments."""
    first = ToolCallDelta(index=index, id=f"c{index}", name="send")
    return [
        Chunk(tool_calls=(first,)),
        *[Chunk(tool_calls=(ToolCallDelta(index=index, arguments=each),)) for each in arguments],
    ]


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**17), 10**17),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(
            ["joe@x.com", 'say "joe@x.com"\n', "+49 171 1234567", "\\", "é\ud83d", "😀 a@b.de", 4111111111111111]
        ),
        st.text(max_size=5),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("joe@x.com"), inner, max_size=3)
    ),
    max_leaves=8,
)


def changed(value):
    """Return JSON values as they should come out."""
    if isinstance(value, dict):
        return {changed(key): changed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [changed(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"joe@x\.com|a@b\.de", "[email]", value).replace("+49 171 1234567", "[phone]")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = Redact().text(json.dumps(value))
        return value if text == json.dumps(value) else text
    return value


class TestToolCalls:
    @settings(max_examples=60)
    @given(st.dictionaries(st.text(max_size=3), json_values, max_size=3), st.booleans(), st.sampled_from([None, 1]))
    def test_the_arguments_stay_json(self, arguments, ascii_only, indent):
        """Strings are redacted as what they stand for, and all else stays. A number in which something is found is a string."""
        text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
        answers = []
        for mode in MODES[:4:3]:
            made = call(mode, Redact(), deltas(text))
            (answer,) = made.response.tool_calls
            assert answer.error is None
            answers.append(answer)
            assert json.loads(answer.raw_arguments) == changed(arguments)
            assert answer.raw_arguments == text or changed(arguments) != arguments
        assert answers[0].raw_arguments == answers[1].raw_arguments

    def test_originals_are_escaped(self, mode):
        """An original with quotes in it stands in the JSON as JSON writes it."""
        redact = Redact(patterns={"quote": '"[^"]+"', "email": True}, restore=True)
        request = Request(model="m", messages='Send "hi\tthere" to joe@x.com')
        text = '{"to": "[email_1]", "text": "[quote_1] \\u005bemail_1\\u005d", "n": 12}'
        made = call(mode, redact, deltas(text), request=request)
        (answer,) = made.response.tool_calls
        assert answer.arguments == {"to": "joe@x.com", "text": '"hi\tthere" joe@x.com', "n": 12}
        assert made.provider.requests[0].messages[0].text == "Send [quote_1] to [email_1]"

    def test_several_calls(self, mode):
        """Each call has a text of its own, also if their fragments alternate, have no numbers, or all have the same."""
        one, two = deltas('{"a": "joe@x.com"}'), deltas('{"a": "ann@y.org"}', 1)
        mixed = [each for pair in zip(one, two, strict=True) for each in pair]
        made = call(mode, Redact(), mixed)
        assert [each.arguments for each in made.response.tool_calls] == [{"a": "[email]"}] * 2
        bare = [
            Chunk(tool_calls=(ToolCallDelta(name="send", id=name, arguments="{"),))
            if fragment is None
            else Chunk(tool_calls=(ToolCallDelta(arguments=fragment),))
            for name in ("x", "y")
            for fragment in (None, '"a": "joe', '@x.com"', "}")
        ]
        made = call(mode, Redact(), bare)
        assert [each.arguments for each in made.response.tool_calls] == [{"a": "[email]"}] * 2
        same = [
            Chunk(tool_calls=(ToolCallDelta(index=0, name="send", id=name, arguments="call joe"),)) for name in "xy"
        ]
        made = call(mode, Redact(), same)
        assert [each.raw_arguments for each in made.response.tool_calls] == ["call joe"] * 2

    @pytest.mark.parametrize("raw", [None, {"type": "custom"}])
    def test_arguments_that_are_no_json(self, mode, raw):
        """Free text is redacted as text."""
        first = ToolCallDelta(index=0, id="c", name="send", raw=raw)
        rest = [ToolCallDelta(index=0, arguments=each) for each in "write to joe@x.com"]
        made = call(mode, Redact(), [Chunk(tool_calls=(each,)) for each in (first, *rest)])
        assert [each.raw_arguments for each in made.response.tool_calls] == ["write to [email]"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"a": "joe@x.com', '{"a": "[email]'),
            ('{"a": "joe\\u0040x.com"}', '{"a": "[email]"}'),
            ('{"a": "x\\ud83d', '{"a": "x\\ud83d'),
            ('{"a": "x\\u12', '{"a": "x\\u12'),
            ('{"a": "x\\', '{"a": "x\\'),
            ('{"a": "\\q joe@x.com \\u12x"}', '{"a": "\\q [email] \\u12x"}'),
            ("{joe@x.com: -4111111111111111}", '{"[email]": "-[card]"}'),
            ("  ", "  "),
        ],
    )
    def test_broken_json(self, mode, text, expected):
        """What a model cut off or got wrong is redacted all the same, and the rest stays."""
        made = call(mode, Redact(), deltas(text))
        assert [each.raw_arguments for each in made.response.tool_calls] == [expected]


class TestOtherParts:
    def test_reasoning(self, mode):
        """Reasoning is a text of its own."""
        made = call(mode, Redact(), [Chunk(reasoning="joe"), Chunk(reasoning="@x.com?"), Chunk("ann"), "@y.org"])
        assert made.response.reasoning == "[email]?"
        assert made.response.text == "[email]"

    def test_texts_that_stand_apart(self, mode):
        """A match does not go over another part, and all stays in its order."""
        steps = [Chunk("a@b"), Chunk(reasoning="hm joe"), Chunk(".com"), *deltas("{}"), Chunk("c@d.org")]
        made = call(mode, Redact(), steps)
        kinds = [getattr(part, "text", None) or type(part).__name__ for part in made.response.parts]
        assert kinds == ["a@b", "hm joe", ".com", "ToolCall", "[email]"]

    def test_a_signed_block_whose_text_was_changed(self, mode):
        """With `raw` it goes back as it came. Without, it has no signature any more, which the service would refuse."""
        raw = {"type": "thinking", "thinking": "ask joe@x.com", "signature": "s"}
        for block, expected in (
            (
                Reasoning(text="ask joe@x.com", signature="s", raw=raw),
                Reasoning(text="ask [email]", signature="s", raw=raw),
            ),
            (Reasoning(text="ask joe@x.com", signature="s"), Reasoning(text="ask [email]")),
            (Reasoning(text="ask nobody", signature="s"), Reasoning(text="ask nobody", signature="s")),
        ):
            cut = [*(Chunk(reasoning=each) for each in block.text), Chunk(parts=(block,)), "yes"]
            for steps in (cut, [Chunk(parts=(block,)), "yes"]):
                made = call(mode, Redact(), steps)
                assert made.response.parts[0] == expected
                assert made.response.text == "yes"

    def test_other_choices(self, mode):
        """Each choice has texts of its own."""
        block = Reasoning(text="of joe@x.com", signature="s")
        steps = [
            Chunk("joe", alternatives=((1, Chunk("ann")), (2, Chunk(parts=(block,))))),
            Chunk("@x.com", alternatives=((1, Chunk("@y")), (2, Chunk("hi")))),
            Chunk(" end", alternatives=((1, Chunk(".org")),)),
        ]
        made = call(mode, Redact(), steps)
        assert made.response.text == "[email] end"
        assert [other.text for other in made.response.alternatives] == ["[email]", "hi"]
        assert made.response.alternatives[1].parts[0] == Reasoning(text="of [email]")

    def test_details(self, mode):
        """Texts in details are redacted. Log probabilities, which spell the answer out, are left out."""
        details = {"citations": [{"text": "by joe@x.com", "at": 1}], "logprobs": {"content": [{"token": "joe"}]}}
        made = call(mode, Redact(), [Chunk("hi", details=details)])
        assert made.response.details == {"citations": [{"text": "by [email]", "at": 1}]}
        made = call(mode, Redact(restore=True, incoming=False), [Chunk("hi", details=details)])
        assert made.response.details == details

    def test_a_whole_answer_is_the_one_that_came_if_nothing_is_found(self, mode):
        """An answer without matches is not copied."""
        answer = Response("nothing here", tool_calls=[ToolCall("c", "f", {"a": "b"})], raw={"x": 1})
        made = run(MODES[0], _Returns(answer), [Redact()], Request(model="m", messages="hi"))
        assert made.response.raw == {"x": 1}
        assert made.response == answer


class _Returns:
    def __init__(self, answer):
        self.answer = answer

    def complete(self, request):
        return self.answer
