"""Batches: what is asked, what is written, and what stops a run."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support.batches import CountedModel, Files
from support.counting_server import counting_server
from support.limited_server import limited_server

from fluxibly import LLM, AsyncLLM
from fluxibly.batch import Batch, _patience, _stack
from fluxibly.batch._finish import Output
from fluxibly.batch._patience import Patience
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    NotFound,
    PermissionDenied,
    ProviderError,
    RateLimitError,
    ServerError,
)
from fluxibly.flow import CallNext, Flow, perform, sleep
from fluxibly.middleware import (
    Budget,
    Cache,
    CircuitBreaker,
    Concurrency,
    Cost,
    Deadline,
    Defaults,
    RateLimit,
    Retry,
    Validation,
)
from fluxibly.providers.http import _sockets
from fluxibly.types import Request, Response

PRICES = {"m": (1.0, 2.0)}
"""A row of 10 + 5 tokens costs 20 millionths of a dollar."""
ROW = 20e-6


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def model() -> CountedModel:
    return CountedModel()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wait for milliseconds, and a service may be out for less than a second."""
    monkeypatch.setattr(_patience, "_SHORTEST", 0.001)
    monkeypatch.setattr(_patience, "_LONGEST", 0.01)
    monkeypatch.setattr(_patience, "AT_MOST", 0.3)
    monkeypatch.setattr(_patience, "AT_FIRST", 0.3)
    monkeypatch.setattr(_patience, "_FAILING_FOR", 0.1)


def prompts(count: int) -> list[str]:
    return [f"row {number}" for number in range(count)]


# What is asked


def test_each_row_has_one_line_and_a_second_run_asks_nothing(files: Files, model: CountedModel) -> None:
    files.write(prompts(50))
    report = files.batch(model.llm()).run()
    assert (report.answered, report.failed, report.asked, report.skipped) == (50, 0, 50, 0)
    assert (report.input_tokens, report.output_tokens, report.in_flight) == (500, 250, 0)
    assert report.stopped is None
    assert [(line["row"], line["text"]) for line in files.lines()] == [(n, f"re: row {n}") for n in range(50)]
    report = files.batch(model.llm()).run()
    assert (report.answered, report.asked, report.skipped) == (50, 0, 50)
    assert model.calls == 50


def test_no_more_rows_are_asked_at_once_than_it_is_told(files: Files) -> None:
    model = CountedModel(delay=0.005)
    files.write(prompts(60))
    files.batch(model.llm(), concurrency=7).run()
    assert model.most_at_once == 7


def test_beside_a_model_that_never_waits_others_have_a_turn(files: Files) -> None:
    files.write(prompts(5000))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(others)
            assert (await files.batch(AsyncLLM("echo:m", []), concurrency=1).arun()).answered == 5000
            tasks.cancel_scope.cancel()

    asyncio.run(both())
    assert turns >= 15


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_run_works_where_a_loop_runs_and_closes_a_model_of_its_own(kind: type[LLM | AsyncLLM], files: Files) -> None:
    with counting_server() as server:
        files.write(prompts(5))
        llm: Any = kind("openai:m", api_base=server.url, api_key="k")
        batch = Batch(llm, files.prompts, files.answers, concurrency=2)

        async def notebook() -> None:
            assert batch.run().answered == 5

        asyncio.run(notebook())
        assert server.requests == 5
        assert not llm.pipeline.closed


async def test_on_both_loops(anyio_backend: str, files: Files, model: CountedModel) -> None:
    files.write(prompts(20))
    report = await files.batch(model.llm()).arun()
    assert report.answered == 20
    assert files.rows() == [*range(20)]


async def test_a_synchronous_model_is_asked_on_both_loops(anyio_backend: str, files: Files) -> None:
    files.write(prompts(20))
    assert (await files.batch(LLM("echo:m")).arun()).answered == 20


def test_limit_counts_rows_from_the_first(files: Files, model: CountedModel) -> None:
    files.write(prompts(20))
    assert files.batch(model.llm(), limit=5).run().stopped is None
    assert files.rows() == [0, 1, 2, 3, 4]
    files.batch(model.llm(), limit=5).run()
    assert model.calls == 5
    files.batch(model.llm(), limit=8).run()
    assert files.rows() == [*range(8)]
    files.batch(model.llm(), limit=0).run()
    files.batch(model.llm()).run()
    assert files.rows() == [*range(20)]
    assert model.calls == 20


def test_rows_that_cannot_be_asked_become_errors_without_a_call(files: Files, model: CountedModel) -> None:
    files.write(["a", {"question": "no prompt"}, {"prompt": "b", "max_tokens": -1}, "c"])
    report = files.batch(model.llm()).run()
    assert (report.answered, report.failed, report.asked) == (2, 2, 2)
    assert [line["error"] and line["error"]["type"] for line in files.lines()] == [
        None,
        "BadPrompt",
        "ConfigError",
        None,
    ]
    assert model.calls == 2


def test_settings_of_a_row_are_sent_and_are_part_of_its_key(files: Files, model: CountedModel) -> None:
    files.write([{"prompt": "a", "max_tokens": 7}, {"prompt": "a"}, {"prompt": "a", "max_tokens": 7}])
    files.batch(model.llm(temperature=0.5)).run()
    assert sorted(str(request.max_tokens) for request in model.requests) == ["7", "7", "None"]
    keys = [line["key"] for line in files.lines()]
    assert keys[0] == keys[2] != keys[1]


def test_the_same_file_for_prompts_and_answers_is_refused(files: Files, model: CountedModel) -> None:
    files.write(prompts(1))
    before = files.prompts.read_bytes()
    (files.folder / "link").symlink_to(files.prompts)
    for answers in (files.prompts, files.folder / "link"):
        with pytest.raises(ConfigError, match="another file"):
            Batch(model.llm(), files.prompts, answers).run()
    assert files.prompts.read_bytes() == before


def test_the_prompts_are_not_overwritten_by_what_is_made_at_the_end(files: Files, model: CountedModel) -> None:
    files.write(prompts(1))
    Batch(model.llm(), files.prompts, Output(files.answers, ordered=True)).run()
    files.prompts.write_text('{"row":1,"prompt":"with a field like that of an answer"}\n')
    before = files.prompts.read_bytes()
    with pytest.raises(ConfigError, match="another file"):
        Batch(model.llm(), files.prompts, Output(files.answers, ordered=True, errors=files.prompts)).run()
    assert files.prompts.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"llm": "echo:echo"}, "expected an LLM or an AsyncLLM, got a str"),
        ({"prompts": ["a", "b"]}, "got a list; for prompts in memory, write llm.map"),
        ({"prompts": None}, "prompts: expected a file, or a source .*, got None"),
    ],
)
def test_arguments_of_wrong_types(arguments: dict[str, Any], said: str, files: Files, model: CountedModel) -> None:
    files.write(prompts(1))
    given: dict[str, Any] = {"llm": model.llm(), "prompts": files.prompts, "answers": files.answers}
    with pytest.raises(TypeError, match=said):
        Batch(**{**given, **arguments})


