"""`Redact`: what is sent, what comes back, and what layers further out record of it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from typing import Any

import attrs
import pytest
from support.calling import call
from support.powers import tools
from support.tracing_tools import Recorder

from fluxibly import LLM, register_function
from fluxibly._logs import forget_reports
from fluxibly.errors import BadRequest, ConfigError, ServerError
from fluxibly.middleware import Logging, Redact, Retry, Tracing, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing.modes import MODES
from fluxibly.types import (
    Audio,
    Chunk,
    Document,
    Image,
    Message,
    Opaque,
    Reasoning,
    Request,
    Text,
    ToolCall,
    ToolCallDelta,
)

JOE, ANN, PHONE = "joe@x.com", "ann@y.org", "+49 171 1234567"


def asked(*messages: Any) -> Request:
    return Request(model="m", messages=[each if isinstance(each, Message) else Message.user(each) for each in messages])


def sent(made):
    return [message.text for message in made.provider.requests[-1].messages]


class TestWhatIsSent:
    def test_all_messages(self, mode):
        """System messages, earlier turns and the results of tools are redacted, and the request itself is not changed."""
        request = asked(
            Message.system(f"You help {JOE}."),
            f"I am {JOE}.",
            Message.assistant(f"Hi {JOE}", tool_calls=[ToolCall("c", "send", {"to": [JOE, 1], "é": None})]),
            Message.tool(f"sent to {JOE}", "c", name="send"),
            Message("user", f"Call {PHONE}", name=ANN),
        )
        made = call(mode, Redact(), "ok", request=request)
        assert sent(made) == ["You help [email].", "I am [email].", "Hi [email]", "sent to [email]", "Call [phone]"]
        messages = made.provider.requests[0].messages
        assert messages[2].tool_calls[0].arguments == {"to": ["[email]", 1], "é": None}
        assert messages[3].name == "send"
        assert messages[4].name is None
        assert request.messages[1].text == f"I am {JOE}."

    @pytest.mark.parametrize(
        "escaped", ['{"a": "Ann\\nLee é"}', '{"a": "Ann\\u000aLee \\u00e9"}', '{"a": "Ann\\nLee é']
    )
    def test_strings_in_json_are_searched_as_what_they_stand_for(self, mode, escaped):
        """Also for where a text begins, for line ends and for letters that are escaped."""
        request = asked("a", Message.assistant("", tool_calls=[ToolCall("c", "f", raw_arguments=escaped)]), "b")
        for pattern in ("^Ann", r"(?<=Ann)\n", "é"):
            made = call(mode, Redact(patterns={"x": pattern}), "ok", request=request)
            sent_call = made.provider.requests[0].messages[1].tool_calls[0]
            assert "[x]" in sent_call.raw_arguments

    def test_what_has_nothing_stays(self, mode):
        """Without a match, the very request goes on; of another, only the messages that have one are made anew."""
        made = call(mode, Redact(), "ok", request=asked("Hi"))
        assert made.provider.requests[0].messages[0].text == "Hi"
        request = asked("Hi", f"to {JOE}")
        made = call(mode, Redact(), "ok", request=request)
        assert made.provider.requests[0].messages[0] is request.messages[0]

    def test_parts(self, mode):
        """Transcripts and names of files are texts. Bytes, addresses and what only the service reads stay."""
        image = Image(url="https://x.com/joe@x.com.png")
        opaque = Opaque("anthropic", {"type": "search", "of": JOE})
        content = [
            Text(f"see {JOE}", raw={"cache_control": {"type": "ephemeral"}}),
            image,
            Audio(data=b"x", media_type="audio/wav", transcript=f"I am {JOE}"),
            Audio(data=b"y", media_type="audio/wav", transcript="hm"),
            Document(data=b"x", media_type="text/plain", name=f"{JOE}.txt"),
        ]
        request = asked(Message.user(content), Message.assistant([opaque, Text("yes")]), "go on")
        made = call(mode, Redact(), "ok", request=request)
        first, second, _ = made.provider.requests[0].messages
        assert first.content[0] == Text("see [email]", raw={"cache_control": {"type": "ephemeral"}})
        assert first.content[1] is image
        assert [part.transcript for part in first.content[2:4]] == ["I am [email]", "hm"]
        assert first.content[4].name == "[email]"
        assert second is request.messages[1]

    def test_reasoning(self, mode):
        """A signed block goes back as it came, or the service would refuse it. Another is redacted, also where `raw` repeats it."""
        raw = {"type": "thinking", "thinking": f"of {JOE}", "signature": "s"}
        blocks = [
            Reasoning(text=f"of {JOE}"),
            Reasoning(text=f"of {JOE}", signature="s"),
            Reasoning(text=f"of {JOE}", signature="s", raw=raw),
            Reasoning(text=f"of {JOE}", raw={"reasoning": f"of {JOE}", "data": f"{JOE}=="}),
            Reasoning(text="of nobody", signature="s"),
        ]
        made = call(mode, Redact(), "ok", request=asked("a", Message.assistant(blocks), "b"))
        assert made.provider.requests[0].messages[1].reasoning == (
            Reasoning(text="of [email]"),
            Reasoning(text=f"of {JOE}", signature="s"),
            Reasoning(text="of [email]", signature="s", raw=raw),
            Reasoning(text="of [email]", raw={"reasoning": "of [email]", "data": f"{JOE}=="}),
            Reasoning(text="of nobody", signature="s"),
        )

    def test_each_way_can_be_left_out(self, mode):
        """`outgoing=False` sends the originals, and `incoming=False` lets the answer be."""
        request = asked(f"I am {JOE}")
        made = call(mode, Redact(outgoing=False), f"So {JOE} it is", request=request)
        assert sent(made) == [f"I am {JOE}"]
        assert made.response.text == "So [email] it is"
        made = call(mode, Redact(incoming=False), f"So {JOE} it is", request=request)
        assert sent(made) == ["I am [email]"]
        assert made.response.text == f"So {JOE} it is"

    def test_the_text_in_its_place(self, mode):
        """`replace` is a text of one's own, with the name or without."""
        assert call(mode, Redact(replace="<<{name}>>"), "ok", request=asked(JOE)).provider.requests[0].messages[
            0
        ].text == ("<<email>>")
        assert sent(call(mode, Redact(replace="***"), "ok", request=asked(f"a {JOE}"))) == ["a ***"]
        assert sent(call(mode, Redact(replace=""), "ok", request=asked(f"a {JOE}"))) == ["a "]


