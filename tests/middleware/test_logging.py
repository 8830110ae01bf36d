"""The log lines of `Logging`, which are a contract word for word, in all modes."""

from __future__ import annotations

import io
import logging

import anyio
import pytest
from support.calling import REQUEST, call, scripted

from fluxibly._logs import forget_reports
from fluxibly.errors import RateLimitError, ResponseInvalid, ServerError, StreamStalled
from fluxibly.flow import sleep
from fluxibly.middleware import Logging, Retry, Validation
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.testing import AsyncScriptedProvider, Cut, Delay, ScriptedProvider, VirtualClock
from fluxibly.testing.modes import BACKENDS, MODES, run
from fluxibly.types import Chunk, Message, Request, Response

STREAMS = [mode for mode in MODES if mode.streaming]
WHOLE = [mode for mode in MODES if not mode.streaming]
NAME = "name=ScriptedProvider, framework=scripted, model=m-1, prompt_length=30"


@pytest.fixture
def lines(caplog):
    """A function that returns the lines logged so far, from DEBUG up."""
    caplog.set_level(logging.DEBUG, logger="fluxibly")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


class TestLines:
    @pytest.mark.parametrize("mode", WHOLE, ids=str)
    def test_a_whole_call(self, mode, lines):
        """The start and completion are logged at INFO, and previews at DEBUG."""
        call(mode, Logging(), ["The capital ", Delay(1.2345), "is Paris."])
        assert lines() == [
            ("INFO", f"LLM request started | {NAME}"),
            ("INFO", "LLM request completed | elapsed_time=1.23s, prompt_length=30, response_length=21"),
            (
                "DEBUG",
                (
                    'LLM request details | prompt_preview="What is the capital of France?", '
                    'response_preview="The capital is Paris.", elapsed_time=1.234'
                ),
            ),
        ]

    def test_a_stream(self, stream_mode, lines):
        """The start and completion are logged at INFO, and chunk sizes at DEBUG."""
        call(stream_mode, Logging(), ["The capital ", Delay(3.449), "is", " Paris."])
        assert lines() == [
            ("INFO", f"LLM streaming request started | {NAME}"),
            ("INFO", "LLM streaming completed | elapsed_time=3.45s, total_chunks=3, total_length=21"),
            ("DEBUG", "LLM streaming details | total_chunks=3, total_length=21, avg_chunk_size=7.0"),
        ]

    @pytest.mark.parametrize("mode", WHOLE, ids=str)
    def test_a_whole_call_that_fails(self, mode, lines):
        """The error's type and message are logged at ERROR."""
        call(mode, Logging(), [Delay(0.5), RateLimitError("slow down")])
        assert lines()[1:] == [
            (
                "ERROR",
                'LLM request failed | elapsed_time=0.50s, error_type=RateLimitError, error_message="slow down"',
            )
        ]

    def test_a_stream_that_fails_after_output(self, stream_mode, lines):
        """The line names the cause of StreamInterrupted, and counts the chunks received before it."""
        call(stream_mode, Logging(), ["one ", "two ", Delay(0.25), ServerError("went away")])
        assert lines()[1:] == [
            (
                "ERROR",
                (
                    "LLM streaming failed | elapsed_time=0.25s, error_type=ServerError, "
                    'error_message="went away", chunks_received=2'
                ),
            )
        ]

    def test_a_stream_that_fails_before_output(self, stream_mode, lines):
        """The line counts no received chunks."""
        call(stream_mode, Logging(), [RateLimitError("slow down")])
        assert lines()[1:] == [
            (
                "ERROR",
                (
                    "LLM streaming failed | elapsed_time=0.00s, error_type=RateLimitError, "
                    'error_message="slow down", chunks_received=0'
                ),
            )
        ]

    def test_a_stream_that_is_cut_off(self, stream_mode, lines):
        """A truncated stream is logged as a failure."""
        call(stream_mode, Logging(), ["one ", Cut()])
        assert lines()[1][1].startswith(
            "LLM streaming failed | elapsed_time=0.00s, error_type=StreamProtocolError, error_message="
        )
        assert lines()[1][1].endswith(", chunks_received=1")

    def test_a_stream_that_stalls(self, stream_mode, lines, caplog):
        """An idle timeout is a failure, and the record's outcome is `stalled`."""
        call(stream_mode, Logging(), ["one ", Delay(60), StreamStalled("nothing came for 60 s")])
        assert lines()[1] == (
            "ERROR",
            (
                "LLM streaming failed | elapsed_time=60.00s, error_type=StreamStalled, "
                'error_message="nothing came for 60 s", chunks_received=1'
            ),
        )
        assert caplog.records[-1].outcome == "stalled"

    @pytest.mark.parametrize(("stop_after", "count", "length"), [(0, 0, 0), (2, 2, 7)])
    def test_an_abandoned_stream(self, stream_mode, lines, stop_after, count, length):
        """A consumer that stops early is not a failure."""
        call(stream_mode, Logging(), ["one", Delay(1), " two", " three"], stop_after=stop_after)
        elapsed = 1 if stop_after else 0
        assert lines()[1:] == [
            (
                "INFO",
                f"LLM streaming abandoned | elapsed_time={elapsed}.00s, total_chunks={count}, total_length={length}",
            )
        ]

    @pytest.mark.parametrize("mode", STREAMS, ids=str)
    def test_a_response_that_was_not_streamed(self, mode, lines):
        """A cached response reaches the consumer as one chunk, and is logged as one chunk."""

        def cached(request, call_next):
            yield from ()
            return Response("from a cache")

        call(mode, [Logging(), cached])
        assert lines()[1:] == [
            ("INFO", "LLM streaming completed | elapsed_time=0.00s, total_chunks=1, total_length=12"),
            ("DEBUG", "LLM streaming details | total_chunks=1, total_length=12, avg_chunk_size=12.0"),
        ]

    @pytest.mark.parametrize("mode", STREAMS, ids=str)
    def test_a_stream_without_chunks(self, mode, lines):
        """The average chunk size of an empty stream is 0."""
        call(mode, Logging(), [])
        assert lines()[1:] == [
            ("INFO", "LLM streaming completed | elapsed_time=0.00s, total_chunks=0, total_length=0"),
            ("DEBUG", "LLM streaming details | total_chunks=0, total_length=0, avg_chunk_size=0.0"),
        ]

    @pytest.mark.parametrize("mode", WHOLE, ids=str)
    def test_an_interrupted_call(self, mode, lines, caplog):
        """Ctrl-C is a cancellation rather than a failure."""
        ran = call(mode, Logging(), [Delay(2), KeyboardInterrupt()]).ran
        assert isinstance(ran.error, KeyboardInterrupt)
        assert lines()[1:] == [("INFO", "LLM request cancelled | elapsed_time=2.00s")]
        assert caplog.records[-1].outcome == "cancelled"

    def test_an_interrupted_stream(self, stream_mode, lines):
        """The line of a cancelled stream counts the chunks and characters so far."""
        call(stream_mode, Logging(), ["one", KeyboardInterrupt()])
        assert lines()[1:] == [("INFO", "LLM streaming cancelled | elapsed_time=0.00s, total_chunks=1, total_length=3")]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_cancelled_task(self, backend, lines):
        """A task that is cancelled while it awaits the call is logged as cancelled, on asyncio and trio."""

        class Slow:
            async def complete(self, request):
                await anyio.sleep_forever()

        async def main():
            with anyio.move_on_after(0.01):
                await AsyncPipeline(Slow(), [Logging()], clock=VirtualClock()).complete(REQUEST)

        anyio.run(main, backend=backend)
        assert lines()[1:] == [("INFO", "LLM request cancelled | elapsed_time=0.00s")]

    @pytest.mark.parametrize(
        ("end", "says"),
        [
            ([], "completed | elapsed_time=2.50s"),
            ([ServerError("down")], "failed | elapsed_time=2.50s"),
            ([KeyboardInterrupt()], "cancelled | elapsed_time=2.50s"),
        ],
        ids=["completed", "failed", "cancelled"],
    )
    def test_the_elapsed_time_is_that_of_the_call(self, mode, end, says, lines, caplog):
        """A process that has run for an hour logs how long the call took, however the call ends."""
        clock = VirtualClock()
        clock.advance(3600)
        run(mode, scripted(mode, ["one", Delay(2.5), *end], clock=clock), [Logging()], REQUEST, clock=clock)
        assert says in lines()[1][1]
        assert caplog.records[1].elapsed_time == 2.5

    def test_the_elapsed_time_of_an_abandoned_stream(self, stream_mode, lines):
        """The time ends when the consumer leaves."""
        clock = VirtualClock()
        clock.advance(3600)
        provider = scripted(stream_mode, ["one", Delay(2.5), " two", " three"], clock=clock)
        run(stream_mode, provider, [Logging()], REQUEST, clock=clock, stop_after=2)
        assert lines()[1][1] == "LLM streaming abandoned | elapsed_time=2.50s, total_chunks=2, total_length=7"

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_cancelled_read(self, backend, lines):
        """A task that is cancelled while it waits for a chunk is logged as cancelled, on asyncio and trio."""

        class Slow:
            async def complete(self, request):
                raise AssertionError

            async def stream(self, request):
                yield "one"
                await anyio.sleep_forever()

        async def main():
            with anyio.move_on_after(0.01):
                async with AsyncPipeline(Slow(), [Logging()], clock=VirtualClock()).stream(REQUEST) as stream:
                    async for _ in stream:
                        pass

        anyio.run(main, backend=backend)
        assert lines()[1:] == [("INFO", "LLM streaming cancelled | elapsed_time=0.00s, total_chunks=1, total_length=3")]

    def test_started_is_logged_when_the_stream_is_made(self, lines):
        """The start is logged before the first chunk is read."""
        stream = Pipeline(ScriptedProvider("a"), [Logging()]).stream(REQUEST)
        assert lines() == [("INFO", f"LLM streaming request started | {NAME}")]
        stream.close()

    def test_prompt_length_is_of_all_messages(self, mode, lines):
        """The prompt's length is the number of characters in all texts of all messages."""
        messages = [Message.system("Be brief."), Message.user(["é", "☃☃"])]
        call(mode, Logging(), "ok", request=Request(model="m", messages=messages))
        assert lines()[0][1].endswith("prompt_length=12")


