"""The framework `echo`: no model at all, for trying a stack of middleware without a key, a network or a cost."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator

from fluxibly.config import LLMConfig
from fluxibly.types import Chunk, ProviderInfo, Request, Response, Usage

_WORD = re.compile(r"\s*\S+\s*")
_INFO = ProviderInfo(name="EchoProvider", framework="echo", telemetry_name="echo", in_process=True)


class EchoProvider:
    """Answers with the text of the last user message, and streams it word by word.

    Words stand for tokens: `usage` counts them, and `max_tokens` cuts the answer after so many (the finish reason is
    then "length"). All other parameters are ignored, since there is no model that could follow them.
    """

    info = _INFO

    def __init__(self, config: LLMConfig) -> None:
        self.model = config.model

    def complete(self, request: Request) -> Response:
        """The last user message's text; "" if there is none."""
        words, end = _answer(request)
        return Response("".join(words), finish_reason=end.finish_reason, usage=end.usage, model=end.model)

    def stream(self, request: Request) -> Generator[Chunk]:
        """The same in a chunk a word, and a last one with the finish reason and the usage."""
        words, end = _answer(request)
        for word in words:
            yield Chunk(word)
        yield end


class AsyncEchoProvider:
    """`EchoProvider` for async pipelines."""

    info = _INFO

    def __init__(self, config: LLMConfig) -> None:
        self._echo = EchoProvider(config)

    async def complete(self, request: Request) -> Response:
        """The last user message's text; "" if there is none."""
        return self._echo.complete(request)

    async def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """The same in a chunk a word, and a last one with the finish reason and the usage."""
        for chunk in self._echo.stream(request):
            yield chunk


def _answer(request: Request) -> tuple[list[str], Chunk]:
    """The words of the answer, white space included, and the chunk that ends it."""
    text = next((message.text for message in reversed(request.messages) if message.role == "user"), "")
    words = _WORD.findall(text) or ([text] if text else [])
    said = words if request.max_tokens is None else words[: request.max_tokens]
    asked = sum(len(message.text.split()) for message in request.messages)
    return said, Chunk(
        finish_reason="stop" if len(said) == len(words) else "length",
        usage=Usage(input_tokens=asked, output_tokens=len(said)),
        model=request.model,
    )