class TestRestore:
    def test_placeholders(self, mode):
        """Equal originals share a placeholder, which are numbered as they come, over all messages. The caller sees originals."""
        request = asked(f"I am {JOE}, not {ANN}; {PHONE}", Message.assistant(f"Hi {ANN}"), f"No, {JOE}!")
        answer = ["Sorry [ema", "il_1], I took you for [email_2] ([phone_1])", ". [email_3] [email] [phone_12]"]
        made = call(mode, Redact(restore=True), answer, request=request)
        assert sent(made) == ["I am [email_1], not [email_2]; [phone_1]", "Hi [email_2]", "No, [email_1]!"]
        assert made.response.text == f"Sorry {JOE}, I took you for {ANN} ({PHONE}). [email_3] [email] [phone_12]"
        assert made.ran.text == (made.response.text if mode.streaming else "")

    def test_a_longer_conversation_keeps_its_numbers(self, mode):
        """Each call redacts the whole conversation anew, and says the same of the same turns, so that prompt caches hit."""
        first = call(mode, Redact(restore=True), "Hello [email_1]", request=asked(f"I am {JOE}"))
        again = asked(f"I am {JOE}", first.response.message, f"And {ANN}?")
        second = call(mode, Redact(restore=True), "[email_2]", request=again)
        assert sent(second) == ["I am [email_1]", "Hello [email_1]", "And [email_2]?"]
        assert second.response.text == ANN

    def test_what_looks_like_a_placeholder(self, mode):
        """A placeholder that the prompt has already is given out to nothing else, and comes back as it is."""
        made = call(mode, Redact(restore=True), "[email_1] [email_2]", request=asked(f"[email_1] is {JOE}"))
        assert sent(made) == ["[email_1] is [email_2]"]
        assert made.response.text == f"[email_1] {JOE}"

    def test_what_the_model_makes_up(self, mode):
        """It is redacted, unless `incoming` is off. What was restored is not redacted again."""
        answer = f"[email_1], {ANN}"
        made = call(mode, Redact(restore=True), answer, request=asked(JOE))
        assert made.response.text == f"{JOE}, [email]"
        made = call(mode, Redact(restore=True, incoming=False), answer, request=asked(JOE))
        assert made.response.text == f"{JOE}, {ANN}"
        made = call(mode, Redact(restore=True, replace="<{name} {number}>"), f"<email 1>, {ANN}", request=asked(JOE))
        assert made.response.text == f"{JOE}, <email 0>"

    def test_a_match_that_overlaps_with_a_placeholder(self, mode):
        """The placeholder is restored, and the rest of the match stays."""
        redact = Redact(patterns={"email": True, "quoted": r"\[[a-z_0-9]+\] \w+"}, restore=True)
        made = call(mode, redact, "[email_1] here, [other] there", request=asked(JOE))
        assert made.response.text == f"{JOE} here, [quoted]"

    def test_a_placeholder_that_is_escaped_in_json(self, mode):
        """What an earlier tool call has literally is not given out, however it is written."""
        earlier = ToolCall("c", "f", raw_arguments='{"a": "\\u005bemail_1\\u005d"}')
        made = call(mode, Redact(restore=True), "ok", request=asked(Message.assistant("", tool_calls=[earlier]), JOE))
        assert sent(made)[1] == "[email_2]"

    def test_what_is_a_match_only_beside_a_placeholder(self, mode):
        """It is replaced as well, because it would be taken for made up in an echo."""
        prompt = f"{JOE}4111111111111111 and {JOE}1{JOE}"
        made = call(mode, Redact(restore=True), "[email_1][card_1]", request=asked(prompt))
        assert not any(digits in sent(made)[0] for digits in ("4111", JOE))
        assert made.response.text == f"{JOE}4111111111111111"

    def test_everywhere_in_the_answer(self, mode):
        """Reasoning, other choices, details, transcripts and tool calls are restored."""
        steps = [
            Chunk(reasoning="of [email"),
            Chunk(reasoning="_1]"),
            Chunk("hi [email_1]", alternatives=((1, Chunk("yo [email_1]")),), details={"citations": ["[email_1]"]}),
            Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="f", arguments='{"a": "[email_1]"}'),)),
            Chunk(parts=(Audio(data=b"x", media_type="audio/wav", transcript="am [email_1]"),)),
        ]
        response = call(mode, Redact(restore=True), steps, request=asked(JOE)).response
        assert response.reasoning == f"of {JOE}"
        assert response.text == f"hi {JOE}"
        assert response.alternatives[0].text == f"yo {JOE}"
        assert response.details == {"citations": [JOE]}
        assert response.tool_calls[0].arguments == {"a": JOE}
        assert response.media[0].transcript == f"am {JOE}"

    def test_a_signed_block_goes_back_as_it_came(self, mode):
        """The caller reads the original, and the service gets the very block that it sent, with the placeholder."""
        raw = {"type": "thinking", "thinking": "of [email_1]", "signature": "s"}
        block = Reasoning(text="of [email_1]", signature="s", raw=raw)
        first = call(mode, Redact(restore=True), [Chunk(parts=(block,)), "yes"], request=asked(JOE)).response
        assert first.parts[0].text == f"of {JOE}"
        again = call(mode, Redact(restore=True), "ok", request=asked(JOE, first.message, "go on"))
        assert again.provider.requests[0].messages[1].reasoning == (block,)

    def test_nothing_to_restore(self, mode):
        """Without a match in the prompt, what looks like a placeholder in the answer stays."""
        made = call(mode, Redact(restore=True), f"[email_1] {ANN}", request=asked("Hi"))
        assert made.response.text == "[email_1] [email]"
        made = call(mode, Redact(restore=True, incoming=False), f"[email_1] {ANN}", request=asked("Hi"))
        assert made.response.text == f"[email_1] {ANN}"

    def test_parsed_values(self, mode):
        """What `Validation` has parsed has the originals, too; a value of a type that is not known is left out."""

        @attrs.frozen
        class Person:
            name: str
            mails: list[str]

        answer = '{"name": "[email_1]", "mails": ["[email_1]", "x"]}'
        made = call(mode, [Redact(restore=True), Validation(schema=Person)], answer, request=asked(JOE))
        assert made.response.parsed == Person(JOE, [JOE, "x"])
        made = call(mode, [Redact(restore=True), Validation(schema={"type": "object"})], answer, request=asked(JOE))
        assert made.response.parsed == {"name": JOE, "mails": [JOE, "x"]}

        def odd(request, call_next):
            return (yield from call_next(request)).evolve(parsed=object())

        made = call(mode, [Redact(restore=True), odd], answer, request=asked(JOE))
        assert made.response.parsed is None

    def test_the_record_has_no_originals(self, mode):
        """The table is nowhere in the record, which has originals only as what the consumer received."""

        def state(record):
            return repr({name: value for name, value in vars(record).items() if name not in ("delivered", "said")})

        seen = []

        def inside(request, call_next):
            response = yield from call_next(request)
            seen.append(state(request.call) + repr(request) + repr(response))
            return response

        made = call(mode, [Redact(restore=True), inside], "[email_1]", request=asked(JOE))
        assert made.response.text == JOE
        assert JOE not in seen[0]
        assert JOE not in state(made.record)
        assert [decision.what for decision in made.record.decisions] == ["replaces in what is sent: email (1)"]

    def test_a_turn_that_a_layer_inside_has_added(self, mode):
        """Its messages come out as the texts do: restored, and with what was made up redacted."""
        loop = tools({"look": lambda to: f"{to} knows {ANN}"})
        asks = ToolCallDelta(index=0, id="c", name="look", arguments='{"to": "[email_1]"}')
        turn = Chunk("Ask [email_1] ", tool_calls=(asks,))
        made = call(mode, [Redact(restore=True), loop], [turn], ["Done, [email", "_1]"], request=asked(JOE))
        question, result = made.response.added
        assert question.text == f"Ask {JOE} "
        assert question.tool_calls[0].arguments == {"to": JOE}
        assert result.text == f"{JOE} knows [email]"
        assert made.response.text == f"Done, {JOE}"


