"""The check that a layer's answer is what it has delivered, and the names of the middleware that may be at fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from fluxibly.errors import StreamInterrupted
from fluxibly.flow.compose import layer_name
from fluxibly.flow.effects import Middleware
from fluxibly.types import CallRecord, Response


def check_delivered(call: CallRecord, response: Response, characters: int | None = None) -> None:
    """Check the answer that a layer got from `call_next`, before the layer reports a completed call.

    Args:
        characters: the length of the text that went past the layer, if it counts. (A whole answer has not gone past.)

    Raises:
        StreamInterrupted: a middleware further in returned another text than was delivered.
    """
    error = swallowed(call)
    if error is None:
        if not characters or characters == len(response.text):
            return
    # Each `map_chunks` between here and the middleware that caught the error has changed `partial` as it changed the answer.
    elif is_delivered(call, response, error.partial.text, continued=call.continued):
        return
    partial = Response() if error is None else error.partial
    raise_not_delivered(call, response, partial)


def is_delivered(call: CallRecord, response: Response, text: str, *, continued: bool = False) -> bool:
    """Whether a response has the text that was delivered. After an interruption it also has to say that it is cut.

    If the answer was `continued`, the text is its last part.
    """
    if swallowed(call) is not None and not (response.has_output and response.finish_reason is not None):
        return False
    return response.text.endswith(text) if continued else response.text == text


def swallowed(call: CallRecord) -> StreamInterrupted | None:
    """Return the error that interrupted the last attempt after output that has gone out, or None.

    A combinator that has let nothing out empties the `partial` of the error.
    """
    error = call.interruption
    return error if isinstance(error, StreamInterrupted) and error.partial.has_output else None


def raise_not_delivered(call: CallRecord, response: Response, partial: Response) -> NoReturn:
    """Raise the error for a middleware that returned another answer than was delivered, from the provider's error if any.

    Args:
        partial: what has been let out.
    """
    error, who = swallowed(call), culprit(call)
    if error is None:
        how = "change the text of the chunks: response = yield from map_chunks(call_next(request), fn)"
        what = f"another text ({len(response.text)} characters) than was delivered; {how}"
    else:
        what = (
            f"an answer after {error}; let StreamInterrupted pass: catch ProviderError, not Exception. (To deliver half an "
            'answer, return error.partial.evolve(finish_reason="length"))'
        )
        error.partial = partial
    cause = None if error is None else error.__cause__
    raise StreamInterrupted(f"{who} returned {what}", partial=partial) from cause


def raise_not_marked(call: CallRecord, response: Response, partial: Response) -> NoReturn:
    """Raise the error for a middleware whose response has other messages in `added` than its marks had."""
    raise StreamInterrupted(
        f"{suspects(call.layers)} returned a response with {len(response.added)} messages in `added`, expected those of "
        f"its marks ({len(partial.added)}); emit(Chunk(added=messages)) after each turn, and return "
        "response.evolve(added=…) with all of them",
        partial=partial,
    )


def culprit(call: CallRecord) -> str:
    """Name the middleware that swallowed an interruption or changed the answer."""
    error = swallowed(call)
    return (None if error is None else catcher(error)) or suspects(call.layers)


def catcher(error: BaseException) -> str | None:
    """Name the middleware that caught an error: the outermost frame in its traceback that is not fluxibly's."""
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_globals.get("__name__", "").startswith("fluxibly."):
            return f"the middleware {trace.tb_frame.f_code.co_qualname}"
        trace = trace.tb_next
    return None


def suspects(layers: Sequence[Middleware]) -> str:
    """Name the layers that may have broken a rule: the layers that are not fluxibly's own."""
    names = [layer_name(layer) for layer in layers if is_users(layer)] or ["(none)"]
    return f"the middleware {names[0]}" if len(names) == 1 else f"one of the middleware {', '.join(names)}"


def is_users(layer: object) -> bool:
    """Whether a layer is not fluxibly's own."""
    return not layer.__module__.startswith("fluxibly.")
