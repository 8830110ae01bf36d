"""What an endpoint keeps secret, without I/O: keys that change, and keys at the end of an excerpt."""

from __future__ import annotations

import json
from collections.abc import Callable

import attrs
import pytest
from support.tiny import SERVICE, ask, config

from fluxibly.errors import AuthenticationError, BadRequest, ProviderError
from fluxibly.providers.dialects.codec import Event
from fluxibly.providers.dialects.errors import EXCERPT_LENGTH, QUOTE_LENGTH
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.http._endpoint import Endpoint

KEY = "sk-abcdefghijklmnopqrstuvwxyz0123"
GATEWAY = "gateway-0123456789"
ENDS = [before for end in (QUOTE_LENGTH, EXCERPT_LENGTH) for before in range(end - 48, end, 8)]
"""Numbers of characters before the key, with some of which an excerpt ends within the key."""
ANSWERS = ['{"error": {"message": "{}"}}', '{"error": "{}"}', '{"choices": "{}"}']
"""Bodies that report an error, or cannot be read."""


def endpoint(**headers: str) -> Endpoint:
    settings = attrs.evolve(config("http://h/v1", key=KEY), headers=headers)
    return Endpoint(OpenAICodec(), SERVICE, settings, name="Tiny")


def shown(error: ProviderError) -> str:
    return f"{error!r} {vars(error)}"


def refused(at: Endpoint, message: str, status: int = 400) -> ProviderError:
    return at.refuse(status, {}, json.dumps({"error": {"message": message}}).encode(), ask())


class TestExcerpts:
    """Half a key is secret too. An error must not quote a body that ends within the key."""

    @pytest.mark.parametrize("before", ENDS)
    @pytest.mark.parametrize("form", ["{}", *ANSWERS])
    @pytest.mark.parametrize("secret", [KEY, GATEWAY])
    def test_a_refusal(self, before: int, form: str, secret: str) -> None:
        """The body of an error, in JSON or not."""
        body = form.replace("{}", "x" * before + secret).encode()
        error = endpoint().refuse(400, {}, body, ask(headers={"x-gateway": GATEWAY}))
        assert secret[:6] not in shown(error)

    @pytest.mark.parametrize("before", ENDS)
    @pytest.mark.parametrize("form", ANSWERS)
    def test_an_answer_that_is_an_error(self, before: int, form: str) -> None:
        """The body of a 200 that reports an error, or cannot be read."""
        at, body = endpoint(), form.replace("{}", "x" * before + KEY).encode()
        with pytest.raises(ProviderError) as caught:
            at.response({}, body)
        assert KEY[:6] not in shown(caught.value)

    @pytest.mark.parametrize("before", ENDS)
    @pytest.mark.parametrize("form", ANSWERS)
    def test_an_event_that_is_an_error(self, before: int, form: str) -> None:
        """The data of an event that reports an error, or cannot be read."""
        at, event = endpoint(), Event(form.replace("{}", "x" * before + KEY).encode())
        with pytest.raises(ProviderError) as caught:
            list(at.codec.decoder().decode_event(event))
        assert KEY[:6] not in shown(at.event_error(event, caught.value))


class TestKeys:
    def test_an_answer_that_quotes_a_header_of_the_call(self) -> None:
        """The error of a 200 has the call's own authorization masked, in the message, the code and the body."""
        at, request = endpoint(), ask(headers={"authorization": f"Bearer {GATEWAY}"})
        body = json.dumps({"error": {"message": f"no: {GATEWAY}", "code": GATEWAY}}).encode()
        with pytest.raises(ProviderError) as caught:
            at.response({}, body)
        error = at.failure(caught.value, request, at.limits(request, stream=False), {})
        assert isinstance(error, ProviderError)
        assert "no: ***" in str(error)
        assert GATEWAY not in shown(error)

    def test_an_answer_that_quotes_a_secret_of_the_call(self) -> None:
        """A refusal has the secrets in the call's `extra` masked, and only these."""
        at, request = endpoint(), ask(extra={"auth": [{"api_token": GATEWAY}], "style": "formal"})
        body = json.dumps({"error": {"message": f"no: {GATEWAY} formal", "code": GATEWAY}}).encode()
        error = at.refuse(401, {}, body, request)
        assert "no: *** formal" in str(error)
        assert GATEWAY not in shown(error)

    def test_the_last_keys_and_the_headers_stay_secret(self) -> None:
        """However often the key changes, the headers and the last 64 keys are masked. Older keys are forgotten."""
        at = endpoint(**{"x-gateway": GATEWAY})
        for number in range(100):
            at.use_key(f"token-{number:03}-{KEY}")
        masked = refused(at, f"not token-099-{KEY}, token-036-{KEY}, {GATEWAY}, token-035-{KEY}!")
        assert f"not ***, ***, ***, token-035-{KEY}!" in str(masked)

    def test_headers_of_old_keys_are_forgotten(self) -> None:
        """An endpoint whose key changes every hour does not grow."""
        at = endpoint()
        for number in range(100):
            at.use_key(f"token-{number}")
            sent = dict(at.outgoing(ask(), stream=False).headers)
            assert sent[b"authorization"] == f"Bearer token-{number}".encode()
        assert len(at._prepared) <= 32

    @pytest.mark.parametrize("key", ["a\nb", "a\x00b", "a\x7f", "aé", " a", "a\t"])
    def test_a_malformed_key_changes_nothing(self, key: str) -> None:
        """A key that a header cannot carry is not used. The key before it still is."""
        at = endpoint()
        with pytest.raises(AuthenticationError, match=r"the API key in api_key (has|begins or ends with)"):
            at.use_key(key)
        assert dict(at.outgoing(ask(), stream=False).headers)[b"authorization"] == f"Bearer {KEY}".encode()

    def test_the_headers_of_a_call_are_not_kept(self) -> None:
        """What one call sends is neither sent nor masked in the next."""
        at = endpoint()
        at.outgoing(ask(headers={"x-gateway": GATEWAY}), stream=False)
        assert b"x-gateway" not in dict(at.outgoing(ask(), stream=False).headers)
        assert GATEWAY in str(refused(at, f"unknown: {GATEWAY}"))


@pytest.mark.parametrize(
    "spoil",
    [lambda name: f"{name}\r\nx-b", lambda name: f" {name}", lambda name: f"{name}:"],
    ids=["lines", "space", "colon"],
)
def test_a_header_that_cannot_be_sent_is_not_shown(spoil: Callable[[str], str]) -> None:
    """The error names the header, and does not show its value."""
    with pytest.raises(BadRequest, match="cannot be sent") as caught:
        endpoint().outgoing(ask(headers={spoil("x-a"): GATEWAY}), stream=False)
    assert GATEWAY not in shown(caught.value)