class TestSharing:
    def test_threads(self):
        """A hundred threads share one instance, and each gets its own originals."""
        redact = Redact(restore=True)
        results = {}

        class Echo:
            def complete(self, request):
                return request.messages[0].text

        pipeline = Pipeline(Echo(), [redact])

        def work(number):
            prompt = f"I am user{number}@x.com"
            results[number] = (pipeline.complete(Request(model="m", messages=prompt)).text, prompt)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 100
        assert all(got == expected for got, expected in results.values())

    def test_tasks(self):
        """So do a thousand tasks that stream."""
        redact = Redact(restore=True)

        class Echo:
            async def stream(self, request):
                for character in request.messages[0].text:
                    await asyncio.sleep(0)
                    yield Chunk(character)

        async def work(pipeline, number):
            prompt = f"user{number}@x.com"
            async with pipeline.stream(Request(model="m", messages=prompt)) as stream:
                assert "".join([chunk.text async for chunk in stream]) == prompt

        async def main():
            pipeline = AsyncPipeline(Echo(), [redact])
            await asyncio.gather(*[work(pipeline, number) for number in range(1000)])

        asyncio.run(main())


class TestYaml:
    def made(self, tmp_path, layers):
        file = tmp_path / "framework.yaml"
        config = {"llm": {"framework": "echo", "model": "any", "middleware": layers}}
        file.write_text(json.dumps(config), encoding="utf-8")
        with LLM.from_yaml(file) as llm:
            return llm.pipeline.middleware

    def test_settings(self, tmp_path):
        """YAML names patterns and registered functions, and gives expressions."""
        register_function("find_people", lambda text: [(0, 3)] if text.startswith("Ada") else [])
        patterns = {"email": True, "ticket": r"T-\d+", "person": {"function": "find_people"}}
        (redact,) = self.made(tmp_path, [{"redact": {"patterns": patterns, "restore": True}}])
        assert redact.text("Ada T-1 a@b.de") == "[person] [ticket] [email]"
        (redact,) = self.made(tmp_path, [{"redact": {"patterns": ["email", "find_people"]}}])
        assert redact.text("Ada a@b.de") == "[find_people] [email]"

    def test_of_logging_and_tracing(self, tmp_path):
        """They take a table of the settings of `Redact`, or the name of a registered function."""
        register_function("hide", lambda text: "hidden")
        settings = {"patterns": ["email"]}
        layers = [{"tracing": {"redact": settings}}, {"logging": {"redact": settings}}, {"logging": {"redact": "hide"}}]
        tracing, first, second = self.made(tmp_path, layers)
        assert tracing.redact.text(JOE) == first.redact.text(JOE) == "[email]"
        assert second.redact(JOE) == "hidden"

    @pytest.mark.parametrize(
        ("layer", "expected"),
        [
            (
                {"redact": {"patterns": ["emial"]}},
                "redact.patterns: there is no pattern 'emial'; did you mean 'email'?",
            ),
            ({"redact": {"patterns": {"x": "("}}}, "redact.patterns.x: expected a regular expression"),
            ({"redact": {"restore": "yes"}}, "redact.restore: expected True or False"),
            (
                {"logging": {"redact": {"pattern": []}}},
                "logging.redact.pattern: there is no such setting; did you mean 'patterns'?",
            ),
            ({"logging": {"redact": {"patterns": []}}}, "logging.redact.patterns: expected names"),
            ({"logging": {"redact": {"restore": 5}}}, "logging.redact.restore: expected True or False"),
            ({"tracing": {"redact": "nobody"}}, "function 'nobody' not registered"),
            ({"logging": {"redact": 5}}, "redact: expected a function, got an int"),
        ],
    )
    def test_mistakes(self, tmp_path, layer, expected):
        """They are told with their path."""
        with pytest.raises(ConfigError) as caught:
            self.made(tmp_path, [layer])
        assert expected in str(caught.value)


