"""The patterns of personal data and keys that `Redact` knows by name, and those that its user adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeAlias, cast

import attrs

from fluxibly._checks import did_you_mean, is_mapping, is_whole, kind_of
from fluxibly.errors import ConfigError
from fluxibly.functions import check_function, find_function, known_functions
from fluxibly.middleware._beginnings import beginnings

Span: TypeAlias = tuple[int, int]
Finder: TypeAlias = Callable[[str], Iterable[Span]]
"""A function that returns the places of what it finds in a text, each as (start, end)."""

BLOCK = 1_000
"""An expression without a longest match sees the text to the end of the block of so many characters after the next."""
SENTENCE = 1_000
"""The most characters that a function gets of an answer at a time."""


@attrs.frozen(eq=False)
class Pattern:
    """An expression for what to find.

    `check` returns how many characters of a match count; 0 if it is none after all. Every match has `word` in it, or before
    it.
    """

    name: str
    regex: re.Pattern[str]
    check: Callable[[str], int] | None = None
    word: str = ""
    known: bool = False
    """Whether it is known by name, so that all that it finds has a character of `TELLING`."""
    begins: re.Pattern[str] = attrs.field(init=False, repr=False)
    """Matches from a place to the end of a text if a match that begins there may need more text."""
    ahead: int | None = attrs.field(init=False, repr=False)
    """The most characters that a match depends on, from its beginning on. None: there is no bound."""
    behind: int = attrs.field(init=False, repr=False)
    """The most characters before its beginning that a match depends on."""

    def __attrs_post_init__(self) -> None:
        found = beginnings(self.regex, BLOCK)
        # Further than that, nothing is held back.
        bounded = found.ahead <= 10 * BLOCK
        for name, value in (
            ("begins", found.regex),
            ("ahead", int(found.ahead) if bounded else None),
            ("behind", max(found.behind, 1)),
        ):
            object.__setattr__(self, name, value)

    def find(self, text: str, at: int, stop: int, offset: int | None) -> list[Span]:
        """Return the matches that begin from `at` on and before `stop`.

        Args:
            offset: the place of `text` in the answer that it is a part of, which bounds what an expression without a
                longest match sees; None: there is no bound.
        """
        found: list[Span] = []
        if self.word not in text:
            return found
        end = border = len(text)
        while at < stop:
            if self.ahead is None and offset is not None:
                border = (at + offset) // BLOCK * BLOCK + BLOCK - offset
                end = border + BLOCK
            match = self.regex.search(text, at, end)
            if match is None or match.start() >= min(border, stop):
                if border >= stop:
                    return found
                at = border
                continue
            start = match.start()
            length = match.end() - start if self.check is None else self.check(match[0])
            if length:
                found.append((start, start + length))
            at = start + (length or 1)
        return found

    def undecided(self, text: str, at: int, offset: int) -> int:
        """Return the first place from `at` on where more text may decide whether a match begins there."""
        length = len(text)
        first = ((length + offset) // BLOCK - 1) * BLOCK - offset if self.ahead is None else length - self.ahead
        match = self.begins.search(text, max(at, first))
        return length if match is None else match.start()


@attrs.frozen(eq=False)
class Function:
    """A user's function for what to find."""

    name: str
    find: Finder

    def spans(self, text: str) -> list[Span]:
        """Return what the function finds in a text.

        Raises:
            TypeError: it returned something else than places in the text.
        """
        expected = f"Redact: the pattern {self.name!r}: expected pairs (start, end) of places in the text"
        found: Any = self.find(text)
        if not isinstance(found, Iterable) or isinstance(found, (str, bytes)):
            raise TypeError(f"{expected}, got {kind_of(found)}")
        spans: list[Span] = []
        for each in cast("Iterable[object]", found):
            pair = _items(each)
            if len(pair) != 2 or not is_whole(pair[0]) or not is_whole(pair[1]):
                raise TypeError(
                    f"{expected}, got {kind_of(each)} among them; write [(r.start, r.end) for r in results]"
                )
            if not 0 <= pair[0] <= pair[1] <= len(text):
                raise TypeError(f"{expected} of {len(text)} characters, got ({pair[0]}, {pair[1]})")
            if pair[0] < pair[1]:
                spans.append((pair[0], pair[1]))
        return spans


