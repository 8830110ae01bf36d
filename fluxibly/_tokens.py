"""Guesses of token counts from the size of texts, for services that report none."""

from __future__ import annotations

from fluxibly.calls import Usage
from fluxibly.parts import Text
from fluxibly.types import Request, Response

BYTES_A_TOKEN = 3.5
"""As measured for common tokenizers: English has more, other scripts and JSON have less."""


def size_of(request: Request) -> int:
    """Return the bytes of a request's texts and tools. Media are not counted: what they take is learned with the rest."""
    size = 0
    for message in request.messages:
        for part in message.content:
            if isinstance(part, Text):
                text = part.text
                size += len(text) if text.isascii() else bytes_of(text)
    for tool in request.tools:
        size += len(tool.description or "") + len(repr(tool.parameters))
    return size


def bytes_of(text: str) -> int:
    """Return the bytes of a text, which may have half a surrogate pair."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def guessed_usage(request: Request, answer: Response | None, usage: Usage | None, error: BaseException | None) -> Usage:
    """Return the tokens that count for an attempt that was sent, where the service reported none, or not all of them.

    An attempt that failed before any output took nothing. One that was cut off before output took the input.

    Args:
        answer: the answer, or the part of it that came.
        usage: what the service has reported. Of an attempt that was cut off, it may not count all of the output.
    """
    came = answer is not None and answer.has_output
    reported = usage or Usage()
    if isinstance(error, Exception) and not came and usage is None:
        return Usage(input_tokens=0, output_tokens=0)
    taken = reported.input_tokens
    if taken is None:
        taken = round(size_of(request) / BYTES_A_TOKEN) + 1
    output = 0 if answer is None else round(output_size(answer) / BYTES_A_TOKEN)
    return Usage(input_tokens=taken, output_tokens=max(output, reported.output_tokens or 0))


def output_size(answer: Response) -> int:
    """Return the bytes of an answer's text, reasoning and tool calls."""
    size = bytes_of(answer.text) + bytes_of(answer.reasoning)
    for call in answer.tool_calls:
        size += len(call.name) + bytes_of(call.raw_arguments)
    return size + sum(map(output_size, answer.alternatives))
