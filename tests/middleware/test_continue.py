"""`Continue`: an answer that was cut goes on, by a prefill or by asking, and whole and streamed alike."""

from __future__ import annotations

import json
import logging
import pickle
import re
import threading

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from support.calling import REQUEST, scripted
from support.powers import tools
from support.tracing_tools import Recorder

from fluxibly import LLM, LLMConfig, Target
from fluxibly.errors import BadRequest, ContextLengthExceeded, ServerError, StreamInterrupted
from fluxibly.middleware import (
    Continue,
    ExtractReasoning,
    Fallback,
    Guard,
    Retry,
    StreamMeter,
    Validation,
)
from fluxibly.middleware.continuation import GO_ON
from fluxibly.providers.anthropic import AnthropicProvider
from fluxibly.providers.dialects.anthropic import PREFILL
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.ollama import OllamaGenerateProvider, OllamaProvider
from fluxibly.providers.openai import OpenAIProvider
from fluxibly.registry import make_middleware
from fluxibly.testing import Cut, VirtualClock, check_middleware
from fluxibly.testing.modes import MODES, run
from fluxibly.testing.scripted import INFO
from fluxibly.types import Chunk, Image, Message, Prefill, Request, ToolCallDelta, Usage

PREFILLS = Prefill()
WHOLE = MODES[0]
STREAM = MODES[len(MODES) // 2]
CALL = ToolCallDelta(index=0, id="c1", name="clock", arguments='{"zo')


def cut(*pieces, **fields):
    """Return an answer that was cut."""
    return [*pieces, Chunk(finish_reason="length", **fields)]


def whole(*pieces, **fields):
    """Return an answer that is complete, or the last part of one."""
    return [*pieces, Chunk(finish_reason="stop", **fields)]


class Made:
    """A call to a provider, and what became of it."""

    def __init__(self, mode, middleware, *answers, prefill=None, request=REQUEST, **options):
        clock = VirtualClock()
        self.provider = scripted(mode, *answers, clock=clock)
        self.provider.info = attrs.evolve(INFO, prefill=prefill)

        def note(request, call_next):
            self.record = request.call
            return (yield from call_next(request))

        layers = middleware if isinstance(middleware, list) else [middleware]
        self.ran = run(mode, self.provider, [note, *layers], request, clock=clock, **options)
        assert self.provider.opened == self.provider.closed

    @property
    def response(self):
        if self.ran.error is not None:
            raise self.ran.error
        return self.ran.response

    @property
    def asked(self):
        """The messages of each request after those of the first, as (role, text)."""
        first = len(self.provider.requests[0].messages)
        return [[(message.role, message.text) for message in r.messages[first:]] for r in self.provider.requests]

    @property
    def decisions(self):
        return [decision.what for decision in self.record.decisions if decision.middleware == "Continue"]


class TestByAPrefill:
    def test_the_answer_so_far_is_the_beginning_of_the_message(self, mode):
        made = Made(mode, Continue(), cut("The capital ", "of"), whole(" France", " is Paris."), prefill=PREFILLS)
        assert made.response.text == "The capital of France is Paris."
        assert made.response.finish_reason == "stop"
        assert made.asked == [[], [("assistant", "The capital of")]]
        if mode.streaming:
            assert [
                (event.text, event.added) for event in made.ran.events if event.text or event.added is not None
            ] == [
                ("The capital ", None),
                ("of", None),
                ("", ()),
                (" France", None),
                (" is Paris.", None),
            ]

    def test_several_times(self, mode):
        """Each request has all of the text so far."""
        made = Made(mode, Continue(max_turns=4), cut("a"), cut("b"), cut("c"), cut("d"), prefill=PREFILLS)
        assert (made.response.text, made.response.finish_reason) == ("abcd", "length")
        assert made.asked == [[], [("assistant", "a")], [("assistant", "ab")], [("assistant", "abc")]]
        assert made.decisions[-1] == "returns an answer that is cut after 4 requests"

    @pytest.mark.parametrize(
        ("first", "second", "text"),
        [
            ("one ", "two", "one two"),
            ("one ", " two", "one two"),
            ("one", " two", "one two"),
            ("one\n\n", "\n\ntwo", "one\n\ntwo"),
            ("one\n\n", "\n two", "one\n\n two"),
            ("one \n", " two", "one \ntwo"),
            ("one ", "  two", "one  two"),
            ("one  ", " ", "one  "),
            (" ", "two", " "),
        ],
    )
    def test_white_space_is_neither_lost_nor_doubled(self, mode, first, second, text):
        """A prefill ends without it, so the model may write it again."""
        for script in ([second], list(second)):
            made = Made(mode, Continue(), cut(first), whole(*script), prefill=PREFILLS)
            assert made.response.text == text
            assert not mode.streaming or made.ran.text == text
            assert made.asked[1:] in ([], [[("assistant", first.rstrip())]])

    def test_the_fields_that_a_service_needs(self, mode):
        """They are merged into the request's own."""
        prefill = Prefill(body={"continue_final_message": True, "add_generation_prompt": False})
        request = REQUEST.evolve(extra={"user": "me"})
        made = Made(mode, Continue(), cut("a"), whole("b"), prefill=prefill, request=request)
        assert [each.extra for each in made.provider.requests] == [
            {"user": "me"},
            {"user": "me", "continue_final_message": True, "add_generation_prompt": False},
        ]

    @pytest.mark.parametrize("second", ["one two three", " three", "one", "one tw", "one two", "one too"])
    def test_a_service_that_repeats_the_message(self, mode, second):
        """What it repeats is left out, also if it does not repeat it all the time."""
        for script in ([second], list(second)):
            made = Made(mode, Continue(), cut("one two "), whole(*script), prefill=Prefill(echoes=True))
            assert made.response.text == "one two " + second.removeprefix("one two").removeprefix(" ")

    def test_a_repetition_without_a_prefill_is_text(self, mode):
        made = Made(mode, Continue(), cut("ha"), whole("haha"), prefill=PREFILLS)
        assert made.response.text == "hahaha"

    def test_only_the_models_that_do(self, mode):
        prefill = Prefill(models="claude-[1-3]")
        for model, role in (("claude-3-opus", "assistant"), ("claude-9", "user")):
            request = REQUEST.evolve(model=model)
            made = Made(mode, Continue(), cut("a"), whole("b"), prefill=prefill, request=request)
            assert made.provider.requests[1].messages[-1].role == role

    def test_a_prefill_of_the_callers(self, mode):
        """It and the answer are one message, which no other may stand in."""
        request = REQUEST.evolve(messages=[*REQUEST.messages, Message.assistant("Sure: ")])
        for first, prefill in (("one", PREFILLS), ("one", Prefill(echoes=True)), ("Sure: one", Prefill(echoes=True))):
            made = Made(mode, Continue(), cut(first), whole(" two"), prefill=prefill, request=request)
            assert made.response.text == f"{first} two"
            sent = made.provider.requests[1].messages
            assert [(each.role, each.text) for each in sent[1:]] == [("assistant", "Sure: one")]

    def test_a_repetition_of_the_callers_prefill(self, mode):
        """The service repeats the message as it was sent."""
        request = REQUEST.evolve(messages=[*REQUEST.messages, Message.assistant("Sure: ")])
        made = Made(mode, Continue(), cut("one"), whole("Sure: one two"), prefill=Prefill(echoes=True), request=request)
        assert made.response.text == "one two"

    def test_a_prefill_that_is_refused(self, mode):
        """The model is asked then, and stays asked."""
        script = [cut("a"), BadRequest("no prefill"), cut("b"), whole("c")]
        made = Made(mode, Continue(max_turns=4), *script, prefill=PREFILLS)
        assert made.response.text == "abc"
        ask = ("user", GO_ON)
        assert made.asked == [[], [("assistant", "a")], [("assistant", "a"), ask], [("assistant", "ab"), ask]]
        assert "asks instead, because the service refuses the prefill" in made.decisions
        if mode.streaming:
            assert [event.added for event in made.ran.events if event.added is not None] == [(), ()]

    def test_a_refusal_at_the_last_request(self, mode):
        """There are never more requests than `max_turns`."""
        made = Made(mode, Continue(max_turns=2), cut("a"), BadRequest("no"), whole("b"), prefill=PREFILLS)
        error = made.ran.error.__cause__ if mode.streaming else made.ran.error
        assert isinstance(error, BadRequest)
        assert len(made.provider.requests) == 2


class TestByAsking:
    def test_a_message_asks_to_go_on(self, mode):
        made = Made(mode, Continue(), cut("one"), cut(" two"), whole(" three"))
        assert made.response.text == "one two three"
        assert made.asked == [
            [],
            [("assistant", "one"), ("user", GO_ON)],
            [("assistant", "one two"), ("user", GO_ON)],
        ]

    @pytest.mark.parametrize(
        "beside",
        [{"reasoning": "hm"}, {"parts": (Image(data=b"png", media_type="image/png"),)}],
        ids=["reasoning", "image"],
    )
    def test_an_answer_that_is_more_than_text(self, mode, beside):
        """It goes back as it came."""
        made = Made(mode, Continue(), cut(Chunk("one", **beside)), whole(" two"), prefill=PREFILLS)
        assert made.response.text == "one two"
        sent = made.provider.requests[1].messages
        assert [message.role for message in sent] == ["user", "assistant", "user"]
        assert len(sent[1].parts) == 2

    def test_reasoning_of_every_part(self, mode):
        made = Made(mode, Continue(), cut(Chunk(reasoning="a"), "x"), whole(Chunk(reasoning="b"), "y"))
        response = made.response
        assert (response.text, response.reasoning) == ("xy", "ab")
        assert [getattr(part, "text", None) for part in response.parts] == ["a", "x", "b", "y"]
        assert [part.text for part in response.reasoning_parts] == ["a", "b"]


class TestTheResponse:
    def test_usage_is_the_sum(self, mode):
        one = Usage(input_tokens=1, output_tokens=2, reasoning_tokens=1)
        two = Usage(input_tokens=10, output_tokens=20)
        made = Made(mode, Continue(), cut("a", usage=one), whole("b", usage=two, model="m-9", id="i"))
        response = made.response
        assert response.usage == response.total_usage == Usage(input_tokens=11, output_tokens=22, reasoning_tokens=1)
        assert (response.model, response.id, response.provider) == ("m-9", "i", "scripted")
        assert made.record.attempts == 2

    def test_a_failed_attempt_is_no_part(self, mode):
        """Its tokens are in `total_usage` alone."""
        usage = Usage(input_tokens=1, output_tokens=1)
        failed = [Chunk(usage=usage), ServerError("down")]
        made = Made(mode, [Continue(), Retry(base_delay=0)], cut("a", usage=usage), failed, whole("b", usage=usage))
        assert made.response.usage == Usage(input_tokens=2, output_tokens=2)
        assert made.response.text == "ab"

    def test_a_part_that_brings_nothing_is_the_last(self, mode):
        made = Made(mode, Continue(max_turns=9), cut("a"), cut(usage=Usage(output_tokens=1)), "never")
        assert (made.response.text, made.response.finish_reason) == ("a", "length")
        assert len(made.provider.requests) == 2

    def test_tool_calls_of_a_later_part(self, mode):
        """The layer that runs tools gets them, behind the whole text."""
        call = Chunk(
            tool_calls=(ToolCallDelta(index=0, id="c1", name="clock", arguments="{}"),), finish_reason="tool_call"
        )
        stack = [tools({"clock": lambda: "noon"}), Continue()]
        made = Made(mode, stack, cut("I will"), [" look.", call], whole("Noon."), prefill=PREFILLS)
        assert made.response.text == "Noon."
        assert [message.text for message in made.response.added] == ["I will look.", "noon"]
        assert made.response.added[0].tool_calls[0].name == "clock"

    def test_tools_further_in(self, mode):
        """Only the message that was cut goes on, after all that was added."""
        call = Chunk("Look: ", tool_calls=(ToolCallDelta(index=0, id="c1", name="clock", arguments="{}"),))
        stack = [Continue(), tools({"clock": lambda: "noon"})]
        made = Made(mode, stack, [call], cut("It is"), whole(" noon."), prefill=PREFILLS)
        assert (made.response.text, len(made.response.added)) == ("It is noon.", 2)
        assert made.asked[2] == [("assistant", "Look: "), ("tool", "noon"), ("assistant", "It is")]

    @pytest.mark.parametrize("second", ["Let me see.", " Let me see.", "One moment. Let me see."])
    def test_a_message_that_goes_on_and_calls_tools_further_in(self, mode, second):
        """The message before the results has all parts, as they were streamed."""
        stack = [Continue(), tools({"clock": lambda: "noon"})]
        calls = [second, Chunk(tool_calls=(attrs.evolve(CALL, arguments="{}"),))]
        made = Made(mode, stack, cut("One moment. "), calls, whole(" Noon."), prefill=Prefill(echoes=True))
        assert made.response.text == " Noon."
        assert [(each.role, each.text) for each in made.response.added] == [
            ("assistant", "One moment. Let me see."),
            ("tool", "noon"),
        ]
        assert [each.name for each in made.response.added[0].tool_calls] == ["clock"]
        if mode.streaming:
            assert [event.added for event in made.ran.events if event.added] == [made.response.added]
            assert "".join(event.text for event in made.ran.events) == "One moment. Let me see. Noon."


class TestReturnedAsTheyAre:
    @pytest.mark.parametrize(
        ("answer", "change", "why"),
        [
            (cut("a", tool_calls=(CALL,)), {}, "it has tool calls"),
            (cut('{"a'), {"response_format": "json"}, "it is structured"),
            (cut('{"a'), {"response_format": {"type": "object"}}, "it is structured"),
            (cut("a", alternatives=((1, Chunk("b")),)), {}, "it is one of several"),
            (cut("a"), {"n": 2}, "it is one of several"),
            (cut(Chunk(reasoning="hm")), {}, "it has no text"),
            (cut(" \n"), {}, "it has no text"),
            (cut("a", raw_finish_reason="model_context_window_exceeded"), {}, "it fills the context of the model"),
        ],
    )
    def test_answers(self, mode, answer, change, why):
        """The log says why."""
        request = REQUEST.evolve(**change)
        made = Made(mode, Continue(), answer, "never", prefill=PREFILLS, request=request)
        expected = Made(mode, [], answer, request=request)
        assert made.response == expected.response
        assert made.decisions == [f"returns a cut answer as it is: {why}"]
        assert not mode.streaming or made.ran.events == expected.ran.events

    @pytest.mark.parametrize("wanted", ["text", {"type": "text"}])
    def test_text_is_not_structured(self, mode, wanted):
        request = REQUEST.evolve(response_format=wanted)
        assert Made(mode, Continue(), cut("a"), whole("b"), request=request).response.text == "ab"

    def test_a_complete_answer(self, mode):
        made = Made(mode, Continue(), whole("a"), "never")
        assert (made.response.text, made.decisions) == ("a", [])

    def test_one_request_at_most(self, mode):
        made = Made(mode, Continue(max_turns=1), cut("a"), "never")
        assert (made.response.text, len(made.provider.requests)) == ("a", 1)


class TestErrors:
    def test_a_retry_further_in(self, mode):
        made = Made(mode, [Continue(), Retry(base_delay=0)], cut("a"), ServerError("down"), whole("b"))
        assert (made.response.text, made.record.attempts) == ("ab", 3)

    def test_before_the_output_of_a_later_part(self, mode):
        """A whole call has the error itself; a stream has let something out."""
        error = Made(mode, Continue(), cut("a"), ServerError("down")).ran.error
        if mode.streaming:
            assert isinstance(error, StreamInterrupted)
            assert error.partial.text == "a"
            error = error.__cause__
        assert isinstance(error, ServerError)

    @pytest.mark.parametrize("end", [ServerError("down"), Cut()], ids=["error", "cut"])
    def test_after_output_of_a_later_part(self, stream_mode, end):
        """The partial answer has all parts."""
        made = Made(
            stream_mode, [Retry(), Continue(), Retry(base_delay=0)], cut("a "), [" b", "c", end], prefill=PREFILLS
        )
        assert isinstance(made.ran.error, StreamInterrupted)
        assert made.ran.error.partial.text == made.ran.text == "a bc"

    def test_a_context_that_is_too_long_is_no_refusal(self, mode):
        made = Made(mode, Continue(), cut("a"), ContextLengthExceeded("long"), whole("b"), prefill=PREFILLS)
        assert made.ran.error is not None
        assert len(made.provider.requests) == 2

    @pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4])
    def test_a_consumer_that_leaves(self, stream_mode, stop_after):
        """At any point, nothing stays open."""
        made = Made(
            stream_mode, [StreamMeter(), Continue()], cut("a"), whole("b"), prefill=PREFILLS, stop_after=stop_after
        )
        assert (made.ran.error, made.ran.response) == (None, None)