def _items(value: object) -> Sequence[object]:
    return cast("Sequence[object]", value) if isinstance(value, (tuple, list)) else ()


# The patterns that have a name. Each expression begins with a character or a set of characters, so that the search for it skips the
# others fast, and may look back over that character. None has a repetition within another that could share characters with it,
# so the time that it takes grows with the length of the text alone.

_LETTER = "0-9A-Za-z_\u00c0-\u024f"
# Not the user of Git servers, nor the names of images for dense screens, such as icon@2x.png.
_EMAIL = (
    rf"[{_LETTER}][{_LETTER}.%+'-]{{0,63}}(?<!\bgit)@(?!\dx\.)"
    rf"(?:[{_LETTER}-]{{1,63}}\.){{1,8}}(?:xn--[0-9A-Za-z-]{{1,59}}|[A-Za-z]{{2,24}})"
)
_GAP = "[ .\\-/()\u00a0]{0,2}"
_PHONE = "|".join(
    [
        rf"\+(?<![0-9A-Za-z_+]\+)[1-9](?:{_GAP}[0-9]){{7,14}}(?![0-9])",
        rf"0(?<![0-9A-Za-z_+]0)(?<![0-9][-./,:]0)(?:0[1-9](?:{_GAP}[0-9]){{7,13}}|[1-9](?:{_GAP}[0-9]){{7,10}})(?![0-9A-Za-z_])",
        r"\((?<![0-9A-Za-z_]\()(?:0[0-9]{1,5}\)[ /-]?[0-9]{2,9}(?:[ .\-/][0-9]{2,6}){0,3}|[1-9][0-9]{1,2}\)[ -]?[0-9]{3,5}[ .-][0-9]{4})(?![0-9A-Za-z_])",
        r"[1-9](?<![0-9A-Za-z_][1-9])(?<![0-9][-./,:][1-9])(?:[-. ](?<=1.)[2-9])?[0-9]{2}[-.][0-9]{3}[-.][0-9]{4}(?![0-9A-Za-z_]|[-.][0-9])",
    ]
)
_DATE = re.compile(r"\d{1,2}([./-])\d{1,2}\1\d{2,4}(?!\1?\d)|\d{5}-\d{4}$")
"""A date, or a ZIP code with a zero in front."""


def _phone(text: str) -> int:
    groups = re.findall(r"\d+", text)
    digits = sum(map(len, groups))
    plausible = True
    if text[0] == "+":  # a number with a sign and a point is no telephone
        plausible = not re.fullmatch(r"\+\d+\.\d+", text)
    elif text[0] == "(":
        plausible = 8 <= digits <= 13
    elif text[0] == "0" and text[1] != "0":
        pairs = all(len(group) == 2 for group in groups)
        plausible = (
            digits >= (9 if len(groups) > 1 else 10)
            and (not pairs or len(groups) == 5)  # other rows of pairs are numbers of a lottery, or a table
            and text != "0123456789"
            and _DATE.match(text) is None
        )
    return len(text) if plausible else 0


_PAUSE = "[ .\\-\u00a0]"
_CARD = (
    r"[2-6](?<![0-9A-Za-z_][2-6])(?<![0-9][-.,][2-6])"
    rf"(?:[0-9]{{3}}(?:(?:{_PAUSE}[0-9]{{4}}){{3}}(?:{_PAUSE}[0-9]{{1,3}})?|{_PAUSE}[0-9]{{6}}{_PAUSE}[0-9]{{4,5}})"
    r"|[0-9]{12,18})(?![0-9A-Za-z_])"
)
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3[0689]\d{12,17}|35\d{14,17}"
    r"|6\d{12,18}|5[0678]\d{11,17}"
)
"""Who issues cards with which first digits, and how long their numbers are."""


