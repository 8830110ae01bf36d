"""Middleware that goes on with an answer that was cut at the limit of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

import attrs

from fluxibly._checks import validator, whole
from fluxibly._logs import log_decision
from fluxibly._merging import composed
from fluxibly.aggregate import Aggregator, around_text, as_chunks, rewritten
from fluxibly.errors import BadRequest, ContextLengthExceeded, StreamInterrupted
from fluxibly.flow import CallNext, Flow, emit, map_chunks
from fluxibly.types import Chunk, Message, Prefill, Request, Response, Text, Usage

GO_ON = (
    "Your answer was cut off because it became too long. Go on with it exactly where it stops, in the middle of a word if need "
    "be. Repeat nothing of it, and add no introduction or remark."
)
"""The message with which a model is asked to go on."""


@attrs.frozen(kw_only=True)
class Continue:
    """Middleware that goes on with an answer that was cut at the limit of tokens (the finish reason "length").

    The model gets its answer so far as the beginning of its message (a prefill) where the service is known to go on with it
    (`ProviderInfo.prefill`) and the answer is text alone; otherwise a message of the user's asks it to go on. If the service
    refuses a prefill, it is asked. The model and the provider that gave the first part are asked for the others, whatever a
    `Fallback` or a `Balance` further in would choose.

    The response has the text of all parts, the sum of their usage, and the finish reason of the last. In a stream, a mark
    (`Chunk(added=())`) stands between two parts. A part that brings no text is the last.

    These are returned as they are: an answer with tool calls, a structured answer (`response_format`), one of several choices
    (`n`), one without text, such as reasoning that was cut, and an answer that has filled the model's context.

    An error of a later request goes to the caller, in a stream as the cause of `StreamInterrupted`, whose `partial` has all
    parts. A `Retry` further in tries the request of a part again before the part's output.

    Args:
        max_turns: the number of requests for one answer, the first included, from 1 up. Retries of a `Retry` further in do not
            count; a prefill that is refused does.

    Raises:
        ValueError: `max_turns` is out of range.
    """

    max_turns: int = attrs.field(default=3, validator=validator(whole, 1))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        response = yield from call_next(request)
        if response.finish_reason != "length":
            return response
        return (yield from self._completed(request, call_next, response))

    def _completed(self, request: Request, call_next: CallNext, first: Response) -> Flow[Response]:
        """Return the answer that begins with a part, and goes on as long as parts are cut."""
        answer = _Answer(request, first)
        refused = marked = False
        for turn in range(2, self.max_turns + 1):
            hindrance = answer.hindrance()
            if hindrance is not None:
                log_decision(request, "Continue", f"returns a cut answer as it is: {hindrance}")
                break
            prefill = None if refused else answer.prefill()
            how = "by asking" if prefill is None else "by a prefill"
            log_decision(request, "Continue", f"goes on {how} after {answer.length} characters (request {turn})")
            if not marked:
                yield from emit(Chunk(added=()))
            seam = answer.seam(prefill)
            try:
                flow = map_chunks(call_next(answer.request(prefill)), seam.take, seam.rest, at_restart=seam.end)
                part = yield from flow
            except StreamInterrupted as error:
                error.partial = answer.with_part(error.partial)
                raise
            except BadRequest as error:
                if prefill is None or turn == self.max_turns or isinstance(error, ContextLengthExceeded):
                    raise
                log_decision(request, "Continue", "asks instead, because the service refuses the prefill", error)
                refused = marked = True
                continue
            marked = False
            answer.add(part)
            if part.finish_reason != "length" or not part.text:
                break
        else:
            log_decision(request, "Continue", f"returns an answer that is cut after {self.max_turns} requests")
        return answer.response()


class _Answer:
    """An answer in parts."""

    def __init__(self, request: Request, first: Response) -> None:
        self.asked = request
        self.parts: list[Response] = []
        """The parts of the message under way."""
        self.added: tuple[Message, ...] = ()
        self.add(first)

    def add(self, part: Response) -> None:
        if part.added:  # a layer further in has begun another message
            self.parts.clear()
            self.added += part.added
        self.parts.append(part)

    @property
    def text(self) -> str:
        return "".join([part.text for part in self.parts])

    @property
    def length(self) -> int:
        return sum([len(part.text) for part in self.parts])

    def response(self) -> Response:
        only = self.parts[0]
        return only if len(self.parts) == 1 and only.added == self.added else _joined(self.parts, self.added)

    def with_part(self, part: Response) -> Response:
        """Return the response with one more part, which was interrupted."""
        parts = [part] if part.added else [*self.parts, part]
        return _joined(parts, (*self.added, *part.added))

    def hindrance(self) -> str | None:
        """Say why the answer is not gone on with; None: it is."""
        last = self.parts[-1]
        if any(part.tool_calls for part in self.parts):
            return "it has tool calls"
        if self.asked.response_format not in (None, "text", {"type": "text"}):
            return "it is structured"
        if last.alternatives or (self.asked.n or 1) > 1:
            return "it is one of several"
        if not self.text.strip():
            return "it has no text"
        if last.raw_finish_reason == "model_context_window_exceeded":
            return "it fills the context of the model"
        return None

    def prefill(self) -> Prefill | None:
        """Return how the service goes on with the answer as a prefill, if it does."""
        call = self.asked.call
        prefill = call.provider.prefill
        text_alone = all(isinstance(part, Text) for response in self.parts for part in response.parts)
        if prefill is None or not text_alone or not re.search(prefill.models, call.sent_model or self.asked.model):
            return None
        return prefill

    def request(self, prefill: Prefill | None) -> Request:
        """Return the request for the next part, to whoever gave the last."""
        asked, call = self.asked, self.asked.call
        if call.sent_model is not None and (call.target is not asked.target or call.sent_model != asked.model):
            asked = asked.evolve(target=call.target).evolve(model=call.sent_model)
        before = (*asked.messages, *self.added)
        if prefill is None:
            return asked.evolve(messages=(*before, self.response().message, Message.user(GO_ON)))
        if self._begun():
            before = before[:-1]
        # Some services refuse white space at its end, and models go on badly after it.
        messages = (*before, Message.assistant(self._prefilled(prefill).rstrip()))
        return asked.evolve(messages=messages, extra=composed(asked.extra, prefill.body or {}))

    def _begun(self) -> str:
        """Return the text with which the request itself begins the answer: a prefill of the caller's."""
        last = self.asked.messages[-1]
        is_text = all(isinstance(part, Text) for part in last.parts)
        return last.text if last.role == "assistant" and is_text and not self.added else ""

    def _prefilled(self, prefill: Prefill) -> str:
        """Return the text with which the next part begins."""
        begun, text = self._begun(), self.text
        return text if prefill.echoes and text.startswith(begun) else begun + text

    def seam(self, prefill: Prefill | None) -> _Seam:
        """Return what stands between the answer so far and the next part."""
        echo = self._prefilled(prefill).rstrip() if prefill is not None and prefill.echoes else ""
        return _Seam(self.parts, echo)