class TestRecords:
    """What layers outside of `Redact` record."""

    @pytest.mark.parametrize("redact", [Redact(), Redact().text], ids=["redact", "function"])
    def test_spans_and_logs_have_no_originals(self, mode, redact, caplog):
        """With everything captured and DEBUG on, what a `Redact` finds is nowhere, whether the call succeeds or fails."""
        caplog.set_level(logging.DEBUG, logger="fluxibly")
        recorder = Recorder()
        stack = [recorder.tracing(capture="both", redact=redact), Logging(redact=redact), Redact(restore=True), Retry()]
        request = asked(f"I am {JOE}, call {PHONE} and say that it rains", Message.assistant(f"Hi {JOE}"), "And?")
        answer = [
            "Hello [email_1]",
            f", or {ANN}? ",
            Chunk(tool_calls=(ToolCallDelta(index=0, id="c", name="f", arguments='{"a": "[phone_1]"}'),)),
        ]
        made = call(mode, stack, ServerError("again"), answer, request=request)
        assert JOE in made.response.text
        failing = BadRequest(f"cannot read {JOE} in 'I am [email_1], call [phone_1] and say that it rains'")
        call(mode, stack, failing, request=request)
        shown = (
            repr([attrs_of(span) for span in recorder.spans])
            + repr(recorder.events)
            + repr([vars(each) for each in caplog.records])
        )
        for original in (JOE, ANN, PHONE):
            assert original not in shown
        if not mode.streaming:
            assert "Hello [email], or [email]?" in caplog.text
        # The text that was sent is masked as well as the text that was given.
        assert (
            "say that it rains"
            not in [each.error_message for each in caplog.records if hasattr(each, "error_message")][-1]
        )

    def test_previews_end_after_a_match(self, caplog):
        """A preview is cut after the redaction, so that no half of a match is shown, and each text is redacted by itself."""
        caplog.set_level(logging.DEBUG, logger="fluxibly")
        request = asked(Message.user(["word", "4111 1111 1111 1111 "]), "x" * 70 + f" {JOE}")
        call(MODES[0], Logging(redact=Redact()), "y" * 95 + f" {ANN}", request=request)
        details = caplog.records[-1]
        assert details.prompt_preview == "word[card] " + "x" * 70 + " [email]"
        assert details.response_preview == "y" * 95 + " [ema..."

    @pytest.mark.parametrize("returned", [None, 5, LookupError("of joe")])
    def test_a_redact_that_fails_hides_everything(self, mode, returned, caplog, capsys):
        """No preview and no error message is logged, the call goes on, and this is reported once."""
        forget_reports()
        caplog.set_level(logging.DEBUG, logger="fluxibly")

        def redact(text):
            if isinstance(returned, Exception):
                raise returned
            return returned

        assert call(mode, Logging(redact=redact), "the answer").response.text == "the answer"
        call(mode, Logging(redact=redact), BadRequest("the error"))
        assert "the answer" not in caplog.text
        assert "France" not in caplog.text
        assert caplog.records[-1].error_message == ""
        kind = "LookupError" if isinstance(returned, Exception) else "TypeError"
        assert capsys.readouterr().err == (
            f"fluxibly: Logging: redact raised {kind}; the log leaves out the texts for which it raises\n"
        )

    def test_the_setting_is_checked(self):
        """It is a `Redact`, or a plain function."""

        async def later(text):
            return text

        for kind in (Logging, Tracing):
            with pytest.raises(ValueError, match="redact: expected a plain function, got an async function"):
                kind(redact=later)
            with pytest.raises(ValueError, match="redact: expected a function, got an int"):
                kind(redact=5)
            assert "Redact(patterns=" in repr(kind(redact=Redact()))

    def test_errors_are_masked_against_what_was_sent(self, caplog):
        """A provider that quotes the redacted prompt quotes nothing that the log shows."""
        caplog.set_level(logging.ERROR, logger="fluxibly")
        prompt = f"tell {JOE} that the meeting is off"
        error = BadRequest("in: tell [email] that the meeting is off")
        made = call(MODES[0], [Logging(), Redact()], error, request=asked(prompt))
        assert made.record.sent_messages[0].text == "tell [email] that the meeting is off"
        assert "meeting" not in caplog.text


def attrs_of(span):
    return [
        dict(span.attributes or {}),
        [(event.name, dict(event.attributes or {})) for event in span.events],
        str(span.status.description),
    ]
