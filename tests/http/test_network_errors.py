"""The additions of the HTTP providers to any codec's errors: the model, the retry delay, and a masked key."""

from __future__ import annotations

import json

import pytest
from support.misbehaving import Peer, Received, serve
from support.tiny import KEY, Caller

from fluxibly.errors import ProviderError
from fluxibly.providers.dialects.errors import EXCERPT_LENGTH, QUOTE_LENGTH
from fluxibly.providers.dialects.openai_chat import OpenAICodec

HALF = KEY[: len(KEY) // 2]


def failing(caller: Caller, method: str, error: object, status: str, **headers: str) -> ProviderError:
    """Return the error for a response with `error`: in a body, or in an event of a stream if the status is 200 OK."""

    def script(peer: Peer, request: Received) -> None:
        if status == "200 OK" and request.json.get("stream"):
            peer.begin_stream(**headers)
            peer.chunk(f"data: {json.dumps({'error': error})}\n\n")
            peer.chunk("")
        else:
            peer.answer({"error": error}, status, **headers)

    with serve(script) as server, pytest.raises(ProviderError) as caught:
        getattr(caller, method)(server.url, codec=OpenAICodec())
    return caught.value


@pytest.mark.parametrize("method", ["complete", "stream"])
@pytest.mark.parametrize("status", ["200 OK", "500 Internal Server Error"])
class TestErrors:
    @pytest.mark.parametrize("start", [QUOTE_LENGTH - 10, EXCERPT_LENGTH - len('{"error": {"message": "') - 10])
    def test_no_half_of_a_key_at_the_end_of_an_excerpt(
        self, caller: Caller, method: str, status: str, start: int
    ) -> None:
        """The key is masked in the code, and in the message and the body before these are cut."""
        said = {"message": "x" * start + KEY, "code": f"bad_{KEY}"}
        error = failing(caller, method, said, status)
        assert HALF not in f"{error} {error!r} {error.__dict__}"
        assert error.code == "bad_***"
        assert error.body

    def test_the_headers_say_how_long_to_wait(self, caller: Caller, method: str, status: str) -> None:
        """The headers count for an error in a 200 too, although the codec does not see them."""
        assert failing(caller, method, {"message": "busy"}, status, retry_after="7").retry_after == 7

    def test_the_message_names_the_model_once(self, caller: Caller, method: str, status: str) -> None:
        """The model is not added to a message that names it."""
        message = str(failing(caller, method, {"message": "busy"}, status))
        assert message.count("tiny-1") == 1
        assert message.startswith("tiny (tiny-1): OpenAI answered ")
        assert str(failing(caller, method, {"message": "tiny-1 is busy"}, status)).count("tiny-1") == 1