WORDS = "the patient's name is Aurelia"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": WORDS, "content": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": WORDS}]}]},
        {"prompt": "x", "temperature": WORDS},
        {"prompt": "x", "response_format": WORDS},
        {"body": {"messages": [{"role": WORDS, "content": "user"}]}},
        {"body": {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": WORDS}]}},
    ],
)
def test_why_a_row_cannot_be_asked_does_not_quote_it(row: dict[str, Any], files: Files, model: CountedModel) -> None:
    files.write([row])
    assert files.batch(model.llm()).run().failed == 1
    message = files.lines()[0]["error"]["message"]
    assert "expected" in message
    assert not any(word in message for word in ("patient", "Aurelia"))


def test_settings_out_of_range_are_refused_all_at_once(files: Files, model: CountedModel) -> None:
    files.write(prompts(1))
    with pytest.raises(ConfigError) as raised:
        files.batch(model.llm(), concurrency=0, limit=-1, budget=0, stop_after_errors=-1, changed="yes", rpm=0)
    assert len(raised.value.problems) == 6
    assert not files.answers.exists()


def test_an_answer_with_anything_in_it_becomes_a_line(files: Files) -> None:
    strange = ["\u2028\x85\n\r\x00", "\ud800 half", "é" * 3, '"}\n{"row":0}']
    model = CountedModel(lambda prompt: strange[int(prompt)])
    files.write([*map(str, range(len(strange)))])
    files.batch(model.llm()).run()
    assert files.answers.read_bytes().count(b"\n") == len(strange)
    files.batch(model.llm()).run()
    assert model.calls == len(strange)


# Errors


def test_errors_are_lines_and_harm_no_other_row(files: Files) -> None:
    model = CountedModel(lambda prompt: BadRequest("no", status=400) if prompt.endswith("3") else "yes")
    files.write(prompts(20))
    report = files.batch(model.llm()).run()
    assert (report.answered, report.failed, report.errors) == (18, 2, {"BadRequest": 2})
    assert [line["row"] for line in files.lines() if line["error"]] == [3, 13]
    assert files.batch(model.llm()).run().asked == 0


def test_retry_errors_asks_again_only_what_failed_and_leaves_one_line_a_row(files: Files) -> None:
    is_better = False
    model = CountedModel(
        lambda prompt: BadRequest("no") if prompt in ("row 3", "row 7") and not (is_better and "3" in prompt) else "yes"
    )
    files.write(prompts(10))
    files.batch(model.llm()).run()
    is_better = True
    report = files.batch(model.llm(), retry_errors=True).run()
    assert (report.answered, report.failed, report.asked, report.skipped) == (9, 1, 2, 8)
    assert files.rows() == [*range(10)]
    assert [line["row"] for line in files.lines() if line["error"]] == [7]
    assert model.calls == 12
    assert model.asked["row 3"] == model.asked["row 7"] == 2


def test_a_retry_of_errors_that_is_stopped_is_put_in_order_by_the_next_run(files: Files) -> None:
    model = CountedModel(lambda prompt: BadRequest("no"), delay=0.001)
    files.write(prompts(10))
    files.batch(model.llm(), stop_after_errors=0).run()
    batch = files.batch(model.llm(), retry_errors=True, concurrency=1)
    model.reply = lambda prompt: (batch.stop(), "yes")[1]
    report = batch.run()
    assert report.stopped is not None
    assert len(files.answers.read_bytes().splitlines()) == 11
    report = files.batch(model.llm()).run()
    assert (report.asked, report.answered, report.failed) == (0, 1, 9)
    assert files.rows() == [*range(10)]


def test_the_first_rows_that_all_fail_alike_stop_the_run_and_are_asked_again(files: Files) -> None:
    model = CountedModel(lambda prompt: AuthenticationError("the key sk-1 is wrong", status=401))
    files.write(prompts(200))
    report = files.batch(model.llm(), concurrency=3).run()
    count = report.errors["AuthenticationError"]  # those that were in flight when it stopped included
    assert report.stopped == f"the first {count} rows all failed alike: AuthenticationError (401)"
    assert count == model.calls
    assert report.first_errors == {"AuthenticationError": "the key sk-1 is wrong"}
    assert 20 <= model.calls <= 22
    assert files.answers.read_bytes() == b""
    assert (report.answered, report.failed) == (0, 0)
    model.reply = lambda prompt: "yes"
    report = files.batch(model.llm(), concurrency=3).run()
    assert (report.stopped, report.answered) == (None, 200)


@pytest.mark.parametrize(
    "reply",
    [
        lambda prompt: BadRequest("no", status=400) if prompt != "row 19" else "yes",
        lambda prompt: BadRequest("no", status=400) if prompt != "row 5" else NotFound("no", status=404),
        lambda prompt: BadRequest("no", status=400) if prompt != "row 5" else BadRequest("no", status=422),
        lambda prompt: BadRequest("no", status=400) if prompt != "row 5" else TypeError("no"),
    ],
)
def test_rows_that_do_not_all_fail_alike_stop_nothing(reply: Callable[[str], Any], files: Files) -> None:
    files.write(prompts(60))
    report = files.batch(CountedModel(reply).llm(), concurrency=1).run()
    assert (report.stopped, report.answered + report.failed) == (None, 60)
    assert files.rows() == [*range(60)]


def test_a_whole_batch_of_fewer_rows_may_fail(files: Files) -> None:
    model = CountedModel(lambda prompt: BadRequest("no"))
    files.write(prompts(19))
    report = files.batch(model.llm()).run()
    assert (report.stopped, report.failed) == (None, 19)
    assert files.rows() == [*range(19)]


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("no", status=401),
        PermissionDenied("no", status=403),
        NotFound("no", status=404),
        ConnectionFailed("no server listens", retryable=False),
    ],
)
def test_a_whole_batch_of_fewer_rows_that_fails_by_the_service_has_no_lines(error: Exception, files: Files) -> None:
    model = CountedModel(lambda prompt: error)
    files.write(prompts(7))
    report = files.batch(model.llm()).run()
    status = f" ({error.status})" if isinstance(error, ProviderError) and error.status else ""
    assert report.stopped == f"all 7 rows failed alike: {type(error).__name__}{status}"
    assert (report.answered, report.failed) == (0, 0)
    assert files.rows() == []
    model.reply = lambda prompt: "yes"
    report = files.batch(model.llm()).run()
    assert (report.stopped, report.answered, report.failed) == (None, 7, 0)