def _joined(parts: Sequence[Response], added: tuple[Message, ...]) -> Response:
    """Return the response of the parts of a message."""
    answer = Aggregator()
    for part in parts:
        answer.add(Chunk(added=()))
        for chunk in as_chunks(part.evolve(added=())):
            answer.add(chunk)
    return answer.response().evolve(
        usage=Usage.sum([part.usage for part in parts]),
        provider=parts[-1].provider,
        cache_hit=all(part.cache_hit for part in parts),
        added=added,
    )


class _Seam:
    """The text that is left out at the beginning of a part, because it stands at the end of the text before it already.

    A model that does not see the white space at the end writes it again; and some services repeat the whole prefill.

    Args:
        before: the parts of the message so far.
        echo: the text that the service may repeat.
    """

    def __init__(self, before: Sequence[Response], echo: str) -> None:
        text = "".join([part.text for part in before])
        self.before: Sequence[Response] = tuple(before)
        """The parts of the message that goes on; empty once another has begun."""
        self.white = text[len(text.rstrip()) :]
        self.echo = self.whole_echo = echo
        self.held = ""
        """The beginning of the part so far, which may be part of the echo."""
        self.over = not self.white and not self.echo

    def take(self, chunk: Chunk) -> Chunk | Sequence[Chunk]:
        if chunk.added and self.before:
            return Chunk(added=self._with_before(chunk.added))
        if self.over or chunk.added is not None:
            return chunk
        held = self._let_go() if chunk.reasoning or chunk.parts else ""
        text = self._certain(chunk.text)
        if chunk.tool_calls:
            text += self._let_go()
        if text == chunk.text and not held:
            return chunk
        before, after = around_text(chunk)
        pieces = (Chunk(held), Chunk(text, **before, **after))
        return [piece for piece in pieces if piece.text or not piece.text_only]

    def rest(self) -> Sequence[Chunk]:
        held = self._let_go()
        return [Chunk(held)] if held else ()

    def end(self) -> None:
        """Note that another message begins."""
        self.over, self.held = True, ""

    def _with_before(self, added: Sequence[Message]) -> tuple[Message, ...]:
        """Return the messages of a layer further in, of which the first goes on with the message so far."""
        before, self.before = self.before, ()
        self.end()
        first, *others = added
        if first.role != "assistant":
            return (*added,)
        seam = _Seam(before, self.whole_echo)
        part = rewritten(first.parts, seam.take, seam.rest)
        return (attrs.evolve(_joined([*before, part], ()).message, name=first.name), *others)

    def _let_go(self) -> str:
        """Return what is held back, which is no echo."""
        self.echo = ""
        held, self.held = self.held, ""
        return self._without_white(held)

    def _certain(self, text: str) -> str:
        """Return what is new of a piece of the part."""
        if not self.echo:
            return self._without_white(text)
        held = self.held + text
        if len(held) < len(self.echo) and self.echo.startswith(held):
            self.held = held
            return ""
        held = held.removeprefix(self.echo)
        self.echo = self.held = ""
        return self._without_white(held)

    def _without_white(self, text: str) -> str:
        if self.over:
            return text
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(text, self.white, strict=False))])
        self.white = self.white[same:]
        self.over = self.over or (not self.echo and (not self.white or same < len(text)))
        return text[same:]
