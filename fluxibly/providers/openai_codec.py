"""OpenAI's chat completions, as OpenAI and the services that nearly speak it send them. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

import attrs

from fluxibly.aggregate import Aggregator
from fluxibly.errors import ProviderError
from fluxibly.providers import error_reports
from fluxibly.providers.codec import Encoded, Framing
from fluxibly.providers.json_reading import read_json
from fluxibly.providers.openai_choice import Choice
from fluxibly.providers.openai_request import Quirks, chat_body
from fluxibly.providers.openai_stream import Body as Body, ChatDecoder as ChatDecoder, to_body
from fluxibly.providers.wire import not_an_answer, write_json
from fluxibly.types import Request, Response


@attrs.frozen
class OpenAICodec:
    """The codec of one service's chat completions. `service` is its name for error messages."""

    quirks: Quirks = attrs.field(factory=Quirks)
    service: str = "OpenAI"

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        """The request on the wire.

        Raises:
            BadRequest: for a parameter that the service does not have, or that cannot be written as JSON.
        """
        body = chat_body(request, self.quirks, stream=stream, service=self.service)
        path = self.quirks.path
        if "{model}" in path:
            path = path.replace("{model}", quote(request.model, safe=""))
        return Encoded(path, write_json(body, request))

    def decode(self, body: bytes, /) -> Response:
        """The response of a whole body.

        Raises:
            ProviderError: for an error in a 200.
            StreamProtocolError: for what is no answer.
        """
        raw = read_json(body)
        found = to_body(raw, body, self.service)
        if not found.error and not any(map(_says_something, found.choices or ())):
            raise not_an_answer(raw, body, self.service, "message in its choices")
        joined = Aggregator()
        for chunk in ChatDecoder(self.service).take_whole(found, body):
            joined.add(chunk)
        return joined.response().evolve(raw=raw)

    def decoder(self) -> ChatDecoder:
        """The state of a stream."""
        return ChatDecoder(self.service)

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        """The error of an answer that is not a 2xx."""
        return error_reports.error_of_response(status, headers, body, service=self.service)


def _says_something(choice: Choice | None) -> bool:
    return choice is not None and (
        choice.message is not None or choice.delta is not None or choice.text is not None or bool(choice.error)
    )
