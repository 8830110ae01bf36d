"""Middleware that asks other models and providers when one has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import attrs

from fluxibly._checks import kind_of, one_of, validator
from fluxibly.errors import DeadlineExceeded, StreamInterrupted, error_type, root_cause
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.relay import OutputWatch
from fluxibly.flow.verbs import discard
from fluxibly.functions import check_function, to_function
from fluxibly.middleware._going_on import LISTED, Trail, goes_on_after, has_time
from fluxibly.target import Target, to_targets
from fluxibly.types import CallRecord, Request, Response, Restart

When: TypeAlias = Callable[[Exception], bool]


def _to_when(value: When | str | None) -> When | None:
    return to_function(value)


@attrs.frozen
class Fallback:
    """Middleware that asks other models or providers, in order, when a request has failed before output.

    It goes on after every `ProviderError` but `ContentFiltered`, `BadRequest` and `DeadlineExceeded`. After
    `ContextLengthExceeded`, which is a `BadRequest`, it does go on, because a longer context may fit elsewhere; and also after
    `CircuitOpen`, `RateLimitWait` and `QueueFull`. A `Retry` inside of it tries each target again.

    A target whose provider cannot be made, because a key is missing for example, is skipped. If all fail, the last error
    is raised, and its notes (`__notes__`) list every failure. If the deadline of the call has passed, `DeadlineExceeded`
    is raised at once.

    Args:
        to: the targets, in order: `Target`s, and everything that `Target(to=…)` takes. One alone stands for a list of one.
        when: a function that gets the error (of an interrupted stream: its cause) and returns whether to go on, in place
            of the rule above; also about the `DeadlineExceeded` of a deadline further in, which leaves time for others. It is
            not asked once the deadline of the call has passed. In YAML, its registered name.
        on_interrupt: how to handle a stream that fails after output. "raise" raises `StreamInterrupted`. "restart"
            emits a `Restart` and asks the next target, if the consumer (`stream(…, restarts=True)`) or an outer hold-back
            accepts restarts.

    Raises:
        ConfigError: a target is wrong, or there is none.
        ValueError: another setting is wrong.
        TypeError: in a call, `when` has returned something else than a bool.
    """

    to: tuple[Target, ...] = attrs.field(converter=to_targets, validator=LISTED)
    when: When | None = attrs.field(
        default=None,
        kw_only=True,
        converter=_to_when,
        validator=attrs.validators.optional(validator(check_function)),
    )
    on_interrupt: Literal["raise", "restart"] = attrs.field(
        default="raise", kw_only=True, validator=validator(one_of, ("raise", "restart"))
    )

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, which an `LLM` checks when it is made."""
        return self.to

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        left = iter(self.to)
        trail: Trail | None = None
        asked = request
        while True:
            watch = OutputWatch() if call.streaming else None
            try:
                flow = call_next(asked)
                return (yield from flow if watch is None else watch.over(flow))
            except Exception as error:
                if trail is None:
                    trail = Trail("Fallback", request)
                trail.failed(asked, error)
                interrupted = isinstance(error, StreamInterrupted)
                # Another error after output is not the provider's: an inner layer has failed.
                output = watch is not None and watch.done and not interrupted
                following: Request | None = None
                if (
                    not output
                    and (not interrupted or self.on_interrupt == "restart")
                    and self._goes_on_after(error, call)
                ):
                    trail.check_deadline(asked)
                    following = yield from trail.next(left)
                if following is None or (interrupted and not (yield Restart(error_type(error)))):
                    trail.tell(error)
                    raise
                trail.goes_on(following, error)
                asked = following

    def _goes_on_after(self, error: Exception, call: CallRecord) -> bool:
        cause = root_cause(error)
        if self.when is None or (isinstance(cause, DeadlineExceeded) and not has_time(call)):
            return goes_on_after(cause)
        answer = self.when(cause if isinstance(cause, Exception) else error)
        if not isinstance(answer, bool):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
            discard(answer)
            raise TypeError(
                f"Fallback(when=…): expected True to ask the next target, or False to raise the error, got {kind_of(answer)}"
            )
        return answer
