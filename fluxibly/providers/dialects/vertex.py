"""Pure codec for Vertex AI, which serves Google's models in Gemini's dialect, and Claude in Anthropic's.

https://cloud.google.com/vertex-ai/generative-ai/docs/model-reference/inference
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote

import attrs

from fluxibly.errors import ProviderError, QuotaExceeded
from fluxibly.providers.dialects import anthropic, gemini
from fluxibly.providers.dialects.anthropic import AnthropicCodec
from fluxibly.providers.dialects.codec import Codec, Encoded, Event, Framing, StreamDecoder
from fluxibly.providers.dialects.decoding import cut_off
from fluxibly.providers.dialects.encoding import bad_request, write_json
from fluxibly.providers.dialects.errors import error_of_event, error_of_response
from fluxibly.providers.dialects.gemini import GeminiCodec
from fluxibly.providers.dialects.json_values import as_object, as_text, read_json
from fluxibly.providers.dialects.schemas import SchemaLearner
from fluxibly.types import Chunk, Request, Response

NAME = "Vertex AI"
ANTHROPIC_VERSION: Final = "vertex-2023-10-16"
"""The version of Anthropic's API that `AnthropicCodec` speaks, by its name on Vertex AI."""
GEMINI: Final[Codec] = GeminiCodec()
ANTHROPIC: Final[Codec] = AnthropicCodec()

PLACED: Final = re.compile(r"(?P<parent>projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+))/(?P<model>.+)")
"""The name of a model with its place."""
_MODEL: Final = re.compile(r"(?:(?:publishers/)?(?P<publisher>[\w-]+)/(?:models/)?)?(?P<model>[^/]+)")
"""The name of a model, with its publisher or without; or of an endpoint: "endpoints/123"."""
_NOT_NAMES: Final = ("", ".", "..")
"""The segments of a path that a server or a proxy may drop."""


@attrs.frozen
class VertexCodec(SchemaLearner):
    """Codec for `:generateContent` of Google's models and of endpoints, and `:rawPredict` of Claude.

    Args:
        parent: the place of models whose name has none: "projects/…/locations/…"; None for calls with an API key, which
            has a project of its own.
        versioned: whether the address ends with the version of the API, which is otherwise part of the path.
        region: the region of the address; None if the address may lead anywhere.
    """

    parent: str | None
    versioned: bool = False
    region: str | None = None

    @property
    def framing(self) -> Framing:
        return "sse"

    def encode(self, request: Request, /, *, stream: bool) -> Encoded:
        path, request = self._path(request), self.with_known_form(request)
        if "/publishers/anthropic/" in path:
            body = {"anthropic_version": ANTHROPIC_VERSION, **anthropic.encode_body(request, stream=stream)}
            del body["model"]
            version, method = "/v1", "streamRawPredict" if stream else "rawPredict"
        else:
            body = gemini.encode_body(request)
            version, method = "/v1beta1", "streamGenerateContent?alt=sse" if stream else "generateContent"
        return Encoded(f"{'' if self.versioned else version}{path}:{method}", write_json(body, request))

    def _path(self, request: Request) -> str:
        """Return the path of a request's model.

        Raises:
            BadRequest: the name is malformed; another publisher made the model; or it needs a project, and there is none.
        """
        parent, model = self.parent, request.model.removeprefix("models/")
        if placed := PLACED.fullmatch(model):
            parent, model = placed["parent"], placed["model"]
            if self.region not in (None, placed["region"]):
                raise bad_request(
                    request,
                    f"expected a model in {self.region!r}, where the calls go, got one in {placed['region']!r}: set region",
                )
        found = _MODEL.fullmatch(model)
        if found is None or not set(_NOT_NAMES).isdisjoint(request.model.split("/")):
            raise bad_request(
                request,
                f"expected the name of a model for {NAME}, such as 'gemini-2.5-flash', 'anthropic/claude-opus-4-6' or "
                f"'projects/…/locations/…/endpoints/…', got {request.model!r}",
            )
        name = quote(found["model"], safe="@", errors="replace")
        publisher = found["publisher"] or ("anthropic" if model.startswith("claude") else "google")
        if publisher not in ("google", "anthropic", "endpoints"):
            raise bad_request(
                request,
                f"expected a model of Google or Anthropic for {NAME}, got one of {publisher!r}: use framework 'openai' with "
                "api_base https://REGION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/REGION/endpoints/openapi",
            )
        if parent is None and publisher != "google":
            raise bad_request(request, f"expected a project besides the API key for {NAME}, got none: set project")
        path = f"/endpoints/{name}" if publisher == "endpoints" else f"/publishers/{publisher}/models/{name}"
        return path if parent is None else f"/{quote(parent, safe='/:', errors='replace')}{path}"

    def decode(self, body: bytes, /) -> Response:
        return (ANTHROPIC if _is_anthropic(body) else GEMINI).decode(body)

    def decoder(self) -> VertexDecoder:
        return VertexDecoder()

    def decode_error(self, status: int, headers: Mapping[str, str], body: bytes, /) -> ProviderError:
        # All models share Google's quotas, which Gemini's codec knows.
        exhausted = isinstance(GEMINI.decode_error(status, headers, body), QuotaExceeded)
        return error_of_response(status, headers, body, service=NAME, kind=QuotaExceeded if exhausted else None)


class VertexDecoder:
    """Decoder of a stream, whose first event shows the dialect."""

    __slots__ = ("_decoder",)

    def __init__(self) -> None:
        self._decoder: StreamDecoder | None = None

    @property
    def done(self) -> bool:
        return self._decoder is not None and self._decoder.done

    def decode_event(self, event: Event, /) -> Iterable[Chunk]:
        if self._decoder is None:
            if event.name == "error":
                raise error_of_event(event.data, service=NAME)
            self._decoder = (ANTHROPIC if _is_anthropic(event.data) else GEMINI).decoder()
        return self._decoder.decode_event(event)

    def end(self) -> Iterable[Chunk]:
        if self._decoder is None:
            raise cut_off(NAME, "an event")
        return self._decoder.end()


def _is_anthropic(data: bytes) -> bool:
    """Whether an answer or an event is in Anthropic's dialect, in which each has a type."""
    return bool(as_text(as_object(read_json(data)).get("type")))