class TestRecords:
    def test_every_value_is_on_the_record(self, mode, caplog):
        """The record has each value under its name in the line, and the provider's name as `provider_name`."""
        caplog.set_level(logging.DEBUG, logger="fluxibly")
        call(mode, Logging(), ["Par", Delay(2), "is"])
        started, completed, details = caplog.records
        assert started.name == "fluxibly"
        assert (started.provider_name, started.framework, started.model) == ("ScriptedProvider", "scripted", "m-1")
        assert started.prompt_length == 30
        assert completed.elapsed_time == 2
        assert completed.outcome == "completed"
        if mode.streaming:
            assert (completed.total_chunks, completed.total_length) == (2, 5)
            assert (details.total_chunks, details.total_length, details.avg_chunk_size) == (2, 5, 2.5)
        else:
            assert (completed.prompt_length, completed.response_length) == (30, 5)
            assert (details.prompt_preview, details.response_preview) == ("What is the capital of France?", "Paris")
            assert details.elapsed_time == 2

    def test_the_values_of_a_failure(self, mode, caplog):
        """The record has the error's type, message and outcome, and for streams the number of chunks."""
        call(mode, Logging(), [ServerError("down")])
        record = caplog.records[-1]
        assert (record.error_type, record.error_message, record.outcome) == ("ServerError", "down", "failed")
        assert getattr(record, "chunks_received", None) == (0 if mode.streaming else None)

    def test_no_content_above_debug(self, mode, caplog):
        """At INFO, no line or value contains the prompt or the answer."""
        caplog.set_level(logging.INFO, logger="fluxibly")
        call(mode, Logging(), ["The capital ", "is Paris."])
        assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
        for record in caplog.records:
            assert "capital" not in str(vars(record))

    def test_echoed_prompts_are_masked(self, mode, caplog):
        """The prompt is masked in a server's error that quotes it, verbatim or JSON-escaped."""
        request = Request(model="m", messages='My "secret" diary\nsays things')
        error = ServerError('cannot do "My \\"secret\\" diary\\nsays things", nor My "secret" diary')
        call(mode, Logging(), [error], request=request)
        assert "diary" not in str(vars(caplog.records[-1]))
        assert "cannot do" in caplog.records[-1].getMessage()

    def test_messages_that_middleware_added_are_masked_too(self, mode, caplog):
        """Logging is the outermost layer, but it masks the messages that were finally sent."""

        def retrieve(request, call_next):
            return (
                yield from call_next(request.evolve(messages=(*request.messages, Message.user("a retrieved text"))))
            )

        call(mode, [Logging(), retrieve], [ServerError("bad input: a retrieved text")])
        assert 'error_message="bad input: […]"' in caplog.records[-1].getMessage()

    def test_a_rejected_answer_is_masked(self, mode, caplog):
        """An answer that Validation quotes in its error stays out of the logs."""
        validation = Validation(check=lambda response: f"do not say: {response.text}", max_retries=0)
        ran = call(mode, [Logging(), validation], "the patient has measles").ran
        invalid = ran.error.__cause__ if mode.streaming else ran.error
        assert isinstance(invalid, ResponseInvalid)
        assert "measles" in str(invalid)
        assert "measles" not in caplog.records[-1].getMessage()

    def test_an_exception_that_cannot_be_shown(self, mode, caplog):
        """The exception's type is logged, and the exception reaches the caller."""

        class Odd(Exception):
            def __str__(self):
                raise RuntimeError("no words")

        ran = call(mode, Logging(), [Odd()]).ran
        assert isinstance(ran.error, Odd)
        assert 'error_type=Odd, error_message=""' in caplog.records[-1].getMessage()