def _card(text: str) -> int:
    # Another short number may follow, such as the card's verification code.
    for length in (len(text), 19):
        digits = re.sub(r"\D", "", text[:length])
        if length <= len(text) and _ISSUERS.fullmatch(digits) and _luhn(digits):
            return length
    return 0


def _luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    numbers = [int(digit) for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum([sum(divmod(2 * number, 10)) for number in numbers[1::2]])) % 10 == 0


_IBAN = r"[A-Z](?<![0-9A-Za-z_][A-Z])[A-Z][0-9]{2}(?:[ \u00a0-]?[0-9A-Z]{4}){2,7}(?:[ \u00a0-]?[0-9A-Z]{1,4})?(?![0-9A-Za-z_])"
_IBAN_LENGTHS = {
    country: int(length)
    for length, countries in (
        pair.split(":")
        for pair in [
            "15:NO",
            "16:BE",
            "18:DK,FI,FK,FO,GL,NL,SD",
            "19:MK,SI",
            "20:AT,BA,EE,KZ,LT,LU,MN,XK",
            "21:CH,CR,HR,LI,LV",
            "22:BG,BH,DE,GB,GE,IE,ME,RS,VA",
            "23:AE,GI,IL,IQ,OM,SO,TL",
            "24:AD,CZ,ES,MD,PK,RO,SA,SE,SK,TN,VG",
            "25:LY,PT,ST",
            "26:IS,TR",
            "27:BI,DJ,FR,GR,IT,MC,MR,SM",
            "28:AL,AZ,BY,CY,DO,GT,HN,HU,LB,NI,PL,SV",
            "29:BR,EG,PS,QA,UA",
            "30:JO,KW,MU,YE",
            "31:MT,SC",
            "32:LC",
            "33:RU",
        ]
    )
    for country in countries.split(",")
}


def _iban(text: str) -> int:
    length = _IBAN_LENGTHS.get(text[:2], 0)
    found = ""
    for place, character in enumerate(text):
        if len(found) == length:
            # More characters at once belong to something else.
            return 0 if character.isalnum() or not _mod_97(found) else place
        if character.isalnum():
            found += character
    return len(text) if len(found) == length and _mod_97(found) else 0


def _mod_97(iban: str) -> bool:
    """Whether the two digits after the country are the check digits of the others (ISO 13616)."""
    return bool(iban) and int("".join([str(int(each, 36)) for each in iban[4:] + iban[:4]])) % 97 == 1


_V4 = r"[0-9](?<![0-9A-Za-z_.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|\.[0-9])"


def _v4(text: str) -> int:
    return len(text) if max(map(int, text.split("."))) < 256 else 0


_V6 = r"[0-9A-Fa-f:](?<![0-9A-Za-z_:.][0-9A-Fa-f:])[0-9A-Fa-f:]{2,38}(?:\.[0-9]{1,3}){0,3}(?![0-9A-Za-z_:])"


def _v6(text: str) -> int:
    from ipaddress import IPv6Address

    # A colon may belong to the sentence. Names in code, such as `a::b`, have no digits.
    for length in (len(text), len(text) - 1):
        if text[:length].count(":") > 1 and text.endswith(":") == (length < len(text)) and re.search(r"\d", text):
            try:
                IPv6Address(text[:length])
            except ValueError:
                continue
            return length
    return 0


