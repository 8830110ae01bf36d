"""The framework `echo`, which has no model, for trying a middleware stack without a key, a network or costs."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator

from fluxibly.config import LLMConfig
from fluxibly.providers.dialects.encoding import bad_request, format_of
from fluxibly.types import Chunk, ProviderInfo, Request, Response, Text, Usage

_WORD = re.compile(r"\s*\S+\s*")
_INFO = ProviderInfo(name="EchoProvider", framework="echo", telemetry_name="echo", in_process=True)


class EchoProvider:
    """Provider that answers with the text of the last user message, and streams it word by word.

    Words stand for tokens: `usage` counts them, and `max_tokens` limits the number of words (the finish reason is then
    "length"). `stop` ends the text. Parameters of sampling (`temperature`, `seed`, …) change nothing, because nothing is
    sampled. A call that asks for more than its text back is refused: tools, media, other response formats, several
    choices, reasoning, `extra`.
    """

    info = _INFO

    def __init__(self, config: LLMConfig) -> None:
        self.model = config.model

    def complete(self, request: Request) -> Response:
        """Return the last user message's text, or "" without a user message.

        Raises:
            BadRequest: the call asks for more than that.
        """
        words, end = _answer(request)
        return Response("".join(words), finish_reason=end.finish_reason, usage=end.usage, model=end.model)

    def stream(self, request: Request) -> Generator[Chunk]:
        """Yield a chunk for each word of the same text, then a last chunk with the finish reason and the usage."""
        words, end = _answer(request)
        for word in words:
            yield Chunk(word)
        yield end


class AsyncEchoProvider:
    """Asynchronous variant of `EchoProvider`."""

    info = _INFO

    def __init__(self, config: LLMConfig) -> None:
        self._echo = EchoProvider(config)

    async def complete(self, request: Request) -> Response:
        """Return the last user message's text, or "" without a user message."""
        return self._echo.complete(request)

    async def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """Yield a chunk for each word of the same text, then a last chunk with the finish reason and the usage."""
        for chunk in self._echo.stream(request):
            yield chunk


def _refuse(request: Request) -> None:
    """Raise BadRequest for a call that cannot be answered by repeating text."""
    wanted = {
        "tools": bool(request.tools),
        "tool_choice": request.tool_choice not in (None, "auto", "none"),
        "response_format": format_of(request) not in (None, "text"),
        "n": request.n not in (None, 1),
        "reasoning_effort": request.reasoning_effort not in (None, "none"),
        "extra (or additional_params)": bool(request.extra),
        "images, audio or files": not all(
            isinstance(part, Text) for message in request.messages for part in message.content
        ),
    }
    refused = [name for name, found in wanted.items() if found]
    if refused:
        raise bad_request(request, f"echo has no model, and only repeats text: leave out {', '.join(refused)}")


def _said(request: Request) -> str:
    """Return the text to repeat: that of the last user message, up to the first `stop`."""
    text = next((message.text for message in reversed(request.messages) if message.role == "user"), "")
    ends = [end for stop in request.stop if (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _answer(request: Request) -> tuple[list[str], Chunk]:
    """Return the words of the answer, with their white space, and the chunk that ends the answer."""
    _refuse(request)
    text = _said(request)
    words = _WORD.findall(text) or ([text] if text else [])
    said = words if request.max_tokens is None else words[: request.max_tokens]
    asked = sum(len(message.text.split()) for message in request.messages)
    return said, Chunk(
        finish_reason="stop" if len(said) == len(words) else "length",
        usage=Usage(input_tokens=asked, output_tokens=len(said)),
        model=request.model,
    )
