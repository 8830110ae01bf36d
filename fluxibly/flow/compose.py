"""The composition of middleware into one flow, and the innermost flow."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from inspect import CO_GENERATOR
from types import CodeType, CoroutineType, FunctionType, GeneratorType
from typing import Any, TypeGuard, cast

from fluxibly._checks import kind_of
from fluxibly._tokens import guessed_usage
from fluxibly.aggregate import Aggregator
from fluxibly.calls import CallRecord, Spent
from fluxibly.errors import DeadlineExceeded, ProviderError, interrupted
from fluxibly.flow.effects import END, CallNext, Flow, Middleware, More, Perform, Release, Send, Source
from fluxibly.provider import pieces_of_stream, unmarked
from fluxibly.types import Attempt, Chunk, ProviderInfo, Request, Response, unobserved


def compose(middleware: Sequence[Middleware]) -> CallNext:
    """Return the stack as one `CallNext`, with the first middleware outermost and `send` innermost."""
    call_next: CallNext = send
    for layer in reversed(middleware):
        call_next = bind(layer, call_next)
    return call_next


def bind(layer: Middleware, call_next: CallNext) -> CallNext:
    """Return the `CallNext` that runs `layer` around `call_next`. Its attribute `parts` holds these two."""
    call = layer if isinstance(layer, FunctionType) else layer.__call__  # saves a lookup in each call
    if is_generator_function(layer):

        def bound(request: Request) -> Flow[Response]:
            return call(request, call_next)

    else:

        def bound(request: Request) -> Flow[Response]:
            return _checked(call(request, call_next), layer)

    with_parts: Any = bound
    with_parts.parts = (layer, call_next)
    return bound


def is_generator_function(layer: object) -> bool:
    """Whether a call of `layer` always returns a generator."""
    code = code_of(layer)
    return code is not None and bool(code.co_flags & CO_GENERATOR)


def code_of(layer: object) -> CodeType | None:
    """Return the code that runs when a middleware is called, or None if it is not plain Python."""
    call: object = layer if isinstance(layer, FunctionType) else getattr(type(layer), "__call__", None)  # noqa: B004  # the method itself
    code = getattr(call, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _checked(flow: Any, layer: Middleware) -> Flow[Response]:
    if _is_flow(flow):
        return flow
    kind = kind_of(flow)
    if isinstance(flow, CoroutineType):
        flow.close()  # otherwise Python warns that the coroutine was never awaited
    raise TypeError(
        f"the middleware {layer_name(layer)} returned {kind}, expected a generator; write it as "
        "a generator function: def mw(request, call_next): return (yield from call_next(request))"
    )


def _is_flow(value: object) -> TypeGuard[Flow[Response]]:
    return type(value) is GeneratorType or isinstance(value, Generator)  # the check against the abstract class is slow


def layer_name(layer: object) -> str:
    """Return the name of a middleware for a message."""
    name = getattr(layer, "__qualname__", None)
    return name if isinstance(name, str) else type(layer).__qualname__


_spent: Any = cast("Any", tuple).__new__
# Making a NamedTuple this way takes a third of the time.


def send(request: Request) -> Flow[Response]:
    """Run one attempt at the provider: the innermost flow.

    After output has gone out, an error is raised as `StreamInterrupted` with the error as its cause.

    Raises:
        DeadlineExceeded: the call's deadline has passed, so nothing is sent.
    """
    call = request.call
    if request.target is not call.target:
        yield from _turn_to(call, request.target)
    if call.leash is not None:
        check_deadline(call, request.model)
    call.attempts += 1
    call.interruption = call.said = None
    call.sent_model = request.model
    call.sent_messages = request.messages
    answer: Aggregator | None = None
    start = 0.0 if call.attempt_times is None else call.clock()
    claimed = None if call.claim is None else call.claim.enter()
    attempts: list[Attempt] | tuple[()] = ()
    if call.observed and request.observers:  # not those of a call that this one is made within
        attempts = [observer.begin(request) for observer in request.observers]
        # A request that the provider makes of this one is no attempt of this call, so it has no observers.
        request = unobserved(request, attempts)
        attempts.reverse()  # the innermost ends first
    call.sending = request
    effect = Send(request)
    try:
        reply = yield effect
        if type(reply) is Source:
            answer = Aggregator()
            keep = answer.texts.append
            while (item := reply.chunk) is not END:
                chunk = item if type(item) is Chunk else (yield from _last_piece(item, answer, call.provider.name))
                if chunk.text_only:
                    keep(chunk.text)
                else:
                    answer.add(unmarked(chunk, call.provider.name))
                yield chunk
            response = answer.response()
            call.said = response.text
        else:
            response = reply if type(reply) is Response else to_response(reply, f"the provider {call.provider.name}")
            if response.added:
                who = f"the provider {call.provider.name}"
                raise TypeError(f"{who} returned a Response with added=…, which only a middleware may add")
    except BaseException as error:
        partial = None if answer is None else answer.response()
        call.model = None if partial is None else partial.model or request.model
        call.usage = None if partial is None else partial.usage
        call.finish_reason = None if partial is None else partial.finish_reason
        for attempt in attempts:
            attempt.end(None, error, sent=effect.sent)
        if not effect.sent:  # the stream was closed unread, or a layer refused to send
            call.attempts -= 1
            call.sending = None
            raise
        refused = isinstance(error, ProviderError) and error.status is not None and call.usage is None
        _note_spent(call, request, partial, error, refused=refused)
        if not isinstance(error, Exception):
            raise
        call.sending = None
        if call.leash is not None:
            if isinstance(error, DeadlineExceeded) and error.__cause__ is None:
                error.__cause__ = call.last_error
            call.last_error = error
        if call.streaming:
            yield Release(request)
        if partial is None or not partial.has_output:
            raise
        call.interruption = interrupted(request, partial, error)
        raise call.interruption from error
    else:
        call.model = response.model or request.model
        call.usage = response.usage
        call.finish_reason = response.finish_reason
        call.sending = None
        if call.when_spent is None:
            call.spent.append(
                _spent(Spent, (call.provider, call.sent_model, response.usage, response.model, False, None))
            )
        else:
            _note_spent(call, request, response, None)
        if attempts:
            for attempt in attempts:
                attempt.end(response, None, sent=True)
        return response
    finally:
        if call.attempt_times is not None:
            call.attempt_times.append(call.clock() - start)
        if claimed is not None and call.claim is not None:
            call.claim.leave(claimed)


def _note_spent(
    call: CallRecord, request: Request, answer: Response | None, error: BaseException | None, *, refused: bool = False
) -> None:
    """Add an attempt to what the call has spent. `answer` is the part that came, if there is an error."""
    usage, guess = call.usage, None
    counts = call.when_spent
    if counts is not None and (usage is None or error is not None):
        guess = guessed_usage(request, answer, usage, error)
    answered = None if answer is None else answer.model
    call.spent.append(_spent(Spent, (call.provider, call.sent_model, usage, answered, refused, guess)))
    if counts:
        for count in counts:
            count(call)


def _turn_to(call: CallRecord, target: object) -> Flow[None]:
    """Make the provider of another target the provider of the call."""
    call.provider = yield from _info_of(call, target)
    call.target = target


def _info_of(call: CallRecord, target: object) -> Flow[ProviderInfo]:
    if not call.targets.is_made(target):
        # Making a provider may read files or load a model, which must not hold up an event loop.
        yield Perform(partial(call.targets.info_of, target), None, call)
    return call.targets.info_of(target)


def provider_of(request: Request) -> Flow[ProviderInfo]:
    """Return the description of the provider that a request goes to, as it stands: `yield from provider_of(request)`.

    The provider of a target is made, if it does not exist yet.

    Raises:
        FluxiblyError: it cannot be made: the framework is unknown, a key is missing, and so on.
    """
    return _info_of(request.call, request.target)


def check_deadline(call: CallRecord, model: str | None, wait: float = 0.0) -> None:
    """Check that the deadline of a call has not passed, and will not have passed after a wait.

    Raises:
        DeadlineExceeded: it has, or will have.
    """
    leash = call.leash
    if leash is not None and leash.deadline is not None and call.clock() + wait >= leash.deadline:
        raise deadline_exceeded(call, model, "would pass during a wait" if wait else "has passed")


def deadline_exceeded(call: CallRecord, model: str | None, what: str = "has passed") -> DeadlineExceeded:
    """Return the error for a deadline that has passed. Its cause is the error of the last attempt, if that has failed."""
    whom = call.provider.name if model is None else f"{model} at {call.provider.name}"
    advice = "allow more time, or ask for less"
    if call.leash is not None and call.leash.deadline is not None:
        seconds = call.leash.deadline - call.started_at
        whom += f", {seconds:.3g} s after its start"
        if seconds < 0:
            advice = "a deadline is a time of call.clock: write call.clock() + seconds"
        if (who := call.leash.set_by("deadline")) is not None:
            whom += f", set by {who}"
    error = DeadlineExceeded(
        f"the deadline of the call {what} ({whom}); {advice}",
        provider=call.provider.framework,
        model=model,
    )
    error.__cause__ = call.last_error
    return error


def _last_piece(item: object, answer: Aggregator, provider: str) -> Flow[Chunk]:
    """Return the last chunk of an item of a stream, and let out the chunks before it."""
    pieces = pieces_of_stream(item, provider)
    for piece in pieces[:-1]:
        answer.add(piece)
        yield More(piece)
    return pieces[-1]


def to_response(reply: object, who: str) -> Response:
    """Return a whole answer as a response. `who` gave it."""
    if isinstance(reply, str):
        return Response(reply)
    if isinstance(reply, Response):
        return reply
    raise TypeError(f"{who} returned {kind_of(reply)}, expected a Response or a str from its complete()")
