"""A batch API over HTTP: its questions, the upload of rows from a file, and results line by line."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, BinaryIO, Final

from fluxibly.errors import AuthenticationError, BadRequest, ProviderError, StreamProtocolError
from fluxibly.limits import Leash
from fluxibly.messages import Message
from fluxibly.providers.dialects.batches import MAX_RESULT, APICall, Result, Upload, unanswered
from fluxibly.providers.dialects.errors import error_of_payload
from fluxibly.providers.dialects.json_values import read_json
from fluxibly.providers.dialects.model_lists import MAX_PAGE
from fluxibly.providers.http._exchange import with_header_facts
from fluxibly.providers.http._limits import Limits
from fluxibly.providers.http._reader import ReplyBody, refusal
from fluxibly.types import Request, Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fluxibly.providers.dialects.batches import BatchAPI
    from fluxibly.providers.http._endpoint import Endpoint
    from fluxibly.providers.http._exchange import Exchange, Outgoing, Sender

QUESTION: Final = 60.0
"""The most seconds for an answer that is no file."""


class BatchClient:
    """A service's batch API, for event loops. Nothing but a GET is ever sent again by itself.

    Args:
        find_key: finds a key for a request, if a function gives the keys.
        renew: whether to send once more after a refusal of that key.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        sender: Sender,
        api: BatchAPI,
        *,
        find_key: Callable[[Request], Awaitable[None]],
        renew: Callable[[Outgoing, Request, Exception], Awaitable[bool]],
    ) -> None:
        self.api = api
        self._endpoint = endpoint
        self._sender = sender
        self._find_key = find_key
        self._renew = renew

    def row(self, custom_id: str, request: Request) -> bytes:
        """Return a request as a row of a batch.

        Raises:
            BadRequest: the dialect or the batch API does not support a parameter of the request.
        """
        try:
            if request.headers:
                raise BadRequest("a request in a batch has no headers of its own; set headers in the configuration")
            encoded = self._endpoint.codec.encode(request, stream=False)
        except ProviderError as error:
            raise self._endpoint.completed_with(error, request) from error.__cause__
        return self.api.row(custom_id, encoded.body)

    def answer(self, result: Result, request: Request) -> Response:
        """Return the answer in a result, as a call would have returned it.

        Args:
            request: the request, or one for the same model: errors name it.

        Raises:
            ProviderError: what such a call would have raised, or the request was never come to.
        """
        endpoint = self._endpoint
        headers = {} if result.request_id is None else {"x-request-id": result.request_id}
        try:
            if result.fate == "answered":
                return with_header_facts(endpoint.decoded(result.body), headers)
            if result.fate in ("expired", "cancelled"):
                raise unanswered(result)
            if result.status is None:
                raise error_of_payload(read_json(result.body), body=result.body) or StreamProtocolError(
                    "expected an answer or an error from the batch, got neither"
                )
        except ProviderError as error:
            raise endpoint.completed_with(error, request, headers) from None
        raise endpoint.refuse(result.status, headers, result.body, request)

    async def ask(self, call: APICall) -> bytes:
        """Send a request, and return the body of its answer.

        Raises:
            ProviderError: the service is not reached, or refuses. Without a `status`, a POST may have had its effect.
        """
        return await self._whole(lambda: self._endpoint.calling(call), self._question_limits)

    async def upload(self, upload: Upload, rows: BinaryIO) -> bytes:
        """Send rows, and return the body of the answer. `rows` is read from its beginning.

        Raises:
            ProviderError: as of `ask`.
        """
        return await self._whole(lambda: self._endpoint.uploading(upload, rows), self._file_limits)

    async def results(self, path: str) -> AsyncGenerator[Result]:
        """Yield the results in a file of the service, without lines that name no request. Close it, or read it to its end.

        A line that cannot be read harms no other, unless it is the last, which may have been cut, or there is no result at all.

        Raises:
            ProviderError: the service is not reached, refuses, ends the file too early, or sends no results.
        """
        limits = self._file_limits()
        request = _request(None)
        headers: Mapping[str, str] | None = None
        try:
            async with self._exchange(lambda: self._endpoint.calling(APICall(path=path)), limits, request) as exchange:
                headers = exchange.headers
                lines, body = _Lines(), ReplyBody(headers)
                broken: StreamProtocolError | None = None
                has_results = False
                while data := await exchange.read():
                    for piece in body.decode(data):
                        for line in lines.feed(piece):
                            try:
                                found = self.api.result(line)
                            except StreamProtocolError as error:
                                broken = error
                                continue
                            if found is not None:
                                has_results = True
                                yield found
                body.end()
                if broken is not None and not has_results:
                    raise broken
                last = lines.rest()
                if last.strip() and (found := self.api.result(last)) is not None:
                    yield found
        except Exception as error:
            ours = self._endpoint.failure(error, request, limits, headers)
            if ours is error:
                raise
            raise ours from error

    async def _whole(self, make: Callable[[], Outgoing], limits_of: Callable[[], Limits]) -> bytes:
        request, limits = _request(QUESTION), limits_of()
        headers: Mapping[str, str] | None = None
        try:
            async with self._exchange(make, limits, request) as exchange:
                headers = exchange.headers
                self._endpoint.check_page(headers)
                body = ReplyBody(headers, limit=MAX_PAGE)
                while data := await exchange.read():
                    body.add(data)
                return body.whole()
        except Exception as error:
            ours = self._endpoint.failure(error, request, limits, headers)
            if ours is error:
                raise
            raise ours from error

    @asynccontextmanager
    async def _exchange(
        self, make: Callable[[], Outgoing], limits: Limits, request: Request
    ) -> AsyncGenerator[Exchange]:
        """Send a request, and give its answer, which is no refusal."""
        again = False
        while True:
            await self._find_key(request)
            outgoing = make()
            exchange = await self._sender.send(outgoing, limits)
            try:
                if 200 <= exchange.status < 300:
                    yield exchange
                    return
                error = await refusal(self._endpoint, exchange, request, limits)
            finally:
                await exchange.release(ended=False)
            if again or not isinstance(error, AuthenticationError) or not await self._renew(outgoing, request, error):
                raise error
            again = True

    def _question_limits(self) -> Limits:
        return Limits(self._endpoint.times, total=QUESTION)

    def _file_limits(self) -> Limits:
        return Limits(self._endpoint.times, total=None)


class _Lines:
    """The lines of a file that arrives in pieces."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Take a piece, and return the lines that it has completed, without blank ones.

        Raises:
            StreamProtocolError: a line is over the limit.
        """
        first, *others = piece.split(b"\n")
        self._parts.append(first)
        self._size += len(first)
        if self._size > MAX_RESULT:
            raise StreamProtocolError(
                f"expected results of at most {MAX_RESULT:,} bytes a line, got more", retryable=False
            )
        if not others:
            return []
        lines = [self.rest(), *others]
        last = lines.pop()
        self._parts, self._size = [last], len(last)
        return [line for line in lines if line and not line.isspace()]

    def rest(self) -> bytes:
        """Return the last line, which has no end yet."""
        line = b"".join(self._parts)
        self._parts, self._size = [], 0
        return line


def _request(seconds: float | None) -> Request:
    """Return a request that is never sent: errors are completed for it, and its call says how long a key may take."""
    request = Request(model="", messages=(Message.user("-"),))
    if seconds is not None:
        request.call.leash = Leash(deadline=request.call.clock() + seconds)
    return request
