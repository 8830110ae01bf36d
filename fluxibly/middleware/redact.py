"""Middleware that keeps personal data and keys from leaving, and puts them back into the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import attrs

from fluxibly._checks import is_mapping, truth, validator
from fluxibly.errors import ConfigError
from fluxibly.flow import CallNext, Flow, map_chunks
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._patterns import Finder, Pattern, to_patterns
from fluxibly.middleware._placeholders import Came, Replaced, Sent, Template, check_template
from fluxibly.middleware._redacted_answers import AnswerScanner
from fluxibly.middleware._redacted_messages import changed_message, changed_values, texts_of
from fluxibly.middleware._redacting import Matcher, redacted
from fluxibly.types import Message, Request, Response

Patterns: TypeAlias = Sequence[str] | Mapping[str, bool | str | Finder | Mapping[str, str]]
"""What to find: names, or a mapping of names to patterns."""


def _copied(patterns: Patterns) -> Patterns:
    if is_mapping(patterns):
        return dict(patterns)
    return tuple(patterns) if isinstance(patterns, list) else patterns


@attrs.frozen(kw_only=True, eq=False)
class Redact(Rebuilt):
    """Middleware that replaces personal data and keys in what is sent, and in what comes back.

    All texts of a request's messages are searched: prompts, system messages, reasoning, the arguments and results of tools. In
    JSON, strings are searched as what they stand for, and the JSON stays valid. Of an answer, its text, reasoning, tool calls,
    further choices and details are searched, in a stream across the borders of chunks. What can no longer become part of a match
    goes out at once.

    Not searched: images, audio and documents (but their transcripts and names), tool definitions, `extra`, headers and
    `metadata`; and what only the service reads: signed reasoning without `raw`, opaque parts, and every `raw` of an answer, which goes
    back as it came.

    Layers further out see the originals. `Tracing(redact=…)` and `Logging(redact=…)` take a `Redact` as well.

    Args:
        patterns: what to find, as a list of names or as a mapping of names to patterns. Known by name are "email", "phone",
            "card", "iban", "ip" (addresses of both versions) and "key" (API keys, tokens, private keys). In a mapping, True
            stands for the pattern of that name, a str is a regular expression, and a function takes a text and returns the
            places of what it finds, as pairs (start, end). Of an answer, it gets a sentence at a time. In a list, a name also
            stands for a registered function; in a mapping, so does `{"function": name}`.
        replace: what takes the place of a match. `{name}` is the name of the pattern.
        outgoing: whether to search what is sent.
        incoming: whether to search what comes back.
        restore: whether to put the originals of what was replaced in the request back into what comes in. Each original then
            has its own placeholder, such as "[email_1]": the number stands behind the name, or at `{number}`. `replace` needs
            marks around it then, of which the first is in it only once.

    Raises:
        ConfigError: a pattern is not known, is no regular expression, or matches without any text; or the other settings do not
            go together.
    """

    patterns: Patterns = attrs.field(default=("email", "phone", "card", "iban", "key"), converter=_copied)
    replace: str = attrs.field(default="[{name}]", validator=validator(check_template))
    outgoing: bool = attrs.field(default=True, validator=validator(truth))
    incoming: bool = attrs.field(default=True, validator=validator(truth))
    restore: bool = attrs.field(default=False, validator=validator(truth))
    _all: Matcher = attrs.field(init=False, repr=False)
    """Finds what the patterns find."""
    _restoring: Matcher = attrs.field(init=False, repr=False)
    """With `restore`: finds placeholders, and with `incoming` what the patterns find."""
    _placeholder: Pattern | None = attrs.field(init=False, repr=False)
    """Finds whatever looks like a placeholder; None: there are none."""
    _template: Template = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        patterns = to_patterns(self.patterns)
        template = Template(self.replace)
        names = {each.name for each in patterns}
        if self.restore and (problem := template.problem(names)) is not None:
            raise ConfigError(f"Redact: replace: {problem}, got {self.replace!r}")
        if "number" in template.fields and not self.restore:
            raise ConfigError(
                "Redact: replace: expected {number} only with restore=True; leave it out, or set restore=True"
            )
        if self.restore and not self.outgoing:
            raise ConfigError("Redact: restore=True restores what was replaced in what is sent; set outgoing=True")
        if not self.outgoing and not self.incoming:
            raise ConfigError("Redact: outgoing=False and incoming=False leave nothing to do; leave Redact out")
        everything = Matcher(patterns)
        placeholder = template.placeholders(names) if self.restore else None
        restoring = everything
        if placeholder is not None:
            restoring = Matcher(patterns if self.incoming else (), placeholder, template.head)
        for name, value in (
            ("_template", template),
            ("_all", everything),
            ("_restoring", restoring),
            ("_placeholder", placeholder),
        ):
            object.__setattr__(self, name, value)

    def text(self, text: str) -> str:
        """Return a text with all matches replaced, each by the name of its pattern alone."""
        return redacted(text, self._all, Replaced(self._template))

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        originals: Mapping[str, str] = {}
        if self.outgoing and not self._finds_nothing_in(request.messages):
            request, originals = self._replaced_in(request)
        if not self.incoming and not originals:
            return (yield from call_next(request))
        matcher = self._restoring if originals else self._all
        flow = call_next(request)
        whole: list[Response] = []
        if request.call.streaming:
            flow = _noted(flow, whole)
        else:
            response = yield from flow
            if matcher.finds_nothing(response.text) and _is_text(response):
                return response
            whole.append(response)
            flow = _returned(response)
        came = Came(self._template, originals)
        scanner = AnswerScanner(matcher, came, spelled=not self.incoming)
        response = yield from map_chunks(flow, scanner.chunk, scanner.end, at_restart=scanner.begin)
        came.tell(request, "in the answer")
        if whole[0].parsed is not None and response.parsed is None:
            # It is made of the text before the changes. A value of another type is left out.
            with suppress(TypeError, ValueError, RecursionError):
                response = response.evolve(parsed=changed_values(whole[0].parsed, scanner.text, strict=True))
        return response

    def _finds_nothing_in(self, messages: Sequence[Message]) -> bool:
        """Whether a quick look tells that messages have no match."""
        if not self._all.is_known and any(message.tool_calls for message in messages):
            return False  # the strings in JSON begin and end elsewhere than the JSON
        finds_nothing = self._all.finds_nothing
        return all(finds_nothing(text) for message in messages for text in texts_of(message))

    def _replaced_in(self, request: Request) -> tuple[Request, Mapping[str, str]]:
        """Return the request with all matches replaced, and with `restore` their originals by the placeholders."""
        sent = Sent(self._template, self._all, self._placeholder, self._restoring)
        sent.avoid(request.messages)
        messages = tuple([changed_message(message, sent) for message in request.messages])
        if all(new is old for new, old in zip(messages, request.messages, strict=True)):
            return request, {}
        sent.tell(request, "in what is sent")
        return request.evolve(messages=messages), sent.originals


def _noted(flow: Flow[Response], inner: list[Response]) -> Flow[Response]:
    """Run a flow, and note its response."""
    response = yield from flow
    inner.append(response)
    return response


def _returned(response: Response) -> Flow[Response]:
    yield from ()
    return response


def _is_text(response: Response) -> bool:
    """Whether a response has text alone, beside what says how it came about."""
    return not (
        response.reasoning
        or response.tool_calls
        or response.reasoning_parts
        or response.media
        or response.order
        or response.alternatives
        or response.details
        or response.added
        or response.parsed is not None
    )
