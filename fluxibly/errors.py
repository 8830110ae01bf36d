"""The errors that users catch, all derived from `FluxiblyError`, and the outcome of a call.

Messages say what happened, to which provider and model, and what to do about it. They never contain an API key: the
code that makes an error from a server's message masks it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, ParamSpec, TypeAlias, TypeVar

from fluxibly._roots import BadPrompt as BadPrompt, ConfigError as ConfigError, FluxiblyError as FluxiblyError

if TYPE_CHECKING:
    from fluxibly.types import Outcome, Request, Response

P = ParamSpec("P")
T = TypeVar("T")
Phase: TypeAlias = Literal["connect", "first_byte", "first_chunk", "idle", "total", "deadline"]
"""The part of an attempt that a time limit covers. `Timeouts` and `Leash` have the limits."""


class FrameworkNotRegistered(ConfigError):
    """No provider is registered under this name. `problems` lists what else is wrong with the configuration."""


class Problems:
    """The problems of a configuration, collected so that one error lists all of them.

    Args:
        known: problems that were found before. A later problem of the same setting follows from it, and is left out.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = tuple(known)
        self._errors: list[ConfigError] = []

    def of(self, make: Callable[P, T], *args: P.args, **settings: P.kwargs) -> T | None:
        """Return what `make` returns, or None if it raises a ConfigError, whose problems `check` lists."""
        try:
            return make(*args, **settings)
        except ConfigError as error:
            self._errors.append(error)
            return None

    def check(self) -> None:
        """Raise the error that lists all problems, if there are any."""
        errors, self._errors = self._errors, []
        if len(errors) == 1 and not self._known:
            raise errors[0]
        settings = {_setting(problem) for problem in self._known}
        later = [problem for error in errors for problem in error.problems if _setting(problem) not in settings]
        if self._known or later:
            kind = next((type(error) for error in errors if isinstance(error, FrameworkNotRegistered)), ConfigError)
            cause = next((error.__cause__ for error in errors if error.__cause__ is not None), None)
            raise kind.of([*self._known, *later]) from cause


def _setting(problem: str) -> str:
    """Return the path of the setting that a problem is about."""
    return problem.partition(": ")[0]


class ProviderError(FluxiblyError):
    """A provider could not answer. Raise it (or a subclass) from your own provider.

    Args:
        message: what happened.
        retryable: whether the same request may succeed later; by default as the class says (see each class).
        retry_after: seconds to wait before the next attempt, as the service asked.
        status: the HTTP status, if there was a response.
        code: the service's own error code.
        provider, model: the provider and the model of the request.
        request_id: the service's id of the request, for its support.
        rate_limits: the service's rate-limit headers, by lower-case name, as `Response` has them.
        body: an excerpt of the body that the service sent, with secrets masked.
    """

    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        retryable: bool | None = None,
        retry_after: float | None = None,
        status: int | None = None,
        code: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        request_id: str | None = None,
        rate_limits: Mapping[str, str] | None = None,
        body: str | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = self.default_retryable if retryable is None else retryable
        self.retry_after = retry_after
        self.status = status
        self.code = code
        self.provider = provider
        self.model = model
        self.request_id = request_id
        self.rate_limits: Mapping[str, str] = {} if rate_limits is None else rate_limits
        self.body = body

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class AuthenticationError(ProviderError):
    """The API key is missing, wrong or expired."""


class PermissionDenied(ProviderError):
    """The API key is valid, but lacks the permission."""


class NotFound(ProviderError):
    """The model or the address does not exist."""


class BadRequest(ProviderError):
    """The service rejects the request as it stands."""


class ContextLengthExceeded(BadRequest):
    """The prompt, or the prompt and the answer together, exceed the model's context."""


class ContentFiltered(ProviderError):
    """The service's content filter refused the prompt or the answer."""


class RateLimitError(ProviderError):
    """Too many requests or tokens for now. Retryable."""

    default_retryable = True


class QuotaExceeded(RateLimitError):
    """The account's quota or credit is used up; waiting does not help."""

    default_retryable = False


class ServerError(ProviderError):
    """The service failed. Retryable."""

    default_retryable = True


class Overloaded(ServerError):
    """The service is overloaded for now. Retryable."""


class ConnectionFailed(ProviderError):
    """The connection failed, or was lost before the answer was complete. Retryable."""

    default_retryable = True


class RequestTimeout(ProviderError, TimeoutError):
    """A time limit expired. `phase` names the limit: "connect", "first_byte", "first_chunk", "idle", "total" or
    "deadline". Retryable.
    """

    default_retryable = True
    phase: Phase = "total"


class StreamStalled(RequestTimeout):
    """A stream sent nothing for the whole idle timeout. Retryable, if none of its output had been delivered."""

    phase = "idle"


class DeadlineExceeded(RequestTimeout):
    """The time of the whole call is up: attempts, waits and all. `__cause__` is the error of the last attempt, if any."""

    default_retryable = False
    phase = "deadline"