class TestOtherLayers:
    def test_the_same_model_gives_all_parts(self, mode):
        """A `Fallback` further in asks the target that gave the first part."""
        other = scripted(mode, cut("one"), whole(" two"))
        other.info = attrs.evolve(INFO, prefill=PREFILLS)
        stack = [Continue(), Fallback(Target(other, model="m-2", temperature=1))]
        made = Made(mode, stack, ServerError("down"), "never", request=REQUEST.evolve(extra={"a": 1}))
        assert made.response.text == "one two"
        assert len(made.provider.requests) == 1
        assert [(each.model, each.temperature, each.extra) for each in other.requests] == [("m-2", 1, {})] * 2
        assert other.requests[1].messages[-1] == Message.assistant("one")

    def test_another_model_of_the_same_provider(self, mode):
        made = Made(mode, [Continue(), Fallback("m-2")], ServerError("down"), cut("one"), whole(" two"))
        assert [request.model for request in made.provider.requests] == ["m-1", "m-2", "m-2"]

    def test_a_fallback_when_the_next_part_fails(self, mode):
        """Then another target may go on with it."""
        other = scripted(mode, whole(" two"))
        made = Made(mode, [Continue(), Fallback(Target(other))], cut("one"), ServerError("down"))
        assert made.response.text == "one two"

    def test_a_guard_checks_each_part(self, mode):
        seen = []
        stack = [Continue(), Guard(output=lambda response: seen.append(response.text))]
        assert Made(mode, stack, cut("one"), whole(" two")).response.text == "one two"
        assert seen == ["one", " two"]

    def test_validation_outside_sees_the_whole(self, mode):
        stack = [Validation(check=lambda r: None if r.text == "one two" else "bad", hold=True), Continue()]
        assert Made(mode, stack, cut("one"), whole(" two")).response.text == "one two"

    def test_reasoning_in_the_text(self, mode):
        """With `ExtractReasoning` inside, the model is asked, because its reasoning is not text."""
        made = Made(
            mode, [Continue(), ExtractReasoning()], cut("<think>hm</think>one"), whole(" two"), prefill=PREFILLS
        )
        assert (made.response.text, made.response.reasoning) == ("one two", "hm")
        assert made.asked[1][-1] == ("user", GO_ON)

    def test_the_log_and_the_trace(self, mode, caplog):
        """They say what was decided, and quote nothing. The span has the tokens of both parts."""
        caplog.set_level(logging.DEBUG, "fluxibly")
        recorder = Recorder()
        usage = Usage(input_tokens=1, output_tokens=2)
        script = [cut("xyzzy plugh", usage=usage), whole("b", usage=usage)]
        made = Made(mode, [recorder.tracing(), Continue()], *script, prefill=PREFILLS)
        assert made.response.text == "xyzzy plughb"
        assert made.decisions == ["goes on by a prefill after 11 characters (request 2)"]
        assert "goes on by a prefill after 11 characters" in caplog.text
        span = recorder.call
        assert [
            event.attributes["fluxibly.decision.middleware"] for event in span.events if "decision" in event.name
        ] == ["Continue"]
        assert span.attributes["gen_ai.usage.output_tokens"] == 4
        assert "xyzzy" not in caplog.text + repr([each.to_json() for each in recorder.spans])


