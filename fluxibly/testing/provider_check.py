"""`check_provider`: the check of the laws for a user's own provider."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fluxibly.errors import RequestTimeout
from fluxibly.flow.effects import CallNext, Effect, Flow, Send
from fluxibly.flow.relay import Relay
from fluxibly.limits import Leash
from fluxibly.pipeline import AsyncPipeline, Pipeline
from fluxibly.provider import check, is_async, obeys
from fluxibly.testing._trial import LAWS
from fluxibly.testing.modes import BACKENDS, Mode, Ran, run, run_async
from fluxibly.types import Request, Response

AT_ONCE = 4
"""The number of calls that are made at the same time."""


def check_provider(provider: Any, request: Request | None = None, *, failing: Sequence[Request] = ()) -> None:
    """Check that a provider, sync or async, keeps the laws: call it whole and streamed, and several times at once.

    Calls are compared only if the provider gives the same answer to the same request twice in a row. A provider that says
    that it keeps the limits of calls by itself (`obeys = True`) is also called after a deadline has passed.

    Args:
        provider: an instance. The check does not close it.
        request: the request to send; by default, a short greeting.
        failing: requests that have to fail, with the same error whole and streamed.

    Raises:
        AssertionError: the provider breaks a law. The message states the law, what was expected, what happened, in which
            mode, and what to write instead.
    """
    check(provider)
    _Checker(provider, request or Request(model="m", messages="Say hello, please")).check(failing)


class _Late(Relay):
    """A middleware that lets the deadline of a call pass after the last check for it, before the provider is called."""

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        return (yield from self.over(call_next(request)))

    def see(self, effect: Effect) -> Effect:
        if isinstance(effect, Send):
            call = effect.request.call
            call.leash = Leash(call.leash, deadline=call.clock() - 1)
        return effect


class _Checker:
    def __init__(self, provider: Any, request: Request) -> None:
        self.provider = provider
        self.name = type(provider).__name__
        self.request = request
        self.streams = hasattr(provider, "stream")
        self.backends = BACKENDS if is_async(provider) else (None,)

    def fail(self, law: int, what: str, where: object, advice: str) -> AssertionError:
        return AssertionError(f"the provider {self.name} breaks law {law} ({LAWS[law]}): {what} (in {where}). {advice}")

    def check(self, failing: Sequence[Request]) -> None:
        whole = [self.run(Mode(streaming=False, backend=backend)) for backend in self.backends * 2]
        alike = all(ran.response == whole[0].response for ran in whole)
        if self.streams:
            self.check_streams(whole[0].response if alike else None)
        if alike:
            self.keeps_calls_apart(whole[0].response)
        if obeys(self.provider):
            self.keeps_deadlines()
        for request in failing:
            self.check_failure(request)

    def run(self, mode: Mode, *, stop_after: int | None = None) -> Ran:
        """Make a call that has to succeed."""
        before = copy.deepcopy((self.request.metadata, self.request.extra, self.request.headers))
        ran = run(mode, self.provider, [], self.request, stop_after=stop_after)
        if ran.error is not None:
            raise AssertionError(
                f"the provider {self.name}: expected an answer, got {type(ran.error).__name__}: {ran.error} (in {mode}). "
                "Pass check_provider a request that the provider can answer"
            ) from ran.error
        if before != (self.request.metadata, self.request.extra, self.request.headers):
            raise self.fail(
                7,
                "expected the request unchanged, got other metadata, extra or headers",
                mode,
                "Copy metadata, extra and headers before you change them",
            )
        return ran

    def check_streams(self, whole: Response | None) -> None:
        for backend in self.backends:
            mode = Mode(streaming=True, backend=backend)
            ran = self.run(mode)
            if whole is not None and ran.response != whole:
                raise self.fail(
                    1,
                    f"expected the same response from complete() and stream(), got {whole!r} and {ran.response!r}",
                    mode,
                    "Return the same from both methods, finish reason and usage included",
                )
            for stop_after in (0, 1):
                self.releases(mode, stop_after)

    def releases(self, mode: Mode, stop_after: int) -> None:
        """Check law 2: closing a stream early works, and leaves the provider usable."""
        error = run(mode, self.provider, [], self.request, stop_after=stop_after).error
        if error is not None:
            raise self.fail(
                2,
                f"expected its stream to close after {stop_after} chunks, got {error!r}",
                mode,
                "Release resources in a `finally`, and neither yield nor raise there",
            ) from error

    def keeps_calls_apart(self, response: Response | None) -> None:
        """Check law 8: each of several concurrent calls gets the same response as a call alone."""
        for backend in self.backends:
            answers = self.threads() if backend is None else run_async(self.tasks, backend)
            if any(answer != response for answer in answers):
                raise self.fail(
                    8,
                    f"expected the same response for {AT_ONCE} concurrent calls as for a call alone, got other responses",
                    "threads" if backend is None else f"tasks on {backend}",
                    "Keep the state of a call in local variables, not on the provider",
                )

    def keeps_deadlines(self) -> None:
        """Check law 11: a call whose deadline has passed fails, because nobody else watches the time."""
        for backend in self.backends:
            for streaming in (False, True) if self.streams else (False,):
                mode = Mode(streaming=streaming, backend=backend)
                ran = run(mode, self.provider, [_Late()], self.request)
                if not isinstance(ran.error, RequestTimeout):
                    got = repr(ran.response if ran.error is None else ran.error)
                    raise self.fail(
                        11,
                        f"expected RequestTimeout or DeadlineExceeded after the deadline of a call, got {got}",
                        mode,
                        "Keep the limits of `request.call.leash` (its deadline is a time of `request.call.clock`), or leave out "
                        "`obeys = True`, so that the pipeline keeps them",
                    ) from ran.error

    def threads(self) -> list[Response]:
        pipeline = Pipeline(self.provider)

        def call(_: int) -> list[Response]:
            if not self.streams:
                return [pipeline.complete(self.request)]
            one, two = pipeline.stream(self.request), pipeline.stream(self.request)
            open_streams = [one, two]
            while open_streams:
                open_streams = [stream for stream in open_streams if next(stream, None) is not None]
            return [one.response, two.response, pipeline.complete(self.request)]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [answer for answers in pool.map(call, range(AT_ONCE)) for answer in answers]

    async def tasks(self) -> list[Response]:
        import anyio

        pipeline = AsyncPipeline(self.provider)
        answers: list[Response] = []

        async def call() -> None:
            answers.append(await pipeline.complete(self.request))
            if self.streams:
                async with pipeline.stream(self.request) as stream:
                    async for _ in stream:
                        pass
                    answers.append(stream.response)

        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(call)
        return answers

    def check_failure(self, request: Request) -> None:
        """Check laws 1 and 11: a request that has to fail raises the same error, whole and streamed."""
        errors: list[str] = []
        for backend in self.backends:
            for streaming in (False, True) if self.streams else (False,):
                mode = Mode(streaming=streaming, backend=backend)
                ran = run(mode, self.provider, [], request)
                if ran.error is None:
                    raise self.fail(
                        11,
                        f"expected an error, got {ran.response!r}",
                        mode,
                        "Raise ProviderError or a subclass",
                    )
                cause = ran.error.__cause__ if ran.events and ran.error.__cause__ is not None else ran.error
                errors.append(f"{type(cause).__name__}: {cause}")
                if errors[-1] != errors[0]:
                    raise self.fail(
                        1,
                        f"expected the same error for one request in all modes, got {errors[0]!r} and {errors[-1]!r}",
                        mode,
                        "Raise the same error from complete() and stream()",
                    )
