"""Middleware that logs each call with the standard library's `logging`, under the logger `fluxibly`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from fluxibly._checks import kind_of, validator
from fluxibly._logs import log, logger, one_line, report_once
from fluxibly._masking import error_message
from fluxibly.errors import error_type, outcome_of
from fluxibly.flow import CallNext, Flow
from fluxibly.flow.culprits import check_delivered
from fluxibly.middleware._redact_setting import RedactText, check_redact, redact_text, to_redact
from fluxibly.types import Request, Response, Text

if TYPE_CHECKING:
    from fluxibly.middleware.redact import Redact

PREVIEW = 100
"""The number of characters of a prompt or an answer that a DEBUG line shows."""


@attrs.frozen(kw_only=True)
class Logging:
    """Middleware that logs the start and end of each call at INFO, failures at ERROR, and text previews at DEBUG.

    For structured handlers, the record has every value of its line as an attribute of the same name. The exception is
    the provider's name, which is `provider_name`, because a record's `name` is that of the logger. The last record of a
    call also has its `outcome` ("completed", "failed", "abandoned", "cancelled", "stalled"). Prompts and answers appear
    only at DEBUG, and the texts of the request are masked in error messages. Times are in seconds, lengths in
    characters.

    Args:
        redact: a `Redact`, or a function that receives a text and returns the text to log instead, for previews and error
            messages. If it raises, they are left empty.

    Raises:
        ConfigError: `redact` is none of these.
    """

    redact: Redact | RedactText | None = attrs.field(
        default=None, converter=to_redact, validator=attrs.validators.optional(validator(check_redact))
    )

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        call = request.call
        if not logger.isEnabledFor(logging.ERROR):
            return (yield from call_next(request))
        start = call.clock()
        prompt_length = request.prompt_length
        _started(request, prompt_length)
        try:
            response = yield from call_next(request)
            if call.interruption is not None:
                check_delivered(call, response)
        except BaseException as error:
            _ended(request, error, call.clock() - start, self._shown)
            raise
        if logger.isEnabledFor(logging.INFO):
            elapsed = call.clock() - start
            if call.streaming:
                _streamed(request, response, elapsed)
            else:
                _completed(request, response, elapsed, prompt_length, self._shown)
        return response

    def _shown(self, *texts: str) -> str:
        """Return texts as they are logged: joined, after `redact`; an empty str if that fails."""
        redact = redact_text(self.redact)
        if redact is None:
            return "".join(texts)
        try:
            # Each by itself, because a border between two texts may end what is to be found.
            return "".join([_text(redact(text)) for text in texts])
        except Exception as problem:  # noqa: BLE001  # the user's function, whose failure must not end the call
            kind = type(problem).__name__
            report_once(
                "redact of logging", f"Logging: redact raised {kind}; the log leaves out the texts for which it raises"
            )
            return ""


def _text(redacted: object) -> str:
    if not isinstance(redacted, str):
        raise TypeError(f"redact: expected a str as its result, got {kind_of(redacted)}")
    return redacted


def _started(request: Request, prompt_length: int) -> None:
    provider = request.call.provider
    what = "streaming request" if request.call.streaming else "request"
    log(
        logging.INFO,
        f"LLM {what} started | name=%s, framework=%s, model=%s, prompt_length=%d",
        provider_name=provider.name,
        framework=provider.framework,
        model=one_line(request.model),
        prompt_length=prompt_length,
    )


def _completed(
    request: Request, response: Response, elapsed: float, prompt_length: int, shown: Callable[..., str]
) -> None:
    template, more = _found("LLM request completed | elapsed_time=%.2fs, prompt_length=%d, response_length=%d", request)
    log(
        logging.INFO,
        template,
        elapsed_time=elapsed,
        prompt_length=prompt_length,
        response_length=len(response.text),
        **more,
        outcome="completed",
    )
    if logger.isEnabledFor(logging.DEBUG):
        log(
            logging.DEBUG,
            'LLM request details | prompt_preview="%s", response_preview="%s", elapsed_time=%.3f',
            prompt_preview=_preview(shown(*_texts(request))),
            response_preview=_preview(shown(response.text)),
            elapsed_time=elapsed,
        )


def _streamed(request: Request, response: Response, elapsed: float) -> None:
    # The response of a call with several turns is only the last message.
    total_length = request.call.characters if response.added else len(response.text)
    # A response that was not streamed (a cache hit) reaches the consumer as one chunk, but only after this line.
    total_chunks = request.call.chunks or int(bool(response.has_output or response.finish_reason))
    template, more = _found("LLM streaming completed | elapsed_time=%.2fs, total_chunks=%d, total_length=%d", request)
    log(
        logging.INFO,
        template,
        elapsed_time=elapsed,
        total_chunks=total_chunks,
        total_length=total_length,
        **more,
        outcome="completed",
    )
    if logger.isEnabledFor(logging.DEBUG):
        log(
            logging.DEBUG,
            "LLM streaming details | total_chunks=%d, total_length=%d, avg_chunk_size=%.1f",
            total_chunks=total_chunks,
            total_length=total_length,
            avg_chunk_size=total_length / total_chunks if total_chunks else 0.0,
        )


def _found(template: str, request: Request) -> tuple[str, dict[str, Any]]:
    """Add what layers further in have found about a call to the line of its end: a hit of a cache, and the cost."""
    call = request.call
    more: dict[str, Any] = {}
    if call.cache_hit:
        template += ", cache_hit=%s"
        more["cache_hit"] = True
    if call.cost is not None:
        template += ", cost=%.6f"
        more["cost"] = call.cost
    return template, more


def _ended(request: Request, error: BaseException, elapsed: float, shown: Callable[..., str]) -> None:
    """Log the end of a call that raised: it failed, was cancelled, or was abandoned by its consumer."""
    call = request.call
    outcome = outcome_of(error)
    what = "streaming" if call.streaming else "request"
    if outcome in ("abandoned", "cancelled"):
        template = f"LLM {what} {outcome} | elapsed_time=%.2fs"
        values: dict[str, Any] = {"elapsed_time": elapsed}
        if call.streaming:
            template += ", total_chunks=%d, total_length=%d"
            values |= {"total_chunks": call.chunks, "total_length": call.characters}
        log(logging.INFO, template, **values, outcome=outcome)
        return
    template = f'LLM {what} failed | elapsed_time=%.2fs, error_type=%s, error_message="%s"'
    values = {
        "elapsed_time": elapsed,
        "error_type": error_type(error),
        "error_message": one_line(shown(error_message(error, (request,)))),
    }
    if call.streaming:
        template += ", chunks_received=%d"
        values["chunks_received"] = call.chunks
    log(logging.ERROR, template, **values, outcome=outcome)


def _texts(request: Request) -> list[str]:
    return [part.text for message in request.messages for part in message.content if isinstance(part, Text)]


def _preview(text: str) -> str:
    return one_line(text[:PREVIEW]) + ("..." if len(text) > PREVIEW else "")