class StreamProtocolError(ProviderError):
    """The service's answer is malformed, too large or cut off, and therefore incomplete. Retryable."""

    default_retryable = True


class CircuitOpen(ProviderError):
    """`CircuitBreaker` sent nothing, because the provider has failed too often. `retry_after` says when it may ask again."""


class RateLimitWait(ProviderError):
    """`RateLimit` sent nothing, because the wait would be too long. `retry_after` is that wait in seconds."""


class QueueFull(ProviderError):
    """`Concurrency` sent nothing, because too many calls wait already, or this one has waited too long."""


class BudgetExceeded(FluxiblyError):
    """`Budget` sent nothing, because the call would cost more than is left, or ended a stream that ran over.

    `never_fits`: the call would cost more than the whole budget, so that it would be refused even if nothing were spent.
    """

    def __init__(self, message: str = "", *, never_fits: bool = False) -> None:
        super().__init__(message)
        self.never_fits = never_fits

    def __reduce__(self) -> tuple[object, ...]:
        return (_over_budget, (*self.args, self.never_fits))


def _over_budget(message: str, never_fits: bool) -> BudgetExceeded:
    return BudgetExceeded(message, never_fits=never_fits)


class GuardRefused(FluxiblyError):
    """`Guard` refused a request or an answer; `reason` says why. In a stream after output it is the cause of an error."""

    def __init__(self, message: str = "", *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message

    def __reduce__(self) -> tuple[object, ...]:
        return (_refused, (*self.args, self.reason))


def _refused(message: str, reason: str) -> GuardRefused:
    return GuardRefused(message, reason=reason)


class MaxTurnsExceeded(FluxiblyError):
    """The model still called tools after the last turn that `Tools` allows. `partial` is its last answer, with `added`."""

    def __init__(self, message: str = "", *, partial: Response | None = None) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[object, ...]:
        return (_too_many_turns, (*self.args, self.partial))


def _too_many_turns(message: str, partial: Response | None) -> MaxTurnsExceeded:
    return MaxTurnsExceeded(message, partial=partial)


class NotRecorded(FluxiblyError):
    """`Replay` has no recording of a request."""


class StoreError(FluxiblyError):
    """A store that middleware share something in has failed; `__cause__` is its error. See `on_store_error`."""


REFUSALS = (CircuitOpen, RateLimitWait, QueueFull)
"""The errors of middleware that refuse a call before anything is sent. Another provider may take it."""


class StreamInterrupted(FluxiblyError):
    """A stream failed after output had been delivered. A retry would deliver that output twice.

    `partial` is the response so far, and `__cause__` is the error that ended the stream.
    """

    def __init__(self, message: str = "", *, partial: Response) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[object, ...]:
        return (_interrupted, (*self.args, self.partial))


def _interrupted(message: str, partial: Response) -> StreamInterrupted:
    return StreamInterrupted(message, partial=partial)


def interrupted(request: Request, partial: Response, cause: BaseException) -> StreamInterrupted:
    """Return the error for a stream that failed after output; raise it `from cause`."""
    return StreamInterrupted(
        f"the stream of {request.model} from {request.call.provider.name} was interrupted after {len(partial.text)} "
        f"characters by {type(cause).__name__}: {cause}",
        partial=partial,
    )


class ResponseInvalid(FluxiblyError):
    """An answer did not pass `Validation`. `response` is the answer, and `problem` says what is wrong with it."""

    def __init__(self, message: str = "", *, response: Response, problem: str = "") -> None:
        super().__init__(message)
        self.response = response
        self.problem = problem or message

    def __reduce__(self) -> tuple[object, ...]:
        return (_invalid, (*self.args, self.response, self.problem))


def _invalid(message: str, response: Response, problem: str) -> ResponseInvalid:
    return ResponseInvalid(message, response=response, problem=problem)


def root_cause(error: BaseException) -> BaseException:
    """Return the error that logs and telemetry name: the cause of a `StreamInterrupted`, else the error itself."""
    while isinstance(error, StreamInterrupted) and error.__cause__ is not None:
        error = error.__cause__
    return error


def outcome_of(error: BaseException | None) -> Outcome:
    """Return the outcome of a call that raised `error`, or that returned if `error` is None.

    A flow receives `GeneratorExit` when its consumer stops early. Any other `BaseException` that is not an `Exception`
    (asyncio's and trio's cancellation, Ctrl-C) arrives while the caller waits: the call is cancelled.
    """
    if error is None:
        return "completed"
    if isinstance(error, GeneratorExit):
        return "abandoned"
    if not isinstance(error, Exception):
        return "cancelled"
    return "stalled" if isinstance(root_cause(error), StreamStalled) else "failed"


def error_type(error: BaseException) -> str:
    """Return a low-cardinality name for an error: its class, or `CancelledError` for trio's `Cancelled` too."""
    name = type(root_cause(error)).__name__
    return "CancelledError" if name == "Cancelled" else name
