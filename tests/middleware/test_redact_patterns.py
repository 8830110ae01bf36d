"""What the patterns of `Redact` find, and what they leave alone."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings, strategies as st

from fluxibly import register_function
from fluxibly.errors import ConfigError
from fluxibly.middleware import Redact
from fluxibly.middleware._beginnings import beginnings
from fluxibly.middleware._patterns import NAMES

ALL = Redact(patterns=NAMES)


def shown(name: str, text: str) -> str:
    return Redact(patterns=[name]).text(text)


def token(prefix: str, length: int, alphabet: str = "a1B2c3D4e5F6g7H8") -> str:
    """Return a made-up key. No key stands in this file as such, so that no scanner takes it for a real one."""
    return prefix + (alphabet * length)[:length]


FOUND = {
    "email": [
        "joe@example.com",
        "joe.o'neil+tag@sub.example.co.uk",
        "a_b%c@d-e.org",
        "JOE@EXAMPLE.COM",
        "x@y.museum",
        "müller@example.de",
        "info@xn--mller-kva.de",
        "user@host.xn--p1ai",
    ],
    "phone": [
        "+49 171 1234567",
        "+49 (0)30 1234567",
        "+1 (555) 123-4567",
        "+1-555-0100",
        "+15551234567",
        "+44 20 7946 0958",
        "+33 6 12 34 56 78",
        "+86 138 1234 5678",
        "+91 98765 43210",
        "0049 171 1234567",
        "(555) 123-4567",
        "555-123-4567",
        "555.123.4567",
        "1-800-555-0199",
        "06 12 34 56 78",
        "06.12.34.56.78",
        "020 7946 0958",
        "07700900123",
        "0171/1234567",
        "(030) 123456",
        "(02) 9876 5432",
        "(11) 91234-5678",
    ],
    "card": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111.1111.1111.1111",
        "4111111111111111",
        "5555555555554444",
        "2223003122003222",
        "378282246310005",
        "3782 822463 10005",
        "6011111111111117",
        "3530111333300000",
        "30569309025904",
        "6304000000000000",
    ],
    "iban": [
        "DE89 3704 0044 0532 0130 00",
        "DE89370400440532013000",
        "GB82 WEST 1234 5698 7654 32",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NL91ABNA0417164300",
        "BE68 5390 0754 7034",
        "CH93 0076 2011 6238 5295 7",
        "ES91 2100 0418 4502 0005 1332",
        "IT60 X054 2811 1010 0000 0123 456",
        "NO93 8601 1117 947",
        "PL61 1090 1014 0000 0712 1981 2874",
        "MT84MALT011000012345MTLCAST001S",
        "SA03 8000 0000 6080 1016 7519",
    ],
    "ip": [
        "192.168.1.1",
        "8.8.8.8",
        "::1",
        "2001:db8::8a2e:370:7334",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "fe80::1",
        "::ffff:192.0.2.1",
    ],
    "key": [
        token("sk-", 48),
        token("sk-proj-", 120, "a1B2-c3D4_"),
        token("sk-ant-api03-", 95),
        token("sk-or-v1-", 64, "0a1b2c3d"),
        token("sk_live_", 24),
        token("whsec_", 32),
        token("AKIA", 16, "IOSFODNN7EXAMPLE"),
        token("ASIA", 16, "QRSTUVWXYZABCDEF"),
        token("AIza", 35),
        token("GOCSPX-", 28),
        token("ya29.", 60),
        token("ghp_", 36),
        token("gho_", 36),
        token("github_pat_", 82, "a1B2_"),
        token("glpat-", 20),
        token("gsk_", 52),
        token("xoxb-", 50, "123456789012-"),
        token("xapp-1-", 60, "A1-"),
        token("xai-", 80),
        token("hf_", 34, "abcdefGHIJKL"),
        token("r8_", 37),
        token("pplx-", 48),
        token("pypi-", 100),
        token("nvapi-", 64),
        token("npm_", 36),
        token("dapi", 32, "0a1b2c3d"),
        token("dop_v1_", 64, "0a1b2c3d"),
        ".".join([token("SG", 0), token("", 22), token("", 43)]),
        "aws_secret_access_key = " + token("", 40, "wJalrXUt/K7M"),
        ".".join([token("eyJ", 20), token("eyJ", 60), token("", 43)]),
        "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA\n" * 20 + "-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\\n" + "MIIEpAIBAAKCAQEA\\n" * 20 + "-----END PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1rZXktdjEA" * 4 + "\n" + "AAAABG5vbmUAAAAEbm9u" * 3,
    ],
}

HARMLESS = [
    # Prose
    "The quick brown fox jumps over the lazy dog. It was 1984; Orwell wrote 328 pages, and 2 of 3 liked it.",
    "Meet me @ noon, or at 5 p.m. (maybe 6). Follow @fluxibly, or e-mail the team.",
    "She scored 9.81 out of 10 in round 2/3; that is 98.1 %.",
    "Bearer of bad news; the bearer identification-documents-and-certificates are here.",
    "PEM files begin with a line of hyphens and the word BEGIN.",
    "Lottery: 03 12 19 24 33 41, bonus 7.",
    # Dates and times
    "2024-01-02, 2024-01-02T10:30:00Z, 2024-01-02 10:30:00.123456+01:00, 01/02/2024, 01.02.2024 10:30, 1.2.24",
    "20240102, 10:30:45, 0900-1700 h, 1700000000, 1700000000000, 1700000000000000000",
    "05/2023 - 06/2024; 1998-2024; 12-31-1999; 31.12.1999",
    # Prices and numbers
    "$1,234,567.89, 1.234.567,89 €, 12 345 678, +10,000,000, +1.23456789, -3.14e10, 0.0123456789, 1e-9",
    "512 256 1024, 200 300 4000, 3.5-4.5, 10-20 %, 640x480, 1:2:3",
    "100000000000000000000000, 12345678901234567890123",
    # Identifiers
    "550e8400-e29b-41d4-a716-446655440000, 4111-1111-1111-1112, 4111111111111112",
    "ISBN 978-3-16-148410-0, ZIP 01234-5678, order 12345678, #0012345",
    "commit 3f2a9c1d5e7b8a6f4c2d1e0b9a8f7c6d5e4b3a2f, sha256 9f86d081884c7d659a2feaa0c55ad015",
    # Versions and names of files
    "Python 3.12.4, v1.2.3.4, 10.0.19041, numpy>=1.26.4,<2, icon@2x.png, foo-1.2.3-py3-none-any.whl, node@20.11.1",
    "aa:bb:cc:dd:ee:ff, std::vector<int>, a::b, f64::MAX, 12:30:45, 256.1.1.1, 1.2.3, 1.2.3.4.5",
    # Code
    'for i in range(10): print(f"{i:03d} {x[i+1]!r}")  # TODO: fix #123',
    "@decorator(a=1)\ndef fn(x, *, y=0x7f): return x @ y",
    "git clone git@github.com:owner/repo.git; sk-learn-contrib-package-names; pip install sk-learn-2024",
    "SELECT * FROM t WHERE a = 'b' AND c BETWEEN 1 AND 1000000; eyJ.a.b; ghp_short; xoxo; AKIA; hf_model",
    "https://example.com/a/b?c=1&d=2#e, file:///tmp/x-1.2, s3://bucket/key_1",
]


class TestWhatIsFound:
    @pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FOUND.items() for text in texts])
    def test_a_match_is_replaced_as_a_whole(self, name, text):
        """Whatever stands around it, all of it is replaced, and nothing else."""
        for around in ("{}", "I have {}.", "({})", '"{}"', "x: {}, y", "联系{}联系", "<{}>\n"):
            assert shown(name, around.format(text)) == around.format(f"[{name}]")

    @pytest.mark.parametrize("text", HARMLESS)
    def test_harmless_texts_stay(self, text):
        """Prose, code, dates, prices, versions and identifiers are not taken for personal data."""
        found = [name for name in NAMES if shown(name, text) != text]
        assert found == []

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("IBAN BE68 5390 0754 7034 BIC KREDBEBB", "IBAN [iban] BIC KREDBEBB"),
            ("4111 1111 1111 1111 123", "[card] 123"),
            ("12345 4111 1111 1111 1111", "12345 [card]"),
            ("Authorization: Bearer " + token("", 30), "Authorization: Bearer [key]"),
            ("joe@x.com,ann@y.org;bob@z.net", "[email],[email];[email]"),
            ("tel:+15551234567;ext=1", "tel:[phone];ext=1"),
            ("http://10.0.0.1:8080/", "http://[ip]:8080/"),
            ("-----BEGIN PRIVATE KEY----- and so on", "[key] and so on"),
            ("fe80::1: up", "[ip]: up"),
        ],
    )
    def test_what_follows_a_match_stays(self, text, expected):
        """A match ends where it ends, also before more digits or words."""
        assert ALL.text(text) == expected

    def test_check_digits_decide(self):
        """A number with a wrong check digit is no card and no IBAN."""
        for name in ("card", "iban"):
            for text in FOUND[name]:
                last = text[-1]
                wrong = text[:-1] + (chr(ord(last) + 1) if last not in "9Z" else "1")
                assert shown(name, wrong) == wrong

    def test_overlapping_matches_are_one(self):
        """What two patterns find is replaced together, under the name of the one that begins first."""
        redact = Redact(patterns={"a": "one two", "b": "two three", "c": "three"})
        assert redact.text("zero one two three four") == "zero [a] four"

    def test_the_longer_of_two_that_begin_together_has_the_name(self):
        """The order in which patterns are given does not matter."""
        assert Redact(patterns={"a": "one", "b": "one two"}).text("one two three") == "[b] three"


class TestOwnPatterns:
    def test_expressions_functions_and_names(self):
        """A mapping takes True, an expression, a function, and the name of a registered function."""
        register_function("shout", lambda text: [match.span() for match in re.finditer("[A-Z]{3,}", text)])
        patterns = {
            "email": True,
            "ticket": r"T-\d+",
            "ada": lambda text: [(text.index("Ada"), text.index("Ada") + 3)] if "Ada" in text else [],
            "shout": {"function": "shout"},
            "phone": False,
        }
        assert Redact(patterns=patterns).text("joe@x.com T-12 Ada HEY +49 171 1234567") == (
            "[email] [ticket] [ada] [shout] +49 171 1234567"
        )
        assert Redact(patterns=["shout", "email"]).text("HEY a@b.de") == "[shout] [email]"

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"patterns": ["emial"]}, "there is no pattern 'emial'; did you mean 'email'?"),
            ({"patterns": {"emial": True}}, "did you mean 'email'?"),
            ({"patterns": []}, "got none of them"),
            ({"patterns": {"email": False}}, "got none of them"),
            ({"patterns": "email"}, "or a mapping of names to patterns, got a str"),
            ({"patterns": [str.upper]}, "write {'my-name': …}"),
            ({"patterns": {"x": "("}}, "patterns.x: expected a regular expression, got '('"),
            ({"patterns": {"x": "a*"}}, "patterns.x: expected an expression for at least one character"),
            (
                {"patterns": {"x": 5}},
                "patterns.x: expected True, a regular expression (a str) or a function, got an int",
            ),
            ({"patterns": {"x": {"function": "nobody"}}}, "function 'nobody' not registered"),
            ({"patterns": {"x": {"fun": "nobody"}}}, "expected {function: NAME}"),
            ({"patterns": {"": "a"}}, "got an empty str"),
            ({"replace": "{nam}"}, "expected only {name} and {number}"),
            ({"replace": "{"}, "replace: expected a text with {name}"),
            ({"replace": 5}, "replace: expected a str, got an int"),
            ({"replace": "*", "restore": True}, "expected {name} in it to restore"),
            ({"replace": "{name}{number}"}, "{number} only with restore=True"),
            ({"replace": "{name}", "restore": True}, "to restore, expected marks around it, such as [{name}]"),
            ({"replace": "*{name}*", "restore": True}, "of which the first is in it only once"),
            ({"replace": " {name}]", "restore": True}, "to restore, expected marks"),
            ({"outgoing": False, "restore": True}, "set outgoing=True"),
            ({"outgoing": False, "incoming": False}, "leave nothing to do"),
            ({"outgoing": "yes"}, "outgoing: expected True or False"),
            ({"restore": 1}, "restore: expected True or False"),
        ],
    )
    def test_wrong_settings(self, settings, expected):
        """Each mistake is told when the object is made, with the setting and what to write."""
        with pytest.raises(ValueError, match=re.escape(expected)) as caught:
            Redact(**settings)
        assert str(caught.value).startswith(("Redact: ", "function "))

    def test_all_wrong_patterns_are_told_at_once(self):
        """One error lists them."""
        with pytest.raises(ConfigError) as caught:
            Redact(patterns={"a": "(", "b": 5, "c": True})
        assert len(caught.value.problems) == 3

    def test_an_async_function_is_refused(self):
        """A pattern's function returns its value at once."""

        async def find(text):
            return []

        with pytest.raises(ConfigError, match=r"patterns\.x: expected a plain function, got an async function"):
            Redact(patterns={"x": find})

    @pytest.mark.parametrize(
        "found", [None, 5, "ab", [1], [(1,)], [("a", "b")], [(0, 99)], [(-1, 2)], [(2, 1)], [None]]
    )
    def test_what_a_function_returns_is_checked(self, found):
        """The error names the pattern, and quotes nothing of the text."""
        with pytest.raises(TypeError, match="the pattern 'x': expected pairs") as caught:
            Redact(patterns={"x": lambda text: found}).text("very secret")
        assert "secret" not in str(caught.value)

    def test_the_settings_are_shown(self):
        """The `repr` has all settings, and later changes of what was given change nothing."""
        patterns = {"email": True, "ticket": r"T-\d+"}
        redact = Redact(patterns=patterns)
        patterns["ticket"] = "x"
        assert repr(redact) == (
            "Redact(patterns={'email': True, 'ticket': 'T-\\\\d+'}, replace='[{name}]', outgoing=True, incoming=True, "
            "restore=False)"
        )