def test_rows_that_all_fail_stop_nothing_once_an_earlier_run_was_answered(files: Files) -> None:
    model = CountedModel(lambda prompt: "yes" if prompt == "row 0" else BadRequest("no", status=400))
    files.write(prompts(60))
    files.batch(model.llm(), limit=1).run()
    report = files.batch(model.llm()).run()
    assert (report.stopped, report.answered, report.failed) == (None, 1, 59)
    report = files.batch(model.llm(), retry_errors=True).run()
    assert (report.stopped, report.asked, report.failed) == (None, 59, 59)
    # Of other settings, nothing was answered.
    report = files.batch(model.llm(temperature=2.0), retry_errors=True, changed="keep").run()
    assert re.fullmatch(r"the first \d\d rows all failed alike: BadRequest \(400\)", str(report.stopped))


def test_rows_that_all_lack_a_prompt_stop_the_run_too(files: Files, model: CountedModel) -> None:
    files.write(["a"] + [{"question": str(number)} for number in range(100)])
    report = files.batch(model.llm(), concurrency=1, limit=40).run()
    assert (report.stopped, report.failed) == (None, 39)  # the first was answered
    files.answers.unlink()
    files.write([{"prompt": {}} for number in range(100)])
    report = files.batch(model.llm(), concurrency=1).run()
    assert report.stopped is not None
    assert report.stopped.startswith("the first 20 rows all failed alike")


def test_stop_after_errors_may_be_another_number_or_never(files: Files) -> None:
    model = CountedModel(lambda prompt: BadRequest("no"))
    files.write(prompts(30))
    report = files.batch(model.llm(), concurrency=1, stop_after_errors=1).run()
    assert model.calls == 1
    assert report.stopped == "the first 1 rows all failed alike: BadRequest"
    assert files.batch(model.llm(), stop_after_errors=0).run().failed == 30


def test_an_answer_that_comes_after_the_stop_is_written(files: Files) -> None:
    """It was in flight when the others had failed."""

    class Slow(CountedModel):
        async def complete(self, request: Request) -> Response:
            if request.messages[-1].text != "row 0":
                return await super().complete(request)
            while batch.report.stopped is None:  # noqa: ASYNC110  # the report has no events
                await anyio.sleep(0.005)
            return Response("late")

    model = Slow(lambda prompt: BadRequest("no"))
    files.write(prompts(100))
    batch = files.batch(model.llm(), concurrency=2)
    report = batch.run()
    assert report.stopped is not None
    assert [(line["row"], line["text"]) for line in files.lines()] == [(0, "late")]


class Fatal(BaseException):
    """No error of a row."""


async def test_what_is_no_error_of_a_row_ends_the_run_and_what_came_before_is_written(
    anyio_backend: str, files: Files
) -> None:
    model = CountedModel(lambda prompt: Fatal() if prompt == "row 10" else "yes")
    files.write(prompts(30))
    with pytest.raises(Fatal):
        await files.batch(model.llm(), concurrency=1).arun()
    assert files.rows() == [*range(10)]
    model.reply = lambda prompt: "yes"
    assert (await files.batch(model.llm()).arun()).answered == 30
    assert model.asked["row 10"] == 2
    assert model.calls == 31


def test_ctrl_c_ends_a_run_and_what_has_ended_is_written(files: Files) -> None:
    def reply(prompt: str) -> str:
        if prompt == "row 5":
            signal.raise_signal(signal.SIGINT)
        return "yes"

    model = CountedModel(reply, delay=0.001)
    files.write(prompts(30))
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for what runs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            files.batch(model.llm(), concurrency=1).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert files.rows()[:5] == [*range(5)]
    assert files.batch(model.llm()).run().answered == 30
    assert model.calls <= 31