class TestSettings:
    @pytest.mark.parametrize("wrong", [0, -1, 1.5, "3", True, None])
    def test_a_wrong_one(self, wrong):
        with pytest.raises(ValueError, match="Continue: max_turns: expected a whole number from 1 up"):
            Continue(max_turns=wrong)

    def test_in_yaml(self):
        assert make_middleware(["continue", {"continue": {"max_turns": 5}}]) == (Continue(), Continue(max_turns=5))
        assert repr(Continue()) == "Continue(max_turns=3)"
        assert pickle.loads(pickle.dumps(Continue())) == Continue()  # noqa: S301  # our own

    def test_keeps_the_laws(self):
        check_middleware(Continue())


class TestServices:
    @pytest.mark.parametrize(
        ("framework", "prefill"),
        [
            ("groq", Prefill()),
            ("llamacpp", Prefill()),
            ("mistral", Prefill(echoes=True)),
            ("vllm", Prefill(body={"continue_final_message": True, "add_generation_prompt": False})),
            ("openai", None),
            ("openrouter", None),
            ("deepseek", None),
        ],
    )
    def test_what_is_known_of_them(self, framework, prefill):
        config = LLMConfig(framework=framework, model="m", api_key="k")
        assert OpenAIProvider(config).info.prefill == prefill

    def test_a_server_of_ones_own(self):
        """The quirk says it."""
        config = LLMConfig(
            framework="openai",
            model="m",
            api_base="http://localhost:1/v1",
            quirks={"prefill": "continue_final_message"},
        )
        assert OpenAIProvider(config).info.prefill.body["continue_final_message"] is True

    def test_other_dialects(self):
        assert AnthropicProvider(LLMConfig(framework="anthropic", model="m", api_key="k")).info.prefill is PREFILL
        assert OllamaProvider(LLMConfig(framework="ollama", model="m")).info.prefill == Prefill()
        assert OllamaGenerateProvider(LLMConfig(framework="ollama-generate", model="m")).info.prefill is None

    @pytest.mark.parametrize(
        "model",
        [
            "claude-2.1",
            "claude-instant-1.2",
            "claude-3-opus-20240229",
            "claude-3-7-sonnet-latest",
            "claude-sonnet-4-20250514",
            "claude-opus-4-1-20250805",
            "claude-opus-4-5-20251101",
            "claude-haiku-4-5@20251001",
            "anthropic.claude-v2:1",
            "claude-opus-4",
            "us.anthropic.claude-haiku-4-5-20251001-v1:0",
        ],
    )
    def test_claude_up_to_4_5(self, model):
        assert re.search(PREFILL.models, model)

    @pytest.mark.parametrize(
        "model",
        [
            "claude-opus-4-6",
            "claude-opus-4-6-20260205",
            "claude-sonnet-4.6",
            "claude-opus-4-10",
            "claude-opus-5",
            "claude-fable-5",
            "us.anthropic.claude-opus-4-8",
            "gemini-2.5-pro",
            "llama-4",
        ],
    )
    def test_later_models_refuse_it(self, model):
        assert not re.search(PREFILL.models, model)

    def test_the_flag_of_a_message(self):
        """Mistral refuses an assistant's message at the end that lacks it; it is written nowhere else."""
        messages = [Message.user("Hi"), Message.assistant("Ho"), Message.user("Hey"), Message.assistant("So")]

        def sent(quirks, messages):
            request = Request(model="m", messages=messages)
            return json.loads(OpenAICodec(quirks).encode(request, stream=False).body)["messages"]

        assert [each.get("prefix") for each in sent(Quirks(prefill="prefix"), messages)] == [None, None, None, True]
        assert not any("prefix" in each for each in sent(Quirks(prefill="prefix"), messages[:3]))
        assert not any("prefix" in each for each in sent(Quirks(prefill="message"), messages))


