"""The errors that users catch, and how a call ended. `FluxiblyError` is the root of all of them.

Messages say what happened, to which provider and model, and what to do about it. They never hold an API key: the
code that makes an error out of a server's words masks them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    from typing import Self

    from fluxibly.types import Outcome, Request, Response

Phase: TypeAlias = Literal["connect", "first_byte", "idle", "total"]
"""The part of an attempt that a time limit is for; `Timeouts` has one for each."""


class FluxiblyError(Exception):
    """The root of fluxibly's errors."""


class ConfigError(FluxiblyError, ValueError):
    """A setting is wrong. `problems` lists all that is, each with its path."""

    def __init__(self, message: str, *, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)

    @classmethod
    def of(cls, problems: Sequence[str]) -> Self:
        """The error that lists all of these problems, each with its path."""
        message = "several settings are wrong:\n" + "\n".join(f"- {problem}" for problem in problems)
        return cls(problems[0] if len(problems) == 1 else message, problems=tuple(problems))


class FrameworkNotRegistered(FluxiblyError, ValueError):
    """No provider is registered under this name."""


class ProviderError(FluxiblyError):
    """A provider could not answer. Raise it (or a subclass) from a provider of your own.

    Args:
        message: what happened.
        retryable: whether the same request may succeed later; by default what the class says (see each).
        retry_after: seconds to wait first, as the service asked.
        status: the HTTP status, where there was one.
        code: the service's own error code.
        provider, model: who was asked for what.
        request_id: the service's id of the request, for its support.
        body: an excerpt of what the service sent, with secrets masked.
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
        self.body = body

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class AuthenticationError(ProviderError):
    """The API key is missing, wrong or expired."""


class PermissionDenied(ProviderError):
    """The key is right, but may not do this."""


class NotFound(ProviderError):
    """The model, or the address, does not exist."""


class BadRequest(ProviderError):
    """The service refuses the request as it is."""


class ContextLengthExceeded(BadRequest):
    """The prompt, or prompt and answer together, do not fit the model's context."""


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
    """The service has no room for now. Retryable."""


class ConnectionFailed(ProviderError):
    """No connection, or a connection lost, before the answer was whole. Retryable."""

    default_retryable = True


class RequestTimeout(ProviderError, TimeoutError):
    """A time limit passed. `phase` says which: "connect", "first_byte", "idle" or "total". Retryable."""

    default_retryable = True
    phase: Phase = "total"


class StreamStalled(RequestTimeout):
    """A stream sent nothing for as long as the idle timeout allows. Retryable, if nothing of it had gone out."""

    phase = "idle"


class StreamProtocolError(ProviderError):
    """What the service sent is malformed, too large or cut off: not a whole answer. Retryable."""

    default_retryable = True


class StreamInterrupted(FluxiblyError):
    """A stream failed after some of it had gone out, so that it cannot be tried again without saying things twice.

    `partial` is the response so far, and `__cause__` the error that ended it.
    """

    def __init__(self, message: str = "", *, partial: Response) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[object, ...]:
        return (_interrupted, (*self.args, self.partial))


def _interrupted(message: str, partial: Response) -> StreamInterrupted:
    return StreamInterrupted(message, partial=partial)


def interrupted(request: Request, partial: Response, cause: BaseException) -> StreamInterrupted:
    """The error of a stream that failed after output; raise it `from cause`."""
    return StreamInterrupted(
        f"the stream of {request.model} from {request.call.provider.name} was interrupted after {len(partial.text)} "
        f"characters by {type(cause).__name__}: {cause}",
        partial=partial,
    )


class ResponseInvalid(FluxiblyError):
    """An answer did not pass `Validation`. `response` is that answer; `problem` says what was wrong with it."""

    def __init__(self, message: str = "", *, response: Response, problem: str = "") -> None:
        super().__init__(message)
        self.response = response
        self.problem = problem or message

    def __reduce__(self) -> tuple[object, ...]:
        return (_invalid, (*self.args, self.response, self.problem))


def _invalid(message: str, response: Response, problem: str) -> ResponseInvalid:
    return ResponseInvalid(message, response=response, problem=problem)


def root_cause(error: BaseException) -> BaseException:
    """The error that logs and telemetry name: the cause of a `StreamInterrupted`, else the error itself."""
    while isinstance(error, StreamInterrupted) and error.__cause__ is not None:
        error = error.__cause__
    return error


def outcome_of(error: BaseException | None) -> Outcome:
    """The outcome of a call that raised `error` (None: it returned).

    `GeneratorExit` is how a flow learns that its consumer stopped early. Any other `BaseException` that is no
    `Exception` (asyncio's and trio's cancellation, Ctrl-C) arrived while the call was waited for: it is cancelled.
    """
    if error is None:
        return "completed"
    if isinstance(error, GeneratorExit):
        return "abandoned"
    if not isinstance(error, Exception):
        return "cancelled"
    return "stalled" if isinstance(root_cause(error), StreamStalled) else "failed"


def error_type(error: BaseException) -> str:
    """A name of low cardinality for an error: its class, and `CancelledError` for trio's `Cancelled` as well."""
    name = type(root_cause(error)).__name__
    return "CancelledError" if name == "Cancelled" else name
