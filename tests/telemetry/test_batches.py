"""The span of a batch, and the traces of its calls."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode
from support.tracing_tools import Recorder, remote

from fluxibly import AsyncLLM, LLMConfig, Request, Response
from fluxibly.batch import Batch, Report
from fluxibly.batch._journal import Journal
from fluxibly.errors import AuthenticationError, Overloaded
from fluxibly.flow import CallNext, Flow, ask
from fluxibly.middleware import Retry
from fluxibly.pipeline import AsyncPipeline
from fluxibly.testing.modes import MODES

ASYNC = next(mode for mode in MODES if mode.backend == "asyncio")


def batch_of(folder: Path, recorder: Recorder, *answers: object, inside: tuple = (), **settings: object) -> Batch:
    """Return a batch of as many rows as there are answers."""
    llm = AsyncLLM(LLMConfig(framework="echo", model="m-1"), middleware=[recorder.tracing(), *inside])
    llm.pipeline = AsyncPipeline(remote(ASYNC, *answers), llm.pipeline.middleware)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"row {n}"}) + "\n" for n in range(len(answers))))
    return Batch(llm, prompts, folder / "answers.jsonl", **settings)


def run(batch: Batch) -> Report:
    """Run a batch, with the very model that it was given."""
    return anyio.run(batch.arun)


def spans_of(recorder: Recorder):
    """Return the span of the batch, and all others."""
    (batch,) = [span for span in recorder.spans if span.name == "fluxibly.batch"]
    return batch, [span for span in recorder.spans if span is not batch]


def test_each_call_has_a_trace_with_a_link(recorder, tmp_path):
    """A call begins a trace of its own, whose root is linked to the batch; the batch says what it has come to."""
    report = run(batch_of(tmp_path, recorder, "one", AuthenticationError("no"), "three"))
    batch, calls = spans_of(recorder)
    assert (report.answered, report.failed) == (2, 1)
    assert {name: batch.attributes[f"fluxibly.batch.{name}"] for name in ("asked", "answered", "failed")} == {
        "asked": 3,
        "answered": 2,
        "failed": 1,
    }
    assert batch.attributes["fluxibly.outcome"] == "completed"
    assert len({span.context.trace_id for span in (batch, *calls)}) == 4
    assert [span.parent for span in (batch, *calls)] == [None] * 4
    assert [[link.context.span_id for link in span.links] for span in calls] == [[batch.context.span_id]] * 3
    assert not batch.links
    assert recorder.counting.open == []


def test_one_trace(recorder, tmp_path):
    """All calls are children of the batch's span, without links."""
    run(batch_of(tmp_path, recorder, "one", "two", one_trace=True))
    batch, calls = spans_of(recorder)
    assert [span.parent.span_id for span in calls] == [batch.context.span_id] * 2
    assert not [link for span in calls for link in span.links]


def test_what_is_within_a_call_has_no_link(recorder, tmp_path):
    """Attempts and questions are in the trace of their call, whose root alone is linked."""

    def asks(request: Request, call_next: CallNext) -> Flow[Response]:
        yield from ask(request)
        return (yield from call_next(request))

    made = batch_of(tmp_path, recorder, "asked", Overloaded("busy"), "answered", inside=(asks, Retry(base_delay=0)))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the only row"}\n')
    assert run(made).answered == 1
    batch, calls = spans_of(recorder)
    linked = [span for span in calls if span.links]
    assert (len(calls), len(linked)) == (4, 1)  # a call, a question, two attempts
    assert linked[0].parent is None
    assert {span.context.trace_id for span in calls} == {linked[0].context.trace_id} != {batch.context.trace_id}


def test_a_call_within_a_span_of_the_users_own(recorder, tmp_path):
    """Where a layer outside has made a span current, the call belongs to it, and has no link."""

    def own(request: Request, call_next: CallNext) -> Flow[Response]:
        with recorder.tracer_provider.get_tracer("mine").start_as_current_span("mine"):
            return (yield from call_next(request))

    made = batch_of(tmp_path, recorder, "one")
    llm = made.llm
    llm.pipeline = llm.pipeline.with_middleware([own, *llm.pipeline.middleware])
    run(made)
    _, others = spans_of(recorder)
    mine, call = sorted(others, key=lambda span: span.start_time)
    assert (mine.name, call.parent.span_id, list(call.links)) == ("mine", mine.context.span_id, [])


def test_the_batch_belongs_to_the_span_around_it(recorder, tmp_path):
    """A batch is a child of the current span; the calls are not in that trace. Afterwards it is current again."""
    made = batch_of(tmp_path, recorder, "one")
    with recorder.tracer_provider.get_tracer("mine").start_as_current_span("mine") as mine:

        async def within() -> None:
            await made.arun()
            assert trace.get_current_span() is mine

        anyio.run(within, backend="trio")
    (batch,) = [span for span in recorder.spans if span.name == "fluxibly.batch"]
    assert batch.parent.span_id == mine.get_span_context().span_id
    (call,) = [span for span in recorder.spans if span.name == "chat m-1"]
    assert (call.parent, call.context.trace_id == batch.context.trace_id) == (None, False)


def test_a_batch_that_raises(recorder, tmp_path, monkeypatch):
    """The span of a batch that an error ends has the class of the error, and not its message."""

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "a secret")

    monkeypatch.setattr(Journal, "write", failing)
    with pytest.raises(OSError, match="a secret"):
        run(batch_of(tmp_path, recorder, "one"))
    batch, _ = spans_of(recorder)
    assert (batch.status.status_code, batch.attributes["error.type"]) == (StatusCode.ERROR, "OSError")
    assert "a secret" not in batch.to_json()


def test_unsampled_and_unset(tmp_path):
    """A batch that is not sampled, or without an SDK, is answered all the same."""
    recorder = Recorder(sampler=ALWAYS_OFF)
    assert run(batch_of(tmp_path, recorder, "one")).answered == 1
    assert recorder.spans == []


def test_a_broken_sdk(recorder, tmp_path, capsys):
    """An SDK that raises is reported once, and the rows are answered."""

    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    recorder.tracer_provider.get_tracer = broken
    assert run(batch_of(tmp_path, recorder, "one")).answered == 1
    err = capsys.readouterr().err
    assert "tracing failed with RuntimeError" in err
    assert "secret" not in err