class TestPreviews:
    @pytest.mark.parametrize(
        ("text", "preview"),
        [("x" * 100, "x" * 100), ("x" * 101, "x" * 100 + "..."), ("é" * 250, "é" * 100 + "..."), ("short", "short")],
    )
    def test_a_hundred_characters(self, lines, text, preview):
        """A preview ends in `...` only if it was cut."""
        Pipeline(ScriptedProvider(text), [Logging()], clock=VirtualClock()).complete(Request(model="m", messages=text))
        assert lines()[-1] == (
            "DEBUG",
            f'LLM request details | prompt_preview="{preview}", response_preview="{preview}", elapsed_time=0.000',
        )

    def test_no_text_can_forge_a_line(self, mode, caplog):
        """Line ends and terminal controls in prompts, answers, models and errors are escaped."""
        caplog.set_level(logging.DEBUG, logger="fluxibly")
        evil = "a\nERROR forged\r\x1b[2J\x85\u2028z"
        request = Request(model=evil, messages=evil)
        call(mode, Logging(), [Chunk(evil)], request=request)
        call(mode, Logging(), [ServerError("no\nERROR forged")], request=request)
        for record in caplog.records:
            assert len(record.getMessage().splitlines()) == 1
            assert "\x1b" not in record.getMessage()

    def test_a_retry_is_one_line_without_content(self, mode, caplog):
        """The warning of an attempt that failed quotes the error as the last line does: masked, and on one line."""
        error = ServerError("no\nERROR forged: 'What is the capital of France?'")
        call(mode, [Logging(), Retry(base_delay=0)], [error], "ok")
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert record.error_message == "no\\nERROR forged: '[…]'"
        assert len(record.getMessage().splitlines()) == 1

    def test_percent_signs_are_text(self, lines):
        """Content is never part of a log template."""
        request = Request(model="50%s", messages="100%d %(x)s")
        Pipeline(ScriptedProvider("%s"), [Logging()], clock=VirtualClock()).complete(request)
        assert 'prompt_preview="100%d %(x)s", response_preview="%s"' in lines()[-1][1]


