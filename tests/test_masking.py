"""Masking: no key and no run of a prompt reaches a log or a span."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from hypothesis import given, strategies as st

from fluxibly._masking import RUN, error_message, mask_request, mask_secrets
from fluxibly.errors import ResponseInvalid, ServerError, StreamInterrupted
from fluxibly.types import Message, Opaque, Reasoning, Request, Response, ToolCall

texts = st.text(alphabet=st.characters(exclude_characters="[…]", exclude_categories=["Cs"]), max_size=60)
echoes = st.sampled_from([str, lambda t: json.dumps(t)[1:-1], lambda t: json.dumps(t, ensure_ascii=False)[1:-1], repr])


def asking(*contents):
    return Request(model="m", messages=[Message.user(content) for content in (*contents, "?")])


def shared(text, content):
    """Return the runs of 12 characters that both texts contain."""
    runs = {content[at : at + RUN] for at in range(len(content) - RUN + 1)}
    return [text[at : at + RUN] for at in range(len(text) - RUN + 1) if text[at : at + RUN] in runs]


class TestRequests:
    @given(
        before=texts,
        content=texts,
        after=texts,
        start=st.integers(0, 50),
        length=st.integers(0, 60),
        echo=echoes,
    )
    def test_no_shared_run_survives(self, *, before, content, after, start, length, echo):
        """Every part of a prompt that a server echoes is masked, however the server escapes it."""
        echoed = echo(content[start : start + length])
        masked = mask_request(before + echoed + after, asking(content))
        assert shared(masked, content) == []
        for escaped in (json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1], repr(content)[1:-1]):
            if escaped != content and len(content) >= RUN:
                assert shared(masked, escaped) == []

    @given(texts, texts)
    def test_what_is_not_shared_stays(self, text, content):
        """A message that quotes nothing stays unchanged."""
        if not any(shared(text, form) for form in (content, json.dumps(content), repr(content))) and not any(
            shared(text, form) for form in (json.dumps(content, ensure_ascii=False),)
        ):
            assert mask_request(text, asking(content)) == text

    def test_only_the_run_is_cut(self):
        """The server's words around a quote stay readable."""
        request = asking("Please tell me all about Ann and her illness.")
        text = "400: 'tell me all about Ann, is not allowed (code 7)"
        assert mask_request(text, request) == "400: '[…], is not allowed (code 7)"

    def test_short_quotes_stay(self):
        """A word that both texts contain is too short to be masked."""
        assert mask_request("unknown model 'small'", asking("a small one")) == "unknown model 'small'"

    def test_tool_calls_and_reasoning_are_content(self):
        """The tool calls and the reasoning of every message in the conversation are masked."""
        answer = Message(
            "assistant",
            tool_calls=[ToolCall("1", "look", {"patient": "Ann Smith-Jones"})],
            reasoning=[Reasoning(text="she may have measles")],
        )
        request = Request(model="m", messages=[Message.user("hi"), answer])
        text = "cannot take Ann Smith-Jones, nor she may have measles"
        assert mask_request(text, request) == "cannot take […], nor […]"

    def test_opaque_parts_are_content(self):
        """What a service did on its own may quote the conversation."""
        searched = Opaque("anthropic", {"input": {"queries": ["measles in Ghent", 3]}, "id": "s1"})
        request = Request(model="m", messages=[Message.user("hi"), Message.assistant([searched])])
        assert mask_request("refused: measles in Ghent", request) == "refused: […]"

    @pytest.mark.parametrize(
        ("text", "masked"),
        [
            ("twelve chars", "[…]"),
            ("eleven char", "eleven char"),
            ("twelve chars!", "[…]!"),
            ("no: twelve chars", "no: […]"),
            ("no: twelve chars!", "no: […]!"),
            ("twelve charstwelve chars", "[…]"),
            ("twelve chars, twelve chars", "[…], […]"),
        ],
    )
    def test_the_borders_of_a_run(self, text, masked):
        """A run of exactly twelve characters is cut, wherever it is, and leaves one mark. Eleven characters stay."""
        assert mask_request(text, asking(text if len(text) < RUN else "twelve chars")) == masked

    @pytest.mark.parametrize("place", range(13))
    def test_a_run_at_any_place_of_a_prompt(self, place):
        """It makes no difference where in the prompt the quote stands."""
        content = "abcdefghijklmnopqrstuvwxyz"
        assert mask_request(f"<{content[place : place + RUN]}>", asking(content)) == "<[…]>"

    def test_runs_of_two_messages_that_touch(self):
        """Quotes from two messages that touch leave one mark."""
        assert mask_request("<abcdefghijklmnopqrstuvwx>", asking("abcdefghijkl", "mnopqrstuvwx")) == "<[…]>"

    @pytest.mark.parametrize(
        ("content", "echo"),
        [
            ("é\u3000" * 6, lambda text: json.dumps(text)[1:-1]),
            ('é"' * 6, lambda text: json.dumps(text, ensure_ascii=False)[1:-1]),
            ("1\xa02\xa03\xa04\xa05\xa06\xa0", lambda text: repr(text)[1:-1]),
        ],
        ids=["JSON in ASCII", "JSON", "Python"],
    )
    def test_a_quote_with_escapes(self, content, echo):
        """A quote is masked if the server escapes every second character of it."""
        assert mask_request(f"bad: {echo(content)}", asking(content)) == "bad: […]"

    @pytest.mark.parametrize(
        ("length", "end"), [(1_999, ""), (2_000, ""), (2_001, "…"), (5_000, "…")], ids=["1999", "2000", "2001", "5000"]
    )
    def test_long_messages_are_cut(self, length, end):
        """A message is cut to 2,000 characters, and only a message that was cut says so."""
        assert mask_request("x" * length, asking("y")) == "x" * min(length, 2_000) + end

    def test_what_a_huge_prompt_may_share_is_masked(self):
        """If it would take too long to see which words a message shares with a prompt, those that it may share are cut."""
        numbers = [f"{number:06}" for number in range(250)]
        text, content = " ".join(numbers), "......".join(numbers)
        assert mask_request(text, asking(content)) == text
        assert mask_request(text, asking(content + "." * 2_000_000)) == "[…]"

    @pytest.mark.parametrize("content", ["lorem ipsum " * 900_000, "a" * 10_000_000], ids=["words", "one letter"])
    def test_a_prompt_of_ten_megabytes(self, content):
        """A prompt of ten megabytes is masked in bounded time."""
        assert content[:40] not in mask_request(f"no: {content[:1900]}", asking(content))


