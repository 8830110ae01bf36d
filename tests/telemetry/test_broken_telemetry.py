"""Processors, exporters, samplers and redact functions that raise. None of them changes a result."""

from __future__ import annotations

import logging

import pytest
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
from support.tracing_tools import ANSWER, REQUEST, Recorder, Remote, everything, modes, remote

from fluxibly._logs import forget_reports
from fluxibly.errors import Overloaded, ProviderError
from fluxibly.middleware import Retry
from fluxibly.pipeline import Pipeline
from fluxibly.testing.modes import run

pytestmark = pytest.mark.usefixtures("no_complaints")


# Broken telemetry


class Raising(SpanProcessor):
    """A span processor that raises at a step."""

    def __init__(self, step):
        self.step = step

    def on_start(self, span, parent_context=None):
        if self.step == "start":
            raise RuntimeError("broken")

    def on_end(self, span):
        if self.step == "end":
            raise RuntimeError("broken")


@modes
@pytest.mark.parametrize("step", ["start", "end"])
def test_a_span_processor_that_raises_changes_no_result(mode, step, recorder, capsys):
    """The failure is reported once, and the context is clean. A span that cannot end keeps no other from ending."""
    recorder.tracer_provider.add_span_processor(Raising(step))
    for _ in range(2):
        ran = run(mode, remote(mode, Overloaded("full"), ANSWER), [recorder.tracing(), Retry(max_retries=1)], REQUEST)
        assert ran.error is None
        assert ran.response.text == "forty two"
        assert ran.leaks == []
    assert len(recorder.spans) == (6 if step == "end" else 0)
    assert capsys.readouterr().err.count("tracing failed with RuntimeError") == 1


def test_what_breaks_tracing_is_not_quoted(recorder, capsys):
    """The report names the exception's type. Its message may quote a call's content."""

    class Quoting(SpanProcessor):
        def on_start(self, span, parent_context=None):
            raise ValueError("What is the meaning of life?")

    recorder.tracer_provider.add_span_processor(Quoting())
    assert Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST).text == "forty two"
    shown = capsys.readouterr().err
    assert "tracing failed with ValueError;" in shown
    assert "meaning" not in shown


def test_an_exporter_that_raises_changes_no_result(recorder, caplog):
    """The SDK logs the exporter's exception itself."""

    class Broken(SpanExporter):
        def export(self, spans):
            raise OSError("no route")

    recorder.tracer_provider.add_span_processor(SimpleSpanProcessor(Broken()))
    with caplog.at_level(logging.CRITICAL):
        assert Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST).text == "forty two"


def test_a_redact_that_raises_hides_everything(recorder, capsys):
    """Neither the content nor the error's message is recorded. The failure is reported once."""

    def redact(text):
        raise RuntimeError("broken")

    stack = [recorder.tracing(capture="both", redact=redact)]
    assert Pipeline(Remote(ANSWER), stack).complete(REQUEST).text == "forty two"
    with pytest.raises(ProviderError, match="words"):
        Pipeline(Remote(ProviderError("secret words")), stack).complete(REQUEST)
    exported = everything(recorder.spans) + str([event.attributes for event in recorder.events])
    assert "meaning" not in exported
    assert "secret" not in exported
    assert capsys.readouterr().err.count("redact raised RuntimeError") == 1


def test_a_sampler_that_raises_changes_no_result(capsys):
    """The call continues without a span."""

    class Broken(Sampler):
        def should_sample(self, *args, **kwargs) -> SamplingResult:
            raise RuntimeError("broken")

        def get_description(self):
            return "broken"

    forget_reports()
    recorder = Recorder(sampler=Broken())
    assert Pipeline(Remote(ANSWER), [recorder.tracing()]).complete(REQUEST).text == "forty two"
    assert "tracing failed" in capsys.readouterr().err