_KEYS = "|".join(
    [
        r"s(?<![0-9A-Za-z_-]s)k-[0-9A-Za-z_-]{20,250}",  # OpenAI, Anthropic, OpenRouter, DeepSeek, …
        r"[srw](?<![0-9A-Za-z_][srw])(?:k_(?:live|test)_[0-9A-Za-z]{16,247}|hsec_[0-9A-Za-z+/=]{24,100})",  # Stripe
        r"A(?<![0-9A-Za-z_]A)(?:[KS]IA[0-9A-Z]{16}(?![0-9A-Za-z_])|Iza[0-9A-Za-z_-]{35})",  # AWS, Google
        r"G(?<![0-9A-Za-z_]G)OCSPX-[0-9A-Za-z_-]{28}|y(?<![0-9A-Za-z_]y)a29\.[0-9A-Za-z_-]{20,1000}",  # Google
        r"g(?<![0-9A-Za-z_]g)(?:h[oprsu]_[0-9A-Za-z]{36,255}|ithub_pat_[0-9A-Za-z_]{22,255}|lpat-[0-9A-Za-z_-]{20,255}|sk_[0-9A-Za-z]{40,100})",
        r"x(?<![0-9A-Za-z_]x)(?:ox[abeoprs]-[0-9A-Za-z-]{10,250}|app-[0-9A-Za-z-]{10,250}|ai-[0-9A-Za-z]{60,100})",  # Slack, xAI
        r"h(?<![0-9A-Za-z_]h)f_[0-9A-Za-z]{30,100}|r(?<![0-9A-Za-z_]r)8_[0-9A-Za-z]{37}",  # Hugging Face, Replicate
        r"p(?<![0-9A-Za-z_]p)(?:plx-[0-9A-Za-z]{40,100}|ypi-[0-9A-Za-z_-]{50,250})",  # Perplexity, PyPI
        r"n(?<![0-9A-Za-z_]n)(?:vapi-[0-9A-Za-z_-]{50,100}|pm_[0-9A-Za-z]{36})",  # Nvidia, npm
        r"d(?<![0-9A-Za-z_]d)(?:api[0-9a-f]{32}|o[opr]_v1_[0-9a-f]{64})(?![0-9A-Za-z_])",  # Databricks, DigitalOcean
        r"S(?<![0-9A-Za-z_]S)G\.[0-9A-Za-z_-]{22}\.[0-9A-Za-z_-]{43}",  # SendGrid
        r"[aA](?<![0-9A-Za-z_][aA])(?:ws_secret_access_key|WS_SECRET_ACCESS_KEY)[\"']?[ ]{0,3}[:=][ ]{0,3}[\"']?[0-9A-Za-z/+]{40}(?![0-9A-Za-z/+])",
        # JSON Web Tokens
        r"e(?<![0-9A-Za-z_.-]e)yJ[0-9A-Za-z_-]{8,1000}\.[0-9A-Za-z_-]{8,6000}\.[0-9A-Za-z_-]{16,1000}",
    ]
)
_PEM_ENDS = r"(?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----"
_PEM = (
    rf"-(?<!--)----BEGIN {_PEM_ENDS}"
    rf"(?:(?:[^-]|-(?!----)){{0,8000}}+-----END {_PEM_ENDS}|(?:(?:\s|\\[nr]){{1,4}}[0-9A-Za-z+/=]{{16,80}}){{0,80}})"
)
_BEARER = r"[0-9A-Za-z._~+/-](?<=[Bb]earer .)[0-9A-Za-z._~+/-]{15,2000}={0,2}"


TELLING = r"0-9@_A\-"
"""Whatever is known by name has at least one of these characters (a part of a set in an expression)."""
_TELLING = re.compile(f"[{TELLING}]")


def _key(text: str) -> int:
    if text.startswith("sk-"):  # else words with hyphens between them would be keys
        digits = sum(character.isdigit() for character in text)
        return len(text) if digits > 3 or (digits and text.lower() != text) else 0
    return len(text) if _TELLING.search(text) else 0


def _bearer(text: str) -> int:
    return len(text) if any(character.isdigit() for character in text) else 0


