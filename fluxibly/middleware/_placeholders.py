"""The replacements of matches: the names of patterns, or placeholders that can be told apart and restored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter

import attrs

from fluxibly._checks import kind_of
from fluxibly._logs import log_decision
from fluxibly.middleware._patterns import Pattern
from fluxibly.middleware._redacted_messages import changed_values, texts_of
from fluxibly.middleware._redacting import RESTORED, ArgumentsScanner, Matcher, Scanner, redacted, redacted_arguments
from fluxibly.types import Message, Reasoning, Request, ToolCall

_FIELDS = ("name", "number")
_MOST_DIGITS = 9
"""The most digits of the number of a placeholder."""


def check_template(name: str, value: object) -> str | None:
    """Check the text that takes the place of a match."""
    if not isinstance(value, str):
        return f"{name}: expected a str, got {kind_of(value)}"
    try:
        fields = list(Formatter().parse(value))
    except ValueError as error:
        return f"{name}: expected a text with {{name}} in it, got {value!r}: {error}"
    for _, field, spec, conversion in fields:
        if field is not None and (field not in _FIELDS or spec or conversion):
            return (
                f"{name}: expected only {{name}} and {{number}} in braces, got {value!r}; double a brace that is meant"
            )
    return None


@attrs.frozen
class Template:
    """The text that takes the place of a match, such as "[{name}]"."""

    text: str

    @property
    def fields(self) -> set[str]:
        """The names in braces."""
        return {field for _, field, _, _ in Formatter().parse(self.text) if field is not None}

    @property
    def head(self) -> str:
        """The first character."""
        return self.named("")[:1]

    def named(self, name: str) -> str:
        """Return the text for all matches of a pattern."""
        return self.text.format(name=name, number=0)

    def numbered(self, name: str, number: int) -> str:
        """Return the placeholder of one match. The number stands behind the name, unless it has a place of its own."""
        return self.text.format(name=name if "number" in self.fields else f"{name}_{number}", number=number)

    def placeholders(self, names: Iterable[str]) -> Pattern:
        """Return the pattern of the placeholders for these names."""
        name = f"(?:{'|'.join(map(re.escape, sorted(names)))})"
        number = f"[0-9]{{1,{_MOST_DIGITS}}}"
        of_field = {"number": number, "name": name if "number" in self.fields else f"{name}_{number}"}
        source = "".join(
            [
                re.escape(text) + ("" if field is None else of_field[field])
                for text, field, _, _ in Formatter().parse(self.text)
            ]
        )
        return Pattern(RESTORED, re.compile(source))

    def problem(self, names: Iterable[str]) -> str | None:
        """Return why the placeholders for these names could not be told from what stands beside them; None: they can."""
        if "name" not in self.fields:
            return "expected {name} in it to restore"
        made = [self.numbered(name, 1) for name in names]
        if all(re.fullmatch(r"[^\w\s,;!?].*[^\w\s]", each) and each.count(self.head) == 1 for each in made):
            return None
        return "to restore, expected marks around it, such as [{name}], of which the first is in it only once"


class Replaced:
    """Replaces matches by the names of their patterns."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._counts: dict[str, int] = {}
        """The matches of each pattern."""

    @property
    def originals(self) -> Mapping[str, str]:
        """The originals by their placeholders."""
        return {}

    def replacement(self, name: str, original: str) -> str:
        """Return what takes the place of a match."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return self._template.named(name)

    def tell(self, request: Request, where: str) -> None:
        """Say how many matches were replaced."""
        if self._counts:
            counts = ", ".join([f"{name} ({count})" for name, count in self._counts.items()])
            log_decision(request, "Redact", f"replaces {where}: {counts}")


class Sent(Replaced):
    """The changes of what is sent. With `placeholder`, every original gets a placeholder of its own.

    Args:
        matcher: finds what is replaced.
        placeholder: the pattern of the placeholders.
        incoming: finds what will be replaced in the answer.
    """

    def __init__(self, template: Template, matcher: Matcher, placeholder: Pattern | None, incoming: Matcher) -> None:
        super().__init__(template)
        self._matcher = matcher
        self._incoming = incoming
        self._placeholder = placeholder
        self._originals: dict[str, str] = {}
        self._placeholders: dict[tuple[str, str], str] = {}
        self._numbers: dict[str, int] = {}
        """The last number of each pattern."""
        self._taken: set[str] = set()
        """The texts in the request itself that look like placeholders, and may come back from the model as they are."""

    @property
    def originals(self) -> Mapping[str, str]:
        return self._originals

    def avoid(self, messages: Sequence[Message]) -> None:
        """Give out no placeholders that the messages have already."""
        if self._placeholder is not None:
            find = self._placeholder.regex.findall
            self._taken = {found for message in messages for text in texts_of(message) for found in find(text)}

    def text(self, text: str, /) -> str:
        """Return a text with its changes."""
        made = redacted(text, self._matcher, self)
        return made if made == text else self._settled(made, lambda: Scanner(self._incoming, self))

    def arguments(self, call: ToolCall, /) -> str:
        """Return the arguments of a tool call, as text, with their changes."""
        made = redacted_arguments(call, self._matcher, self)
        return (
            made
            if made == call.raw_arguments
            else self._settled(made, lambda: ArgumentsScanner(self._incoming, self, call.raw))
        )

    def _settled(self, text: str, scanner_of: Callable[[], Scanner | ArgumentsScanner]) -> str:
        """Replace what is a match only beside a placeholder. Otherwise it would be replaced for good if it came back."""
        while self._originals:
            scanner = scanner_of()
            made = scanner.take(text) + scanner.end()
            if made == text:
                break
            text = made
        return text

    def reasoning(self, part: Reasoning, /) -> Reasoning:
        """Return a block of reasoning with its changes. A service refuses a signed one that was changed; it wrote it itself."""
        if part.signature is not None and part.raw is None:
            return part
        text = self.text(part.text)
        if text == part.text:
            return part
        raw = part.raw
        if raw is not None and part.signature is None:  # what is no readable text in it stays
            raw = changed_values(raw, lambda each: self.text(each) if each and each in part.text else each)
        return attrs.evolve(part, text=text, raw=raw)

    def replacement(self, name: str, original: str) -> str:
        if name == RESTORED:  # a placeholder stays what it is
            return original
        named = super().replacement(name, original)
        if self._placeholder is None:
            return named
        placeholder = self._placeholders.get((name, original))
        while placeholder is None:
            number = self._numbers[name] = self._numbers.get(name, 0) + 1
            made = self._template.numbered(name, number)
            if made not in self._taken and made not in self._originals:
                placeholder = self._placeholders[name, original] = made
                self._originals[made] = original
        return placeholder


class Came(Replaced):
    """The changes of what comes in: originals in place of their placeholders, and names in place of other matches."""

    def __init__(self, template: Template, originals: Mapping[str, str]) -> None:
        super().__init__(template)
        self._originals = originals

    @property
    def originals(self) -> Mapping[str, str]:
        return self._originals

    def replacement(self, name: str, original: str) -> str:
        return self._originals[original] if name == RESTORED else super().replacement(name, original)
