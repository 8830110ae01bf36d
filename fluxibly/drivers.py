"""What the two drivers of streams share: they carry out what a flow asks for, up to the next event for the consumer.

The flow and the provider of a stream are stepped in a context of their own, so that what they set in context
variables (the current span, above all) never shows in the consumer's code between two chunks.
"""

from __future__ import annotations

from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

from fluxibly import _abandoned, driving
from fluxibly.aggregate import as_chunk
from fluxibly.combinators import resend_refused
from fluxibly.effects import END, Effect, Flow, Sleep, Source
from fluxibly.types import Chunk, Request, Response

if TYPE_CHECKING:
    from fluxibly.pipeline import AsyncPipeline, Pipeline


class Driver:
    """The state of a stream, and every decision about it that needs no I/O.

    Both drivers do the same in a loop: carry out the effect at hand, send the outcome into the flow, and look at the
    effect that comes back. An event for the consumer is delivered, and becomes the effect at hand when the consumer
    asks for more: there is nothing to carry out for it then, save that after a chunk of the provider's the next one
    has to be read (PULL).
    """

    def __init__(self, pipeline: Pipeline | AsyncPipeline, request: Request, flow: Flow[Response]) -> None:
        self.pipeline = pipeline
        self.request = request
        self.call = request.call
        self.flow = flow
        self.context: Context = copy_context()
        self.iterator: Any = None
        """The provider's stream; there may be none yet."""
        self.source = Source(END)
        self.delivered = self.call.delivered
        self.output = False
        self.response: Response | None = None
        self.closing = self.ended = False
        self.failed_early: Exception | None = None
        self.first: Effect = Sleep(0.0)
        try:
            # "started" is logged now, when the call is made; how it went is told at the first read.
            self.first = self.context.run(flow.send, None)
        except Exception as error:  # noqa: BLE001  # it is raised at the first read
            self.failed_early = error
        _abandoned.keep(self)

    def count(self, chunk: Chunk) -> bool:
        """Note a chunk that goes to the consumer; whether there has been output yet."""
        call = self.call
        self.delivered.append(chunk.text)
        if call.first_chunk_at is None:
            call.first_chunk_at = call.clock()
        self.output = self.output or chunk.has_output
        return self.output

    def admit(self, request: Request) -> None:
        """Let the provider be asked, unless output has gone out or the stream was closed meanwhile (see `aborted`)."""
        if self.closing:
            raise ConnectionAbortedError("the stream was closed")
        if self.output:
            raise resend_refused(request, Response("".join(self.delivered)))
        call = self.call
        call.asked_at = call.clock()
        if call.sent_at is None:
            call.sent_at = call.asked_at

    def restart(self) -> bool:
        """Take what was delivered for void, if the consumer knows of such things."""
        if not self.call.restarts:
            return False
        self.delivered.clear()
        self.output = False
        return True

    def finish(self, value: object) -> Chunk | None:
        """Take the flow's result; one that was not streamed is returned, as the chunk to deliver."""
        self.response = self.pipeline.finish(value, self.call)
        if self.call.chunks == 0 and (self.response.has_output or self.response.finish_reason):
            chunk = as_chunk(self.response)
            self.count(chunk)
            return chunk
        return None

    def raise_interrupted(self, error: BaseException) -> None:
        """Raise `StreamInterrupted` from an error, if the consumer gets that instead: once output has gone out."""
        if isinstance(error, Exception):
            driving.explain(error, self.pipeline.middleware)
            if self.output:
                driving.raise_interrupted(error, self.request, self.delivered)

    def end(self) -> None:
        self.ended = True
        self.failed_early = None  # it refers to this driver
        _abandoned.forget(self)

    def abort(self) -> None:
        """End a read that is under way elsewhere, as far as the provider's stream can: one with an `abort()`."""
        abort = getattr(self.iterator, "abort", None)
        if abort is not None:
            abort()

    def aborted(self, error: BaseException) -> bool:
        """Whether an error is that of a read that `close` ended: the stream is abandoned then, and has not failed."""
        return self.closing and isinstance(error, Exception)

    def let_go(self) -> None:
        """Give the stream up from ordinary code that cannot wait."""
        raise NotImplementedError