UNITS = [
    *[
        "a@",
        "a@a",
        "a@b.",
        "a@b.c",
        "a.",
        "-a@",
        "'a",
        "a" * 64 + "@",
        "1",
        "1.",
        "1 ",
        "01 ",
        "0",
        "+1",
        "(0",
        "(02) ",
    ],
    *["4111 ", "4111 1111 1111 1111 ", "4" * 19 + " ", "DE89", "DE89 3704 ", "AB12 ", "sk-", "sk-a1", "xoxb-1", "AKIA"],
    *[
        "eyJ",
        "eyJaaaaaaaaa.",
        " eyJ" + "a" * 900 + ".",
        "-----BEGIN PRIVATE KEY-----\n",
        "-----BEGIN ",
        "-",
        "Bearer a1",
    ],
    *["bearer " + "a" * 1990 + " ", "::", "a:", "fe80::", "1.2.3.4.", "1.2.3.4 "],
]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit[:20])
def test_no_text_takes_long(unit):
    """The time grows with the length of the text alone. (A search that took its square would take minutes.)"""
    text = (unit * (100_000 // len(unit) + 1))[:100_000] + " 1@-----BEGIN earer . :"
    started = time.process_time()
    ALL.text(text)
    assert time.process_time() - started < 10


# Beginnings

pieces = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\w", r"\d", "1", " ", r"\s", "\n", r"\b", "^", "$", r"\Z", r"\B"]
)
expressions = st.recursive(
    pieces | st.sampled_from(["(?<=a)", "(?<!b)", r"(?<![\w-])"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{1,3}", "*?", "++", "{2}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
        inner.map(lambda one: f"(?>{one})"),
        inner.map(lambda one: f"(?i:{one})"),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(expressions, st.sampled_from([0, re.MULTILINE, re.IGNORECASE, re.DOTALL]), st.text("aabB1 -\n", max_size=8))
def test_more_text_changes_no_match_that_is_no_beginning(source, flags, text):
    """Where no beginning is found, the match in the first part of a text is the match in the whole text."""
    regex = re.compile(source, flags)
    known = beginnings(regex, 5)
    for end in range(len(text)):
        for at in range(end):
            if known.regex.match(text[:end], at) is None:
                early, late = regex.match(text[:end], at), regex.match(text, at)
                assert (early and early.span()) == (late and late.span())
    for at in range(len(text)):
        bounded = text[: at + int(min(known.ahead, 99))]
        cut = max(0, at - max(known.behind, 1))
        whole, here = regex.match(text, at), regex.match(bounded[cut:], at - cut)
        assert (whole and whole.end() - at) == (here and here.end() - (at - cut))


@pytest.mark.parametrize(
    ("source", "held"),
    [
        (r"T-\d+", ["", "", "T", "T-", "T-1", "T-12", ""]),
        (r"T-\d{2}", ["", "", "T", "T-", "T-1", "", ""]),
        (r"\bT-\d\b", ["", "", "T", "T-", "T-1", "", ""]),
    ],
)
def test_what_is_a_beginning(source, held):
    """Only what may become part of a match is one."""
    regex = beginnings(re.compile(source), 5).regex
    text = " T-12 x"
    found = [regex.search(text[:end]) for end in range(len(held))]
    assert [match[0] if match else "" for match in found] == held


def test_an_expression_with_references_begins_everywhere():
    """What such an expression may still match is not known."""
    known = beginnings(re.compile(r"(\w)-\1"), 5)
    assert known.regex.match("anything", 3)
    assert known.behind == 5
