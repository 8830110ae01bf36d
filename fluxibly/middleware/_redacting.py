"""The replacement of what patterns find in a text: in a whole one, in one that comes in pieces, and in JSON."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from fluxibly.middleware._patterns import BLOCK, SENTENCE, TELLING, Function, Pattern
from fluxibly.types import ToolCall

_BORDERS = r"\s,;!?"
RESTORED = ""
"""The name of the pattern that finds placeholders."""


class Found(NamedTuple):
    """A place of a text, with the name of the pattern that found something there."""

    start: int
    end: int
    name: str


class Piece(NamedTuple):
    """A piece of a text, and what takes its place; None: it stays."""

    text: str
    instead: str | None = None

    @property
    def outcome(self) -> str:
        return self.text if self.instead is None else self.instead


class Matcher:
    """Several patterns, of which all matches are found. It has no state, and serves any number of calls.

    Args:
        placeholder: the expression for placeholders; None: they are not restored.
        head: the character with which every placeholder begins. Within it, it does not occur again.
    """

    def __init__(
        self, patterns: Iterable[Pattern | Function], placeholder: Pattern | None = None, head: str = ""
    ) -> None:
        given = [*([] if placeholder is None else [placeholder]), *patterns]
        self.expressions = [each for each in given if isinstance(each, Pattern)]
        self.functions = [each for each in given if isinstance(each, Function)]
        self.behind = max([1, *[each.behind for each in self.expressions]])
        """The most characters before a place that its matches depend on."""
        bounded = [each for each in self.expressions if each.ahead is not None]
        self._endless = [each for each in self.expressions if each.ahead is None]
        self._ahead = max([each.ahead or 0 for each in bounded], default=0)
        # One expression for several takes a fraction of the time.
        flags = {each.begins.flags for each in bounded}
        self._begins = [
            re.compile("|".join([each.begins.pattern for each in bounded if each.begins.flags == one]), one)
            for one in flags
        ]
        mark = re.escape(head)
        self._telling = re.compile(f"[{mark}{TELLING}]").search
        """Finds a character without which a text has no placeholder, and nothing that is known by name."""
        self._unknown = [each for each in self.expressions if not each.known and each is not placeholder]
        """The patterns that a text without such a character may match."""
        self.is_known = not self._unknown and not self.functions
        """Whether all that is found is known by name, or a placeholder."""
        self.calm: re.Pattern[str] | None = None
        """Matches the beginning of a text without any match, up to where the beginning of a match may stand; None: a quick look
        tells nothing."""
        if self.is_known:
            # A beginning of a match that has none of these characters has none of the borders in it.
            run = rf"[^{_BORDERS}{mark}{TELLING}+(:]*+"
            self.calm = re.compile(rf"(?:{run}[{_BORDERS}])*+(?={run}\Z)")

    def finds_nothing(self, text: str) -> bool:
        """Whether a quick look tells that a text has no match."""
        if self._telling(text) is not None or self.functions:
            return False
        if not self._unknown:
            return True
        return not any(
            each.regex.search(text) or (len(text) > BLOCK and each in self._endless) for each in self._unknown
        )

    def undecided(self, text: str, at: int, offset: int) -> int:
        """Return the first place from `at` on where more text may decide whether a match begins there."""
        first = len(text)
        near = max(at, first - self._ahead)
        for begins in self._begins:
            match = begins.search(text, near)
            if match is not None:
                first = min(first, match.start())
        for each in self._endless:
            first = min(first, each.undecided(text, at, offset))
        return first

    def find(self, text: str, at: int, stop: int, offset: int | None) -> list[Found]:
        """Return what the expressions find that begins from `at` on and before `stop`; see `Pattern.find`."""
        return [
            Found(start, end, each.name)
            for each in self.expressions
            for start, end in each.find(text, at, stop, offset)
        ]

    def call(self, text: str, offset: int = 0) -> list[Found]:
        """Return what the functions find in a text. `offset` is added to its places."""
        return [
            Found(start + offset, end + offset, each.name) for each in self.functions for start, end in each.spans(text)
        ]


def _joined(found: list[Found], text: str, originals: Mapping[str, str]) -> list[Found]:
    """Join matches that overlap, under the name of the one that begins first, or that is the longest of these.

    What overlaps with a placeholder is dropped, because the placeholder's original belongs to the caller.
    """
    if not found:
        return found
    kept = [each for each in found if each.name == RESTORED and text[each.start : each.end] in originals]
    starts = [each.start for each in kept]

    def is_free(one: Found) -> bool:
        before = bisect_left(starts, one.end)
        return not before or kept[before - 1].end <= one.start

    found = [*kept, *[each for each in found if each.name != RESTORED and is_free(each)]]
    found.sort(key=lambda each: (each.start, -each.end))
    joined: list[Found] = []
    for each in found:
        if not joined or each.start >= joined[-1].end:
            joined.append(each)
        elif each.end > joined[-1].end:
            joined[-1] = joined[-1]._replace(end=each.end)
    return joined


class Replacing(Protocol):
    """What takes the place of matches in the texts of one call."""

    @property
    def originals(self) -> Mapping[str, str]:
        """The originals by their placeholders."""
        ...

    def replacement(self, name: str, original: str) -> str:
        """Return what takes the place of a match of the pattern of this name."""
        ...


def redacted(text: str, matcher: Matcher, replacing: Replacing) -> str:
    """Return a whole text, with all matches replaced."""
    if matcher.finds_nothing(text):
        return text
    found = matcher.find(text, 0, len(text), None) + (matcher.call(text) if matcher.functions else [])
    pieces: list[str] = []
    at = 0
    for start, end, name in _joined(found, text, replacing.originals):
        pieces += [text[at:start], replacing.replacement(name, text[start:end])]
        at = end
    return "".join([*pieces, text[at:]])


class Scanner:
    """A text that comes in pieces. What can no longer become part of a match is let out at once.

    The same text in other pieces, or in one, comes out the same: what an expression may see depends on the place of its match
    in the text alone, and functions get the text sentence by sentence.
    """

    def __init__(self, matcher: Matcher, replacing: Replacing) -> None:
        self._matcher = matcher
        self._calm = matcher.calm
        self._replacing = replacing
        self.changed = False
        """Whether something has been replaced since `changed` was last reset."""
        self._begin()

    def _begin(self) -> None:
        self._text = ""
        """What is held back, after some of what was let out before."""
        self._at = 0
        """Where in it that begins which is held back."""
        self._offset = 0
        """Its place in the whole text."""
        self._sentence = 0
        """The place in the whole text of the sentence that has not ended yet."""
        self._told: list[Found] = []
        """What functions have found in earlier sentences, by the place in the whole text."""

    def passes(self, piece: str) -> bool:
        """Take a piece if a quick look tells that all of it can be let out unchanged, and return whether it does."""
        text = self._text
        if self._calm is None or self._at < len(text):
            return False
        calm = self._calm.match(piece)
        if calm is None or calm.end() < len(piece):
            return False
        # Of the place in the whole text, nothing depends that a quick look is for.
        text = self._text = (text + piece)[-self._matcher.behind :]
        self._at = len(text)
        return True

    def take(self, piece: str) -> str:
        """Take a piece, and return what can be let out."""
        if self._calm is None:
            return _outcome(self.pieces(piece))
        text = self._text + piece
        calm = self._calm.match(text, self._at)
        if calm is None:
            return _outcome(self.pieces(piece))
        # As `pieces` does, of a text without a match.
        let_out = self._matcher.undecided(text, calm.end(), self._offset)
        made = text[self._at : let_out]
        self._text = text
        self._forget(let_out)
        return made

    def end(self) -> str:
        """Return the rest of the text, and begin another."""
        return _outcome(self.pieces("", last=True)) if self._text else ""

    def pieces(self, piece: str, *, last: bool = False) -> list[Piece]:
        """Do as `take`, or with `last` as `end`, and tell what is let out unchanged from what is replaced."""
        text = self._text = self._text + piece
        matcher, at, offset = self._matcher, self._at, self._offset
        let_out = len(text) if last else matcher.undecided(text, at, offset)
        found: list[Found] = []
        if matcher.functions:
            self._ask(last=last)
            let_out = min(let_out, self._sentence - offset)
            found += [Found(start - offset, end - offset, name) for start, end, name in self._told]
        made: list[Piece] = []
        if let_out > at:
            if not matcher.finds_nothing(text):
                found += matcher.find(text, at, let_out, offset)
            for start, end, name in _joined(found, text, self._replacing.originals):
                if end > let_out:  # more text may make it overlap with another
                    let_out = min(let_out, start)
                    break
                if start > at:
                    made.append(Piece(text[at:start]))
                original = text[start:end]
                made.append(Piece(original, self._replacing.replacement(name, original)))
                self.changed = True
                at = end
            if let_out > at:
                made.append(Piece(text[at:let_out]))
            self._told = [each for each in self._told if each.start >= let_out + offset]
            self._forget(let_out)
        if last:
            self._begin()
        return made

    def _forget(self, let_out: int) -> None:
        """Forget what has been let out, but for what later matches may depend on."""
        before = max(0, let_out - self._matcher.behind)
        self._text = self._text[before:]
        self._offset += before
        self._at = let_out - before

    def _ask(self, *, last: bool) -> None:
        """Give the functions each sentence that has ended."""
        text, offset = self._text, self._offset
        start = self._sentence - offset
        while start < len(text):
            match = _SENTENCE.search(text, start, start + SENTENCE)
            if match is not None:
                end = match.end()
            elif len(text) - start >= SENTENCE:
                space = max(text.rfind(blank, start + 1, start + SENTENCE) for blank in " \t")
                end = start + SENTENCE if space < 0 else space + 1
            elif last:
                end = len(text)
            else:
                break
            self._told += self._matcher.call(text[start:end], start + offset)
            start = end
        self._sentence = start + offset


_SENTENCE = re.compile("""[.!?…]["')\\]]?\\s|[\\n\u3002\uff01\uff1f]""")
"""The end of a sentence, also of a Chinese or Japanese one."""