@settings(max_examples=150)
@given(
    st.text(alphabet="ab \n", min_size=1, max_size=12),
    st.lists(st.integers(0, 12), max_size=5),
    st.lists(st.integers(0, 12), max_size=6),
    st.sampled_from([None, PREFILLS, Prefill(echoes=True)]),
    st.sampled_from(MODES),
)
def test_the_text_is_that_of_one_answer(text, cuts, pieces, prefill, mode):
    """Wherever it is cut into parts, and the parts into chunks, as long as each part has a word."""
    at = sorted({min(cut, len(text)) for cut in cuts} - {0, len(text)})
    parts = [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]
    made_of = [part for part in parts if part.strip()]
    if made_of != parts:
        return
    script, before = [], ""
    for number, part in enumerate(parts):
        # The model does not see the white space before its part, and writes it again.
        again = before[len(before.rstrip()) :] + part
        said = before.rstrip() + again if prefill is not None and prefill.echoes and number else again
        begun = sorted({min(piece, len(said)) for piece in pieces} - {0, len(said)})
        cut_up = [said[start:end] for start, end in zip([0, *begun], [*begun, len(said)], strict=True)]
        script.append((whole if number == len(parts) - 1 else cut)(*cut_up))
        before += part
    made = Made(mode, Continue(max_turns=9), *script, prefill=prefill)
    assert made.response.text == text
    assert len(made.provider.requests) == len(parts)
    if mode.streaming:
        assert made.ran.text == text
        assert made.response == Made(WHOLE, Continue(max_turns=9), *script, prefill=prefill).response