class TestErrors:
    def test_the_answer_is_content_too(self):
        """Quotes from an answer are masked, in validation errors and in errors of an interrupted stream."""
        response = Response("the patient has measles")
        invalid = ResponseInvalid("'the patient has measles' is too long", response=response)
        assert "measles" not in error_message(invalid, [asking("hi")])
        cause = ServerError("after 'the patient has measles'")
        stopped = StreamInterrupted("interrupted", partial=response)
        stopped.__cause__ = cause
        assert error_message(stopped, [asking("hi")]) == "after '[…]'"

    def test_each_request_is_masked(self):
        """Every request of a call whose middleware changed the prompt is masked."""
        error = ServerError("cannot do: one long prompt, quite different words.")
        assert (
            error_message(error, [asking("one long prompt"), asking("quite different words")]) == "cannot do: […], […]."
        )


class TestSecrets:
    SECRET = 'sk-"é\\key+/='  # noqa: S105  # opens nothing

    @pytest.mark.parametrize(
        "written",
        [
            SECRET,
            json.dumps(SECRET),
            json.dumps(SECRET, ensure_ascii=False),
            repr(SECRET),
            repr(SECRET.encode()),
            quote(SECRET, safe=""),
        ],
    )
    def test_however_it_is_written(self, written):
        """A key is masked if it is plain, in JSON, in a Python repr of a str or of bytes, or in a URL."""
        masked = mask_secrets(f"wrong key {written}, sorry", [self.SECRET])
        assert "key+" not in masked
        assert "key%2B" not in masked
        assert masked.startswith("wrong key ")
        assert masked.endswith(", sorry")

    @pytest.mark.parametrize(
        ("secret", "masked"), [("abcd", "key ***"), ("abc", "key abcd"), (" ab\n", "key abcd"), ("abcd\n", "key ***")]
    )
    def test_a_dummy_is_no_secret(self, secret, masked):
        """A key of fewer than four characters is a dummy, and may be part of a word."""
        assert mask_secrets("key abcd", [secret]) == masked

    def test_a_key_that_is_no_text(self):
        """Bytes of the environment that are not UTF-8 do not hinder the masking."""
        assert mask_secrets("bad key sk-\udcff-1", ["sk-\udcff-1"]) == "bad key ***"

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Basic", "Token", "Key", "ApiKey", "Api-Key"])
    def test_the_token_of_a_header(self, scheme):
        """A server that refuses an `Authorization` quotes the token alone, too."""
        header = f"{scheme} dG9rZW4t-0123"
        assert mask_secrets("Incorrect API key: dG9rZW4t-0123", [header]) == "Incorrect API key: ***"
        assert mask_secrets(f"Incorrect header: {header}", [header]) == "Incorrect header: ***"

    def test_words_of_a_header_are_no_secrets(self):
        """Of a header that is no authorization, only the whole value is masked."""
        assert mask_secrets("no tables here", ["Tide tables"]) == "no tables here"

    def test_without_the_line_end_it_was_read_with(self):
        """A key from a file is masked even if the server echoes it without the line end."""
        assert mask_secrets("bad key sk-123", ["sk-123\n"]) == "bad key ***"
        assert mask_secrets(repr(b"Bearer sk-123\n"), ["sk-123\n"]) == "b'Bearer ***'"

    def test_a_secret_that_contains_another(self):
        """The longer secret is replaced first."""
        assert mask_secrets("key sk-1-extra", ["sk-1", "sk-1-extra"]) == "key ***"

    def test_empty_secrets_are_ignored(self):
        """An empty secret masks nothing."""
        assert mask_secrets("a text", ["", " \n"]) == "a text"