def _outcome(pieces: Iterable[Piece]) -> str:
    return "".join([piece.outcome for piece in pieces])


_WORD = re.compile(r'[^\s"{}\[\],:]+')
"""A number or a word outside of the strings of JSON."""
_UNIT = re.compile(
    r'[^"\\]+|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[^u]|\\u(?=[0-9a-fA-F]{0,3}[^0-9a-fA-F])',
    re.DOTALL,
)
"""A part of a string of JSON that stands for one character, or for itself."""
_HALF = re.compile(r"\\u[dD][89abAB]")
"""The first half of a character for which JSON needs two."""
_PAIR = len(r"\ud83d\ude00")


class JsonScanner:
    """A JSON text that comes in pieces. Strings are redacted as what they stand for, and the JSON stays valid.

    A number in which something is found becomes a string.
    """

    def __init__(self, matcher: Matcher, replacing: Replacing) -> None:
        self._make: Callable[[], Scanner] = lambda: Scanner(matcher, replacing)
        self._string: Scanner | None = None
        """The string that has begun."""
        self._written: list[str] = []
        """How each character of it that is held back is written in the JSON text."""
        self._word = ""
        """The number that has begun, outside of strings."""
        self._rest = ""
        """What has come of an escape that is not complete."""

    def take(self, piece: str) -> str:
        """Take a piece, and return what can be let out."""
        return self._take(piece, last=False)

    def end(self) -> str:
        """Return the rest of the text."""
        made = self._take("", last=True)
        return made + (self._end_word() if self._string is None else self._pieces(self._string, "", last=True))

    def _take(self, piece: str, *, last: bool) -> str:
        text, self._rest = self._rest + piece, ""
        made: list[str] = []
        at = 0
        while at < len(text):
            if self._string is None:
                at = self._outside(text, at, made)
                continue
            if text[at] == '"':
                made += [self._pieces(self._string, "", last=True), '"']
                self._string = None
                at += 1
                continue
            match = _UNIT.match(text, at)
            unit = text[at:] if match is None else match[0]  # else an escape that is cut off
            half = _HALF.match(unit) is not None and len(unit) < _PAIR
            if not last and (match is None or (half and len(text) - at < _PAIR)):
                self._rest = text[at:]
                break
            self._written += [unit] if unit[0] == "\\" else unit
            made.append(self._pieces(self._string, _meant(unit), last=False))
            at += len(unit)
        return "".join(made)

    def _outside(self, text: str, at: int, made: list[str]) -> int:
        """Take what stands outside of strings, and return the place behind it."""
        word = _WORD.match(text, at)
        if word is not None:
            self._word += word[0]
            return word.end()
        made += [self._end_word(), text[at]]
        if text[at] == '"':
            self._string = self._make()
        return at + 1

    def _end_word(self) -> str:
        word, self._word = self._word, ""
        if not word:
            return ""
        scanner = self._make()
        made = scanner.take(word) + scanner.end()
        return word if made == word else json.dumps(made, ensure_ascii=False)

    def _pieces(self, string: Scanner, piece: str, *, last: bool) -> str:
        """Take a piece of what a string stands for, and return what can be let out, as it is written in JSON."""
        made: list[str] = []
        at = 0
        for text, instead in string.pieces(piece, last=last):
            written = self._written[at : at + len(text)]
            made.append("".join(written) if instead is None else json.dumps(instead, ensure_ascii=False)[1:-1])
            at += len(text)
        del self._written[:at]
        return "".join(made)