_SOURCES: Mapping[str, tuple[tuple[str, Callable[[str], int] | None, str], ...]] = {
    "email": ((_EMAIL, None, "@"),),
    "phone": ((_PHONE, _phone, ""),),
    "card": ((_CARD, _card, ""),),
    "iban": ((_IBAN, _iban, ""),),
    "ip": ((_V4, _v4, "."), (_V6, _v6, ":")),
    "key": ((_KEYS, _key, ""), (_PEM, None, "-----BEGIN "), (_BEARER, _bearer, "earer ")),
}
"""The expressions of each name, with their checks and words."""
NAMES = tuple(_SOURCES)


@cache
def _known(name: str) -> tuple[Pattern, ...]:
    """Return what a name stands for. The expressions are compiled when they are first needed."""
    return tuple([Pattern(name, re.compile(source), check, word, known=True) for source, check, word in _SOURCES[name]])


def to_patterns(given: object) -> tuple[Pattern | Function, ...]:
    """Return what the patterns of a `Redact` stand for.

    Raises:
        ConfigError: it lists all that are wrong.
    """
    if is_mapping(given):
        return _all_of([partial(_of_mapping, name, pattern) for name, pattern in given.items()])
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"{_EXPECTED}, got {kind_of(given)}")
    return _all_of([partial(_of_list, name) for name in cast("Sequence[object]", given)])


def _all_of(makers: Sequence[Callable[[], tuple[Pattern | Function, ...]]]) -> tuple[Pattern | Function, ...]:
    found: list[Pattern | Function] = []
    problems: list[str] = []
    for make in makers:
        try:
            found += make()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError.of(problems)
    if not found:
        raise ConfigError(f"{_EXPECTED}, got none of them; leave Redact out to change nothing")
    return tuple(found)


_EXPECTED = f"Redact: patterns: expected names such as {', '.join(NAMES[:3])}, or a mapping of names to patterns"


def _of_list(name: object) -> tuple[Pattern | Function, ...]:
    """Return what a name in a list stands for: a pattern that is known by name, or a registered function."""
    if not isinstance(name, str):
        raise ConfigError(
            f"{_EXPECTED}, got {kind_of(name)} in the list; write {{'my-name': …}} for a pattern of your own"
        )
    if name in NAMES:
        return _known(name)
    functions = known_functions()
    if name not in functions:
        raise ConfigError(_unknown(name, [*NAMES, *functions]))
    return (_function(name, find_function(name)),)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = did_you_mean(name, known) or "."
    return f"Redact: patterns: there is no pattern {name!r}{near} Known patterns: {', '.join(known)}"


def _of_mapping(name: object, pattern: object) -> tuple[Pattern | Function, ...]:
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(
            f"Redact: patterns: expected names as keys, got {kind_of(name) if name != '' else 'an empty str'}"
        )
    path = f"Redact: patterns.{name}"
    if pattern is False:
        return ()
    if pattern is True:
        if name not in NAMES:
            raise ConfigError(_unknown(name, NAMES))
        return _known(name)
    if isinstance(pattern, str):
        return (_expression(name, pattern, path),)
    if is_mapping(pattern):
        if list(pattern) != ["function"] or not isinstance(pattern["function"], str):
            raise ConfigError(
                f"{path}: expected {{function: NAME}} with the name of a registered function, got another table"
            )
        return (_function(name, find_function(pattern["function"])),)
    if not callable(pattern):
        raise ConfigError(f"{path}: expected True, a regular expression (a str) or a function, got {kind_of(pattern)}")
    return (_function(name, cast("Finder", pattern)),)


def _function(name: str, function: Finder) -> Function:
    problem = check_function(f"Redact: patterns.{name}", function)
    if problem is not None:
        raise ConfigError(problem)
    return Function(name, function)


def _expression(name: str, source: str, path: str) -> Pattern:
    try:
        regex = re.compile(source)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a regular expression, got {source!r}: {error}") from None
    if regex.search(""):
        raise ConfigError(
            f"{path}: expected an expression for at least one character, got {source!r}, which matches no text"
        )
    return Pattern(name, regex)
