"""The provider and model that telemetry names for a call, for the tests of LangChain and LiteLLM."""

from __future__ import annotations

from typing import Any

import anyio
import attrs

from fluxibly import AsyncPipeline, Pipeline
from fluxibly.types import CallRecord, Request
from support.meters import Meters
from support.tracing_tools import Recorder


@attrs.define
class Observed:
    """The telemetry of a call: its span, its attempts' spans, the attributes of its duration, and its record."""

    recorder: Recorder = attrs.Factory(Recorder)
    meters: Meters = attrs.Factory(Meters)
    records: list[CallRecord] = attrs.Factory(list)

    @property
    def span(self) -> dict[str, Any]:
        return dict(self.recorder.call.attributes)

    @property
    def attempts(self) -> list[tuple[Any, Any]]:
        """The provider and the response's model of each attempt."""
        names = ("fluxibly.attempt.provider", "fluxibly.attempt.response_model")
        return [tuple(span.attributes.get(name) for name in names) for span in self.recorder.attempts]

    @property
    def measured(self) -> dict[str, Any]:
        (point,) = self.meters.points()["gen_ai.client.operation.duration"]
        return dict(point.attributes)

    def stack(self, *inner: Any) -> list[Any]:
        def note(request: Request, call_next: Any) -> Any:
            self.records.append(request.call)
            return (yield from call_next(request))

        return [self.recorder.tracing(attempts="always"), self.meters.metrics(), note, *inner]


def observe(mode: str, provider: Any, request: Request, *inner: Any, calls: int = 1) -> Observed:
    """Make one or several calls in a mode of `libraries.MODES`, and return their telemetry."""
    backend, _, streamed = mode.partition(" ")
    observed = Observed()
    if backend == "sync":
        with Pipeline(provider, observed.stack(*inner)) as pipeline:
            for _ in range(calls):
                if streamed:
                    with pipeline.stream(request) as stream:
                        list(stream)
                else:
                    pipeline.complete(request)
        return observed

    async def run() -> None:
        async with AsyncPipeline(provider, observed.stack(*inner)) as pipeline:
            for _ in range(calls):
                if streamed:
                    async with pipeline.stream(request) as stream:
                        async for _chunk in stream:
                            pass
                else:
                    await pipeline.complete(request)

    anyio.run(run, backend=backend)
    return observed