def _meant(unit: str) -> str:
    """Return what a part of a string of JSON stands for."""
    if unit[0] != "\\":
        return unit
    try:
        return str(json.loads(f'"{unit}"'))
    except ValueError:  # it is no escape
        return unit[-1]


def redacted_arguments(call: ToolCall, matcher: Matcher, replacing: Replacing) -> str:
    """Return the arguments of a whole tool call, as text, with all matches replaced."""
    if matcher.is_known and matcher.finds_nothing(call.raw_arguments):
        return call.raw_arguments
    scanner = ArgumentsScanner(matcher, replacing, call.raw)
    return scanner.take(call.raw_arguments) + scanner.end()


class ArgumentsScanner:
    """The arguments of a tool call, which come in pieces: a JSON object, or the free text of a custom tool."""

    def __init__(self, matcher: Matcher, replacing: Replacing, raw: Mapping[str, object] | None) -> None:
        self._matcher = matcher
        self._replacing = replacing
        self._free = raw is not None and raw.get("type") == "custom"
        self._scanner: Scanner | JsonScanner | None = None
        self._blank = ""

    def take(self, piece: str) -> str:
        """Take a piece, and return what can be let out."""
        if self._scanner is None:
            self._blank += piece
            begun = self._blank.lstrip()
            if not begun:
                return ""
            kind = JsonScanner if begun[0] == "{" and not self._free else Scanner
            self._scanner = kind(self._matcher, self._replacing)
            piece, self._blank = self._blank, ""
        return self._scanner.take(piece)

    def end(self) -> str:
        """Return the rest of the text."""
        blank, self._blank = self._blank, ""
        return blank if self._scanner is None else self._scanner.end()