async def test_an_error_of_the_input_is_raised_when_all_that_is_under_way_has_ended(
    anyio_backend: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CountedModel(delay=0.005)
    files.write(prompts(10))
    batch = files.batch(model.llm(), concurrency=3)
    real = batch.source.rows

    def rows(*args: Any) -> Iterator[Any]:
        for row in real(*args):  # type: ignore[union-attr]
            if row.number == 6:
                raise OSError(errno.EIO, "the disk broke")
            yield row

    monkeypatch.setattr(batch.source, "rows", rows)
    with pytest.raises(OSError, match="the disk broke"):
        await batch.arun()
    assert files.rows() == [*range(6)]


# Stopping


async def test_stop_begins_no_more_rows_and_lets_those_in_flight_end(anyio_backend: str, files: Files) -> None:
    model = CountedModel(delay=0.05)
    files.write(prompts(50))
    batch = files.batch(model.llm(), concurrency=5)

    model.reply = lambda prompt: (threading.Thread(target=batch.stop).start(), "yes")[1] if prompt == "row 0" else "yes"
    report = await batch.arun()
    assert report.stopped == "on request"
    assert model.calls == report.answered == len(files.rows())
    assert 5 <= report.answered < 50
    report = await files.batch(model.llm()).arun()
    assert (report.stopped, report.answered) == (None, 50)
    assert model.calls == 50


async def test_stop_twice_cancels_what_is_in_flight(anyio_backend: str, files: Files) -> None:
    model = CountedModel()
    files.write(["quick", *["slow"] * 5])
    batch = files.batch(model.llm(), concurrency=3)

    class Slow(CountedModel):
        async def complete(self, request: Request) -> Response:
            if self.calls == 2:
                batch.stop()
                batch.stop()
            response = await super().complete(request)
            if response.text != "re: quick":
                await anyio.sleep_forever()
            return response

    model = Slow()
    batch = files.batch(model.llm(), concurrency=3)
    with anyio.fail_after(20):
        report = await batch.arun()
    assert report.stopped == "on request"
    assert files.rows() == [0]
    assert (report.answered, report.in_flight) == (1, 0)


def test_stop_before_the_run_asks_nothing_and_holds_for_one_run(files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    batch = files.batch(model.llm())
    batch.stop()
    assert batch.run().stopped == "on request"
    assert model.calls == 0
    assert batch.run().answered == 5


def stops_when(batch: Batch, is_time: Callable[[], bool]) -> None:
    """Stop a batch, from another thread, once something is true."""

    def run() -> None:
        while not is_time():
            time.sleep(0.005)
        batch.stop()

    threading.Thread(target=run, daemon=True).start()


def test_stop_drops_rows_that_only_wait_for_their_turn(files: Files) -> None:
    model = CountedModel(in_process=False)
    files.write(prompts(50))
    batch = files.batch(model.llm([RateLimit(requests=1, per=3600)]), concurrency=10)
    stops_when(batch, lambda: batch.report.answered == 1)
    report = batch.run()
    assert (report.answered, report.stopped) == (1, "on request")
    assert files.rows() == [0]


def test_stop_drops_rows_that_wait_for_a_retry(files: Files) -> None:
    model = CountedModel(lambda prompt: ServerError("no", retry_after=3600))
    files.write(prompts(5))
    batch = files.batch(model.llm([Retry(max_retry_after=10_000)]), concurrency=5)
    stops_when(batch, lambda: model.calls == 5)
    report = batch.run()
    assert (report.answered, report.failed, report.stopped) == (0, 0, "on request")
    assert files.rows() == []


def test_stop_drops_rows_that_fail_in_a_way_that_may_pass(files: Files) -> None:
    """They were in flight, and would wait: for a retry, or for the end of an outage."""
    batch: Batch

    def reply(prompt: str) -> Exception:
        while model.calls < 5:
            return ServerError("no", retry_after=0.0)
        batch.stop()
        return ServerError("no", retry_after=3600 if prompt == "row 0" else None)

    model = CountedModel(reply, delay=0.01)
    files.write(prompts(50))
    batch = files.batch(model.llm([Retry(max_retry_after=10_000, base_delay=0.001)]), concurrency=5)
    report = batch.run()
    assert (report.answered, report.failed, report.in_flight) == (0, 0, 0)
    assert report.stopped == "on request"
    assert model.calls < 20


@pytest.mark.usefixtures("quick")
def test_stop_ends_an_outage(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patience, "AT_MOST", 10_000.0)
    monkeypatch.setattr(_patience, "_LONGEST", 3600.0)
    monkeypatch.setattr(_patience, "_SHORTEST", 3600.0)
    model = CountedModel(lambda prompt: "yes" if model.calls <= 30 else ServerError("no", status=503), delay=0.001)
    files.write(prompts(200))
    batch = files.batch(model.llm(), concurrency=5)
    stops_when(batch, lambda: model.calls > 34 and not model.at_once and not batch.report.in_flight)
    report = batch.run()
    assert (report.failed, report.stopped) == (0, "on request")
    assert 0 < report.answered <= 30


def test_a_row_that_has_its_turn_in_the_moment_of_the_stop_is_not_sent(files: Files, model: CountedModel) -> None:
    turn = anyio.Event()

    def layer(request: Request, call_next: CallNext) -> Flow[Response]:
        if request.messages[-1].text == "row 1":
            yield from perform(lambda: None, turn.wait)
            return (yield from call_next(request))
        yield from sleep(0.05)
        turn.set()
        raise BadRequest("no")  # nothing comes between this and the stop

    files.write(prompts(2))
    report = files.batch(model.llm([layer]), concurrency=2, stop_after_errors=1).run()
    assert report.stopped == "the first 1 rows all failed alike: BadRequest"
    assert model.calls == 0
    assert files.rows() == []


def test_stop_lets_a_row_end_that_is_between_two_of_its_questions(files: Files) -> None:
    """Its first answer is paid already."""
    model = CountedModel(lambda prompt: "good" if model.calls > 1 else "bad")
    files.write(["a", "b"])
    batch: Batch

    def check(response: Response) -> str | None:
        return None if response.text == "good" else "it is bad"

    class StopsAfterFirst:
        def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
            response = yield from call_next(request)
            if model.calls == 1:
                batch.stop()
            yield from sleep(0.05)  # it hears of that
            return response

    llm = model.llm([Validation(check=check, max_retries=1), StopsAfterFirst()])
    batch = files.batch(llm, concurrency=1)
    report = batch.run()
    assert model.calls == 2
    assert [(line["row"], line["text"]) for line in files.lines()] == [(0, "good")]
    assert report.stopped is not None


async def test_a_cancelled_run_cancels_what_is_in_flight_and_leaves_whole_lines(
    anyio_backend: str, files: Files
) -> None:
    model = CountedModel(delay=0.02)
    files.write(prompts(100))
    batch = files.batch(model.llm(), concurrency=4)
    with anyio.move_on_after(0.2) as scope:
        await batch.arun()
    assert scope.cancelled_caught
    assert model.at_once == 0
    done = files.rows()
    assert 0 < len(done) < 100
    calls = model.calls
    report = await files.batch(model.llm(), concurrency=50).arun()
    assert report.answered == 100
    assert model.calls <= 100 + 4
    assert calls - len(done) <= 4


# Rates, outages


def test_what_a_service_needs_is_added_innermost(files: Files) -> None:
    from fluxibly.batch._stack import stack_for

    model = CountedModel(in_process=False)
    info = model.info

    def names(stack: Any, **settings: Any) -> list[str]:
        return [type(layer).__name__ for layer in stack_for(stack, info, "m", **{"adapts": False, **settings})[:-1]]

    assert names([Retry()]) == ["Retry", "RateLimit"]
    assert names([Retry()], adapts=True) == ["Retry", "RateLimit", "Concurrency"]
    assert names([RateLimit(), Retry()], adapts=True) == ["RateLimit", "Retry", "Concurrency"]
    assert names([Concurrency(3), Retry()], adapts=True) == ["Concurrency", "Retry", "RateLimit"]
    assert names([RateLimit()], requests=5.0) == ["RateLimit", "RateLimit"]
    assert names([Cost(prices=PRICES)], budget=1.0) == ["Cost", "Budget", "RateLimit"]
    limit = stack_for([], info, "m", adapts=False, requests=60, tokens=600)[0]
    assert isinstance(limit, RateLimit)
    assert (limit.requests, limit.tokens) == (60, 600)
    info = CountedModel(in_process=True).info
    assert names([Retry()], adapts=True) == ["Retry"]


def test_limits_are_those_that_were_met_and_no_more_than_the_batch_needs() -> None:
    from fluxibly.batch._stack import limits_in_force

    assert limits_in_force([RateLimit(), Concurrency("auto"), Retry()], 1000) == (None, None)
    assert limits_in_force([RateLimit(requests=60), Concurrency(50)], 1000) == (1.0, 50)
    assert limits_in_force([Concurrency(5000)], 1000) == (None, 1000)


@pytest.mark.parametrize("path", ["/v1", ""])
def test_no_row_fails_by_a_rate_limit_whose_headers_tell_it(path: str, files: Files) -> None:
    with limited_server(capacity=20, rate=600) as server:
        llm = LLM("openai:m" if path else "anthropic:m", api_base=server.url + path, api_key="k", max_tokens=5)
        files.write(prompts(300))
        report = Batch(llm, files.prompts, files.answers).run()
        assert (report.answered, report.failed) == (300, 0)
        assert len(server.answered) == 300
        assert (report.rate is not None) == bool(
            path
        )  # Anthropic's are in whole seconds, which say nothing of such a rate
        assert report.places is None or report.places <= 1000


def test_no_row_fails_by_a_rate_limit_of_which_nothing_is_told(files: Files) -> None:
    level, at = 0.0, time.monotonic()

    def reply(prompt: str) -> tuple[int, dict[str, str], float]:
        nonlocal level, at
        now = time.monotonic()
        level, at = max(0.0, level - 80 * (now - at)), now
        if level >= 4:
            return 429, {}, 0.0
        level += 1
        return 200, {}, 0.0

    with counting_server(reply) as server:
        files.write(prompts(250))
        llm = LLM("openai:m", [Retry(max_retries=1, base_delay=0.01)], api_base=server.url, api_key="k")
        report = files.batch(llm, concurrency=50).run()
        assert (report.answered, report.failed) == (250, 0)
        assert set(server.answered.values()) == {1}


@pytest.mark.usefixtures("quick")
def test_refusals_for_the_rate_are_waits_while_others_are_answered(files: Files) -> None:
    refused: dict[str, int] = {}

    def reply(prompt: str) -> str | Exception:
        if prompt == "row 0" and refused.setdefault(prompt, 0) < 12:
            refused[prompt] += 1
            return RateLimitError("slow down", status=429)
        return "yes"

    model = CountedModel(reply, delay=0.002)
    files.write(prompts(100))
    report = files.batch(model.llm([]), concurrency=2).run()
    assert (report.answered, report.failed) == (100, 0)
    assert model.asked["row 0"] == 13
    assert files.lines()[0]["attempts"] == 13


@pytest.mark.usefixtures("quick")
def test_a_row_that_is_refused_for_ever_while_others_are_answered_fails(files: Files) -> None:
    model = CountedModel(
        lambda prompt: RateLimitError("too large", status=429) if prompt == "row 0" else "yes", delay=0.002
    )
    files.write(prompts(300))
    report = files.batch(model.llm([]), concurrency=2).run()
    assert (report.answered, report.failed, report.stopped) == (299, 1, None)
    assert model.asked["row 0"] == 21


@pytest.mark.parametrize("kind", [ServerError, ConnectionFailed, RateLimitError])
@pytest.mark.usefixtures("quick")
async def test_no_row_fails_while_a_service_answers_nobody_for_a_while(
    kind: type[ServerError], anyio_backend: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patience, "AT_MOST", 60.0)
    out = False
    seen = 0

    def reply(prompt: str) -> str | Exception:
        nonlocal out, seen
        seen += out
        return kind("no", status=503) if out else "yes"

    model = CountedModel(reply, delay=0.002)
    files.write(prompts(400))
    batch = files.batch(model.llm(), concurrency=20)

    async def goes_out() -> None:
        nonlocal out
        while batch.report.answered < 60:  # noqa: ASYNC110  # the report has no events
            await anyio.sleep(0.005)
        out = True
        await anyio.sleep(0.5)
        out = False

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(goes_out)
        report = await batch.arun()
    assert (report.answered, report.failed, report.stopped) == (400, 0, None)
    # Once each row has been retried, one asks alone: every 10 ms at most here, 4 times with its retries.
    assert 20 < seen < 20 * 4 + 60 * 4


@pytest.mark.usefixtures("quick")
def test_a_service_that_answers_nobody_stops_the_run_with_few_failed_rows(files: Files) -> None:
    out = False

    def reply(prompt: str) -> str | Exception:
        return ServerError("no", status=503) if out and model.calls > 30 else "yes"

    model = CountedModel(reply, delay=0.001)
    out = True
    files.write(prompts(200))
    report = files.batch(model.llm(), concurrency=10).run()
    assert report.stopped == "the service answers nobody: ServerError (503)"
    assert report.failed == 0
    assert all(line["error"] is None for line in files.lines())
    out = False
    report = files.batch(model.llm()).run()
    assert (report.answered, report.failed, report.stopped) == (200, 0, None)


@pytest.mark.parametrize("concurrency", [1, 10])
@pytest.mark.parametrize("rows", [1, 2, 30])
@pytest.mark.usefixtures("quick")
def test_a_service_that_never_answers_stops_the_run_without_a_line(rows: int, concurrency: int, files: Files) -> None:
    model = CountedModel(lambda prompt: ServerError("no", status=503))
    files.write(prompts(rows))
    report = files.batch(model.llm([]), concurrency=concurrency).run()
    assert report.stopped == "the service answers nobody: ServerError (503)"
    assert (report.failed, files.rows()) == (0, [])


@pytest.mark.usefixtures("quick")
def test_the_last_row_has_a_line_if_the_service_always_breaks_at_it(files: Files) -> None:
    model = CountedModel(lambda prompt: ServerError("no", status=500) if prompt == "row 9" else "yes")
    files.write(prompts(10))
    report = files.batch(model.llm([]), concurrency=1).run()
    assert (report.answered, report.failed, report.stopped) == (9, 1, None)


@pytest.mark.usefixtures("quick")
def test_an_outage_begins_though_all_rows_wait_for_retries_in_the_queues_of_the_stack(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each retry waits behind the first attempts of all other rows, so it would take 400 attempts until a row has used up its own."""

    def lookup(*args: Any, **options: Any) -> Any:
        nonlocal lookups
        lookups += 1
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    lookups = 0
    monkeypatch.setattr(_sockets.socket, "getaddrinfo", lookup)
    files.write(prompts(400))
    llm = LLM("openai:m", [Retry(base_delay=0.05)], api_base="http://no-such-host.invalid/v1", api_key="k")
    report = Batch(llm, files.prompts, files.answers).run()
    assert report.stopped == "the service answers nobody: ConnectionFailed"
    assert (report.answered, report.failed, report.in_flight) == (0, 0, 0)
    assert (report.rate, report.places) == (None, None)
    assert 10 <= lookups < 400
    assert files.rows() == []


@pytest.mark.usefixtures("quick")
def test_rows_that_left_the_queues_at_an_outage_are_asked_after_it(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patience, "AT_FIRST", 60.0)
    out_until = time.monotonic() + 0.6
    model = CountedModel(
        lambda prompt: ServerError("no", status=503) if time.monotonic() < out_until else f"re: {prompt}",
        in_process=False,
    )
    files.write(prompts(100) + ["row 0"] * 20)
    report = files.batch(model.llm([Retry(max_retries=50, base_delay=0.02)]), concurrency=200, dedupe=True).run()
    assert (report.answered, report.failed, report.stopped) == (120, 0, None)
    assert [line["text"] for line in files.lines()] == [f"re: row {n}" for n in range(100)] + ["re: row 0"] * 20


@pytest.mark.usefixtures("quick")
def test_a_server_that_restarts_is_waited_for(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it does, this machine refuses connections, which no `Retry` tries again."""
    monkeypatch.setattr(_patience, "AT_MOST", 60.0)
    back_at = 0.0

    def reply(prompt: str) -> str | Exception:
        nonlocal back_at
        if model.calls > 100:
            back_at = back_at or time.monotonic() + 0.3
            if time.monotonic() < back_at:
                return ConnectionFailed("no server listens at 127.0.0.1:8000", retryable=False)
        return "yes"

    model = CountedModel(reply, delay=0.002)
    files.write(prompts(300))
    report = files.batch(model.llm(), concurrency=20).run()
    assert (report.answered, report.failed, report.stopped) == (300, 0, None)


@pytest.mark.usefixtures("quick")
def test_rows_that_wait_for_an_outage_do_not_wait_for_ever_where_none_are_left(files: Files) -> None:
    model = CountedModel(lambda prompt: ServerError("no", status=503))
    files.write(prompts(5))
    report = files.batch(model.llm(), concurrency=5).run()
    assert report.stopped == "the service answers nobody: ServerError (503)"
    assert report.failed <= 1
    model.reply = lambda prompt: "yes" if prompt != "row 0" else ServerError("no")
    report = files.batch(model.llm(), retry_errors=True).run()
    assert (report.answered, report.failed, report.stopped) == (4, 1, None)


@pytest.mark.usefixtures("quick")
def test_a_service_that_asks_for_a_long_wait_stops_the_run_at_once(files: Files) -> None:
    model = CountedModel(lambda prompt: RateLimitError("tomorrow", status=429, retry_after=86_400))
    files.write(prompts(200))
    report = files.batch(model.llm(), concurrency=10).run()
    assert report.stopped == "the service answers nobody: RateLimitError (429) (it asks to wait 86400 s)"
    assert (report.answered, report.failed) == (0, 0)


@pytest.mark.usefixtures("quick")
def test_a_row_at_which_the_service_always_breaks_harms_no_other(files: Files) -> None:
    model = CountedModel(lambda prompt: ServerError("no", status=500) if prompt == "row 3" else "yes")
    files.write(prompts(10))
    report = files.batch(model.llm(), concurrency=1).run()
    assert (report.answered, report.failed, report.stopped) == (9, 1, None)
    files.answers.unlink()
    report = files.batch(model.llm(), concurrency=5).run()
    assert (report.answered, report.failed, report.stopped) == (9, 1, None)


@pytest.mark.usefixtures("quick")
def test_what_was_never_sent_has_not_failed(files: Files) -> None:
    files.write(prompts(60))
    model = CountedModel(delay=0.01)
    layers = [RateLimit(requests=200, per=1, burst=5, max_wait=0.02), Concurrency(3, queue=2, max_wait=0.01)]
    report = files.batch(model.llm(layers), concurrency=30).run()
    assert (report.answered, report.failed) == (60, 0)
    assert model.calls == 60


@pytest.mark.usefixtures("quick")
def test_a_row_whose_time_is_up_before_it_is_sent_has_not_failed(files: Files) -> None:
    waited: set[str] = set()

    def queue(request: Request, call_next: CallNext) -> Flow[Response]:
        text = str(request.messages[-1].content[0])
        if text not in waited:
            waited.add(text)
            yield from sleep(3600)
        return (yield from call_next(request))

    files.write(prompts(10))
    model = CountedModel()
    report = files.batch(model.llm([Deadline(1.0), queue])).run()
    assert (report.answered, report.failed) == (10, 0)
    assert model.calls == 10


@pytest.mark.usefixtures("quick")
def test_rows_wait_for_an_open_circuit(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patience, "AT_MOST", 60.0)
    out = False
    model = CountedModel(lambda prompt: ServerError("no", status=503) if out else "yes", delay=0.001)
    files.write(prompts(300))
    layers = [Retry(max_retries=1, base_delay=0.001), CircuitBreaker(failures=3, open_for=0.1)]
    batch = files.batch(model.llm(layers), concurrency=10)

    def goes_out() -> None:
        nonlocal out
        while batch.report.answered < 50:
            time.sleep(0.002)
        out = True
        time.sleep(0.4)
        out = False

    thread = threading.Thread(target=goes_out)
    thread.start()
    report = batch.run()
    thread.join()
    assert (report.answered, report.failed, report.stopped) == (300, 0, None)


def test_all_rows_that_wait_go_on_once_the_service_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patience, "_SHORTEST", 0.01)
    patience = Patience(lambda asks: None)
    error = ServerError("no")
    again: list[int] = []

    async def row(number: int) -> None:
        assert await patience.again(number, error, 0.0, 0)
        again.append(number)

    async def all_rows() -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(row, number)
            await anyio.sleep(0.05)
            assert again == [0]  # it alone asks
            assert patience.is_out
            patience.heard()
        assert again == [0, 1, 2, 3, 4]
        assert not patience.is_out

    asyncio.run(all_rows())


# Money


def test_a_budget_stops_the_run_when_it_is_used_up_and_another_goes_on(files: Files) -> None:
    model = CountedModel(delay=0.001)
    files.write(prompts(100))
    llm = model.llm([Cost(prices=PRICES)])
    report = files.batch(llm, budget=40 * ROW, concurrency=10).run()
    assert report.stopped == "the budget is used up"
    assert report.cost is not None
    assert report.cost <= 40 * ROW * 1.0001
    assert 30 <= report.answered == len(files.rows()) == model.calls <= 40
    assert report.failed == 0
    while files.batch(llm, budget=40 * ROW, concurrency=10).run().stopped:
        pass
    assert files.rows() == [*range(100)]
    assert model.calls == 100


def test_a_budget_that_suffices_stops_nothing_though_the_first_estimates_are_high(files: Files) -> None:
    model = CountedModel(delay=0.001)
    files.write(prompts(60))
    report = files.batch(model.llm([Cost(prices=PRICES)]), budget=70 * ROW, concurrency=30).run()
    assert (report.stopped, report.answered) == (None, 60)
    assert report.cost == pytest.approx(60 * ROW)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_budget_below_one_row_says_that_it_is_too_small(files: Files, *, is_own: bool) -> None:
    model = CountedModel()
    files.write(prompts(5))
    layers = [Cost(prices=PRICES)] if is_own else [Budget(cost=ROW / 100, prices=PRICES)]
    for _ in range(2):
        report = files.batch(model.llm(layers), budget=ROW / 100 if is_own else None).run()
        assert report.stopped is not None
        assert report.stopped.startswith("a single row may cost more than the whole budget: Budget (cost=")
        assert "it needs about $" in report.stopped
        assert report.is_stuck
    assert (model.calls, files.rows()) == (0, [])


def test_a_budget_that_is_used_up_by_others_is_no_reason_to_raise_it(files: Files) -> None:
    model = CountedModel()
    files.write(prompts(50))
    report = files.batch(model.llm([Budget(tokens=15 * 20)]), concurrency=1).run()
    assert (report.stopped, report.is_stuck) == ("the budget is used up", False)


def test_a_budget_without_a_price_says_where_to_give_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stack, "_has_prices", lambda: False)
    files.write(prompts(1))
    with pytest.raises(ConfigError, match=r"Cost\(prices=\{'m': .*cost: \{prices: \{'m': .*pip install"):
        files.batch(CountedModel(in_process=False).llm(), budget=1.0).run()


def test_a_budget_of_the_stack_stops_the_run_too(files: Files) -> None:
    model = CountedModel()
    files.write(prompts(50))
    report = files.batch(model.llm([Budget(tokens=15 * 20)]), concurrency=1).run()
    assert report.stopped == "the budget is used up"
    assert report.failed == 0
    files.answers.unlink()
    report = files.batch(model.llm([Budget(tokens=0.5, scope="call")]), concurrency=1, stop_after_errors=0).run()
    assert (report.failed, report.stopped) == (50, None)


def test_a_budget_needs_a_price(files: Files) -> None:
    model = CountedModel()
    files.write(prompts(5))
    with pytest.raises(ConfigError, match="expected a known price of 'm', found none"):
        files.batch(model.llm(), budget=1.0).run()
    assert model.calls == 0


# Equal rows


def test_equal_rows_are_asked_once(files: Files) -> None:
    model = CountedModel(delay=0.002)
    files.write([{"prompt": f"p {number % 5}", "custom_id": str(number)} for number in range(100)])
    report = files.batch(model.llm([Cost(prices=PRICES)]), dedupe=True).run()
    assert (report.answered, report.asked) == (100, 5)
    assert set(model.asked.values()) == {1}
    lines = files.lines()
    assert [(line["custom_id"], line["text"]) for line in lines] == [(str(n), f"re: p {n % 5}") for n in range(100)]
    copies = [line for line in lines if not line["attempts"]]
    assert len(copies) == 95
    assert {(line["cost"], line["usage"], line["elapsed"]) for line in copies} == {(0.0, None, 0.0)}
    assert report.cost == pytest.approx(5 * ROW)
    assert report.input_tokens == 50


def test_copies_do_not_make_an_unknown_cost_known(files: Files, model: CountedModel) -> None:
    files.write(["p"] * 5)
    report = files.batch(model.llm(), dedupe=True).run()
    assert (report.answered, report.asked, report.cost) == (5, 1, None)


def test_equal_rows_are_asked_once_over_several_runs(files: Files, model: CountedModel) -> None:
    files.write([f"p {number % 50}" for number in range(100)])
    files.batch(model.llm(), dedupe=True, limit=60).run()
    files.batch(model.llm(), dedupe=True).run()
    assert set(model.asked.values()) == {1}
    assert files.rows() == [*range(100)]


def test_a_failure_serves_no_other_row(files: Files) -> None:
    model = CountedModel(lambda prompt: BadRequest("no") if model.asked[prompt] < 3 else "yes", delay=0.002)
    files.write(["p"] * 10)
    report = files.batch(model.llm(), dedupe=True, concurrency=4).run()
    assert (report.failed, report.answered) == (2, 8)
    assert model.calls == 3
    assert model.most_at_once == 1


def test_dedupe_beside_a_line_with_a_key_of_others(files: Files, model: CountedModel) -> None:
    files.write(prompts(2))
    files.answers.write_text('{"row":0,"key":"no hash","text":"x"}\n')
    assert files.batch(model.llm(), dedupe=True, changed="keep").run().answered == 2
    assert model.calls == 1


def test_without_dedupe_equal_rows_are_asked_each(files: Files, model: CountedModel) -> None:
    files.write(["p"] * 10)
    files.batch(model.llm()).run()
    assert model.calls == 10


def test_an_answer_from_a_cache_costs_nothing(files: Files, model: CountedModel) -> None:
    files.write(["p"] * 10)
    report = files.batch(model.llm([Cost(prices=PRICES), Cache()]), concurrency=1).run()
    assert model.calls == 1
    assert (report.answered, report.asked, report.input_tokens) == (10, 1, 10)
    assert report.cost == pytest.approx(ROW)


# What has changed since


def test_rows_that_are_added_are_no_change(files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    files.batch(model.llm()).run()
    files.write(prompts(9))
    assert files.batch(model.llm()).run().answered == 9
    assert model.calls == 9


def test_a_file_that_was_only_touched_is_no_change(files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    files.batch(model.llm()).run()
    os.utime(files.prompts, ns=(1, 1))
    assert files.batch(model.llm()).run().asked == 0


def test_done_rows_of_an_unchanged_input_are_not_looked_at(
    files: Files, model: CountedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(prompts(50))
    files.batch(model.llm(), limit=40).run()
    made: list[str] = []
    real = AsyncLLM.request

    def request(self: AsyncLLM, prompt: Any, overrides: Any) -> Request:
        made.append(prompt)
        return real(self, prompt, overrides)

    monkeypatch.setattr(AsyncLLM, "request", request)
    files.batch(model.llm()).run()
    assert [prompt for prompt in made if prompt != "-"] == prompts(50)[40:]


CHANGES: dict[str, Callable[[Files, CountedModel], AsyncLLM]] = {
    "a prompt": lambda files, model: (files.write(["other", *prompts(5)[1:]]), model.llm())[1],
    "the model": lambda files, model: AsyncLLM(
        model.llm().config.__class__(framework="counted", model="other"), [Retry()]
    ),
    "a setting": lambda files, model: model.llm(temperature=0.1),
    "a default": lambda files, model: model.llm([Defaults(max_tokens=5)]),
    "a row less": lambda files, model: (files.write(prompts(4)), model.llm())[1],
    "a row before": lambda files, model: (files.write(["new", *prompts(5)]), model.llm())[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_be_asked_otherwise_now_is_an_error_or_kept_or_asked_again(
    change: str, files: Files, model: CountedModel
) -> None:
    files.write(prompts(5))
    files.batch(model.llm()).run()
    before = files.answers.read_bytes()
    llm = CHANGES[change](files, model)
    for _ in range(2):
        with pytest.raises(ConfigError, match="rows that are done would be asked differently now"):
            files.batch(llm).run()
    assert files.answers.read_bytes() == before
    assert model.calls == 5
    count = len(files.prompts.read_text().splitlines())
    report = files.batch(llm, changed="keep").run()
    assert files.answers.read_bytes().startswith(before)
    assert model.calls == 5 + max(0, count - 5)
    files.batch(llm).run()  # once is enough
    assert model.calls == 5 + max(0, count - 5)
    del report


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_asked_again_and_nothing_else(change: str, files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    files.batch(model.llm()).run()
    llm = CHANGES[change](files, model)
    report = files.batch(llm, changed="ask").run()
    count = len(files.prompts.read_text().splitlines())
    differ = {"a prompt": 1, "a row less": 0, "a row before": 6}.get(change, 5)
    assert model.calls == 5 + differ
    assert report.asked == differ
    assert files.rows() == [*range(count)]
    assert [line["text"] for line in files.lines()] == [
        f"re: {json.loads(line)['prompt']}" for line in files.prompts.read_text().splitlines()
    ]
    state = json.loads((files.folder / "answers.jsonl.batch").read_bytes())
    assert state["settings"]  # so that later runs need not look at each row
    assert files.batch(llm).run().asked == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("a prompt", "because the input has changed; write changed='keep'"),
        ("a setting", "because the configuration (the model, its parameters or the system prompt) has changed; write"),
    ],
)
def test_the_error_says_what_has_changed(change: str, says: str, files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    files.batch(model.llm()).run()
    with pytest.raises(ConfigError, match=re.escape(says)):
        files.batch(CHANGES[change](files, model)).run()


def test_rows_that_cannot_be_asked_are_counted_and_name_their_line(files: Files, model: CountedModel) -> None:
    files.write(["a", {"messages": []}, {"question": 1}, {"prompt": "x", "temperature": 9}])
    report = files.batch(model.llm()).run()
    assert (report.failed, report.unaskable) == (3, 3)
    for line in files.lines()[1:]:
        assert line["error"]["message"].startswith(f"line {line['row'] + 1}: ")
        assert line["error"]["message"].count("line ") == 1
    files.write(["a", "b", {"question": 1}, "c"])
    model.reply = lambda prompt: BadRequest("no")
    report = files.batch(model.llm(), retry_errors=True).run()
    assert (report.failed, report.unaskable) == (3, 1)
    assert files.batch(model.llm()).run().unaskable == 1


def test_a_model_or_prompts_of_another_kind(files: Files, model: CountedModel) -> None:
    files.write(["a"])
    with pytest.raises(TypeError, match=r"llm: expected an LLM or an AsyncLLM, got a str; write LLM\('openai:m'\)"):
        files.batch("openai:m")
    with pytest.raises(TypeError, match=r"prompts: expected a file.*got a list; .*llm\.map"):
        Batch(model.llm(), ["a"], files.answers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_what_only_says_how_it_is_sent_is_no_change(files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    files.batch(model.llm()).run()
    llm = model.llm([Retry(max_retries=9), RateLimit(requests=1e6)], timeout=9.0)
    assert files.batch(llm, rpm=1e5, concurrency=3).run().asked == 0


def test_what_was_to_be_asked_again_when_a_run_was_stopped_is_not_forgotten(files: Files, model: CountedModel) -> None:
    files.write(prompts(6))
    files.batch(model.llm()).run()
    changed = model.llm(temperature=0.1)
    batch = files.batch(changed, changed="ask", concurrency=1)
    model.reply = lambda prompt: (batch.stop(), "new")[1]
    assert batch.run().stopped is not None
    assert model.calls == 7
    with pytest.raises(ConfigError, match="5 of the 6 rows"):
        files.batch(changed).run()
    with pytest.raises(
        ConfigError, match="1 of the 6 rows"
    ):  # back to what it was: the new answer is of something else
        files.batch(model.llm()).run()
    assert files.batch(changed, changed="ask").run().asked == 5
    assert model.calls == 12
    assert files.rows() == [*range(6)]


def test_without_its_state_a_batch_is_checked_row_by_row(files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    files.batch(model.llm()).run()
    state = files.folder / "answers.jsonl.batch"
    for text in (None, "", "{}", "[1]"):
        state.unlink()
        if text is not None:
            state.write_text(text)
        assert files.batch(model.llm()).run().asked == 0
        files.batch(model.llm(temperature=1.0))
        with pytest.raises(ConfigError, match="asked differently"):
            files.batch(model.llm(temperature=1.0)).run()
    assert model.calls == 5


def test_a_row_that_was_broken_and_is_mended_is_a_change_unless_errors_are_asked_again(
    files: Files, model: CountedModel
) -> None:
    files.write(["a", {"question": 1}])
    files.batch(model.llm()).run()
    files.write(["a", "b"])
    with pytest.raises(ConfigError, match="1 of the 2 rows"):
        files.batch(model.llm()).run()
    report = files.batch(model.llm(), retry_errors=True).run()
    assert (report.answered, report.failed) == (2, 0)
    assert model.calls == 2


# Two at once


def test_two_batches_with_one_output_are_refused(files: Files) -> None:
    model = CountedModel(delay=0.01)
    files.write(prompts(20))
    refused: list[str] = []

    def reply(prompt: str) -> str:
        if prompt == "row 0":
            with pytest.raises(ConfigError, match="another process is at work") as raised:
                files.batch(model.llm()).run()
            refused.append(str(raised.value))
        return "yes"

    model.reply = reply
    assert files.batch(model.llm()).run().answered == 20
    assert len(refused) == 1
    assert model.calls == 20


# The disk

_FULL = """
import resource, sys
from support.batches import CountedModel, Files
from pathlib import Path
files = Files(Path(sys.argv[1]))
model = CountedModel()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
report = files.batch(model.llm(), concurrency=7).run()
print(report.stopped, report.answered, model.calls)
"""


def test_a_full_disk_stops_the_run_with_whole_lines_and_another_goes_on(files: Files, model: CountedModel) -> None:
    files.write(prompts(100))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    outcome = subprocess.run(
        [sys.executable, "-c", _FULL, str(files.folder), "5000"], env=env, check=True, capture_output=True, text=True
    )
    stopped, answered, calls = outcome.stdout.rsplit(maxsplit=2)
    assert stopped == "disk full"
    assert files.rows() == [*range(int(answered))] or len(files.rows()) == int(answered)
    assert 0 < int(answered) < int(calls) < 100
    data = files.answers.read_bytes()
    assert data.endswith(b"\n")
    assert 4000 < len(data) <= 5000
    report = files.batch(model.llm()).run()
    assert (report.answered, report.stopped) == (100, None)
    assert model.calls == 100 - int(answered)


def test_a_disk_that_is_full_from_the_start_stops_the_run_too(files: Files) -> None:
    files.write(prompts(5))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    outcome = subprocess.run(
        [sys.executable, "-c", _FULL, str(files.folder), "10"], env=env, check=True, capture_output=True, text=True
    )
    assert outcome.stdout.split() == ["disk", "full", "0", "0"]


def test_lines_that_had_no_room_are_written_if_there_is_room_before_the_run_ends(
    files: Files, model: CountedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(prompts(50))
    model.delay = 0.05
    real = os.pwrite
    times = 0

    def full(file: int, data: bytes, offset: int) -> int:
        nonlocal times
        times += 1
        if times == 1:
            raise OSError(errno.ENOSPC, "full")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    report = files.batch(model.llm(), concurrency=5).run()
    assert report.stopped == "disk full"
    assert report.answered == model.calls == len(files.rows())


def test_a_disk_that_breaks_is_an_error(files: Files, model: CountedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(prompts(50))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="broken"):
        files.batch(model.llm()).run()


def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_sent(
    files: Files, model: CountedModel
) -> None:
    files.write(prompts(5))
    files.answers.mkdir()
    with pytest.raises(IsADirectoryError):
        files.batch(model.llm()).run()
    with pytest.raises(ConfigError, match="expected a folder"):
        Batch(model.llm(), files.prompts, files.folder / "no" / "folder" / "out").run()
    assert model.calls == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_output_is_an_error(files: Files, model: CountedModel) -> None:
    files.write(prompts(5))
    files.answers.touch(0o400)
    with pytest.raises(PermissionError):
        files.batch(model.llm()).run()
    assert model.calls == 0