def test_many_threads_share_one():
    layer = Continue()
    wrong = []

    def work(number):
        made = Made(STREAM, layer, cut(f"{number}"), cut("-"), whole("end"), prefill=PREFILLS)
        if made.response.text != f"{number}-end":
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.model
@pytest.mark.parametrize("streamed", [False, True])
def test_a_real_model(gguf, streamed):
    """Eight tokens at a time go on to a whole answer, by a prefill."""
    config = LLMConfig(framework="local", model=str(gguf), temperature=0)
    question = "Name three colors, and say a word about each."
    records = []

    def note(request, call_next):
        records.append(request.call)
        return (yield from call_next(request))

    with LLM(config, []) as llm:
        first = llm.complete(question, max_tokens=8)
    assert first.finish_reason == "length"
    with LLM(config, [note, Continue(max_turns=30)]) as llm:
        if streamed:
            stream = llm.stream(question, max_tokens=8)
            text = "".join(chunk.text for chunk in stream)
            response = stream.response
            assert text == response.text
        else:
            response = llm.complete(question, max_tokens=8)
    assert response.text.startswith(first.text)
    assert len(response.text) > len(first.text)
    assert response.finish_reason == "stop"
    assert response.usage.output_tokens > 8
    said = [decision.what for decision in records[0].decisions]
    assert said
    assert all(what.startswith("goes on by a prefill") for what in said)