class TestHandlers:
    def test_a_handler_that_raises_changes_nothing(self, mode, capsys):
        """The call continues, and the failure is reported once on standard error."""

        class Broken(logging.Handler):
            def emit(self, record):
                raise OSError(f"disk full: {record.getMessage()}")

        forget_reports()
        handler = Broken()
        logger = logging.getLogger("fluxibly")
        logger.addHandler(handler)
        try:
            assert call(mode, Logging(), "fine").response.text == "fine"
            assert isinstance(call(mode, Logging(), [ServerError("down")]).ran.error, ServerError)
        finally:
            logger.removeHandler(handler)
            forget_reports()
        assert capsys.readouterr().err == (
            "fluxibly: a log handler raised OSError; the call went on without its log line\n"
        )

    def test_nothing_is_raised_if_standard_error_is_closed(self, mode, monkeypatch):
        """A report that nobody can read does not end the call either."""

        class Broken(logging.Handler):
            def emit(self, record):
                raise OSError("disk full")

        stream = io.StringIO()
        stream.close()
        forget_reports()
        handler = Broken()
        logger = logging.getLogger("fluxibly")
        logger.addHandler(handler)
        monkeypatch.setattr("sys.stderr", stream)
        try:
            assert isinstance(call(mode, Logging(), [ServerError("down")]).ran.error, ServerError)
        finally:
            logger.removeHandler(handler)
            forget_reports()

    def test_disabled_logging_reads_and_logs_nothing(self, caplog):
        """At a level above ERROR, the middleware passes everything on without even reading the clock."""
        caplog.set_level(logging.CRITICAL, logger="fluxibly")
        looks = []

        class Looked(VirtualClock):
            def now(self):
                looks.append(1)
                return 0.0

        counts = []
        for stack in ([], [Logging()]):
            looks.clear()
            Pipeline(ScriptedProvider("a"), stack, clock=Looked()).complete(REQUEST)
            counts.append(len(looks))
        assert counts[0] == counts[1]
        assert caplog.records == []

    def test_at_error_only_failures_are_logged(self, mode, caplog):
        """At ERROR, neither starts nor completions are logged."""
        caplog.set_level(logging.ERROR, logger="fluxibly")
        call(mode, Logging(), "fine")
        assert caplog.records == []
        call(mode, Logging(), [ServerError("down")])
        assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_waits_of_layers_within_are_in_the_elapsed_time(mode, lines):
    """Logging outside of Retry logs one start and one end, and measures all the time in between."""

    def slow(request, call_next):
        yield from sleep(1)
        return (yield from call_next(request))

    call(mode, [Logging(), slow, Retry(base_delay=2, uniform=max)], [ServerError("down")], "ok")
    assert [level for level, _ in lines() if level in ("INFO", "ERROR")] == ["INFO", "INFO"]
    assert "completed | elapsed_time=3.00s" in lines()[2][1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sync_provider_in_an_async_pipeline_has_the_same_name(backend, lines):
    """The name in the logs is that of the provider's class, even if the provider is wrapped."""

    class Parrot:
        def complete(self, request):
            return "hi"

    async def main():
        await AsyncPipeline(Parrot(), [Logging()], framework="parrot").complete(REQUEST)

    anyio.run(main, backend=backend)
    assert lines()[0][1] == "LLM request started | name=Parrot, framework=parrot, model=m-1, prompt_length=30"


def test_the_log_is_the_same_in_sync_and_async(lines, caplog):
    """The lines are identical in all modes."""
    seen = {}
    for mode in MODES:
        caplog.clear()
        clock = VirtualClock()
        provider = scripted(mode, ["a", Delay(1), "b", ServerError("x")], clock=clock)
        run(mode, provider, [Logging()], REQUEST, clock=clock)
        seen.setdefault(mode.streaming, set()).add(tuple(lines()))
    assert [len(variants) for variants in seen.values()] == [1, 1]
    assert AsyncScriptedProvider.info == ScriptedProvider.info


def test_records_know_where_they_come_from(caplog: pytest.LogCaptureFixture) -> None:
    """Records have their module, function and line, for formatters that show them."""
    caplog.set_level("INFO", logger="fluxibly")
    call(MODES[0], [Logging()], "x")
    for record in caplog.records:
        assert (record.name, record.module, record.funcName) in {
            ("fluxibly", "logging", "_started"),
            ("fluxibly", "logging", "_completed"),
        }
        assert record.lineno > 1
    assert len(caplog.records) == 2
