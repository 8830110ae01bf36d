"""The additions of the HTTP providers to any codec's errors: the model, the retry delay, and a masked key."""

from __future__ import annotations

import errno
import json
import socket

import httpx
import pytest
from support.misbehaving import Peer, Received, serve
from support.tiny import KEY, Caller

from fluxibly import LLM, LLMConfig
from fluxibly.config import Timeouts
from fluxibly.errors import ConnectionFailed, ProviderError
from fluxibly.middleware import Retry
from fluxibly.providers.dialects.errors import EXCERPT_LENGTH, QUOTE_LENGTH
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.http._limits import Limits
from fluxibly.providers.http._network_errors import translated

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


@pytest.fixture
def port() -> int:
    """A port of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(params=["sync", "asyncio", "trio", "sync, httpx", "asyncio, httpx", "trio, httpx"])
def each_caller(request: pytest.FixtureRequest) -> Caller:
    """A caller of each shell, with each kind of connections."""
    mode, _, transport = request.param.partition(", ")
    return Caller(mode, over_httpx=bool(transport))


class TestNobodyListens:
    @pytest.mark.parametrize(
        "host",
        [
            *("127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "[::1]", "our-server"),
            *("0.0.0.0", "[::ffff:127.0.0.1]", "localhost.", "models.localhost"),  # noqa: S104  # an address to call
        ],
    )
    def test_a_refusal_of_this_machine_is_not_retried(
        self, each_caller: Caller, host: str, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Waiting does not start a server. The message names the address, and says what to do."""
        look_up = socket.getaddrinfo

        def names(name: object, *args: object, **settings: object) -> object:
            text = name.decode() if isinstance(name, bytes) else name
            ours = text in ("our-server", "localhost.", "models.localhost")
            return look_up("127.0.0.1" if ours else name, *args, **settings)  # type: ignore[arg-type]  # passed on

        monkeypatch.setattr(socket, "getaddrinfo", names)
        for method in (each_caller.complete, each_caller.stream):
            with pytest.raises(ConnectionFailed) as caught:
                method(f"http://{host}:{port}/v1")
            expected = f"no server listens at {host.lower()}:{port} (connection refused): start it, or set api_base"
            assert expected in str(caught.value)
            assert not caught.value.retryable

    @pytest.mark.parametrize(
        ("framework", "program"),
        [
            ("ollama", "Ollama (ollama serve)"),
            ("llamacpp", "llama.cpp (llama-server)"),
            ("vllm", "vLLM (vllm serve)"),
            ("lmstudio", "LM Studio's server (lms server start)"),
        ],
    )
    def test_the_program_to_start(self, framework: str, program: str, port: int) -> None:
        """The message names the program of a service that runs on the user's machine. Nothing is retried."""
        config = LLMConfig(framework=framework, model="m", api_base=f"http://localhost:{port}/v1")
        with LLM(config, middleware=[Retry(max_retries=3)]) as llm, pytest.raises(ConnectionFailed) as caught:
            llm.complete("hi")
        assert f"start {program}, or set api_base" in str(caught.value)

    def test_a_proxy_of_this_machine(self, caller: Caller, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A proxy that does not run is not waited for either, and the service is not said to be down."""
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        with pytest.raises(ConnectionFailed, match=rf"no connection to the proxy 127\.0\.0\.1:{port}") as caught:
            caller.complete("http://api.test/v1")
        assert not caught.value.retryable

    @pytest.mark.parametrize("host", ["api.test", "10.1.2.3", "fe80::1"])
    def test_another_machine_may_answer_later(self, host: str) -> None:
        """A refusal of another machine stays retryable, also one by a proxy's port of this machine."""
        limits = Limits(Timeouts(), total=None)
        for where in ("10.1.2.3", "127.0.0.1"):
            refused = ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed ('{where}', 1080)")
            error = httpx.ConnectError("no connection")
            error.__cause__ = refused
            found = translated(error, host, 443, limits)
            assert isinstance(found, ConnectionFailed)
            assert found.retryable
            assert "refused the connection" in str(found)

    def test_a_host_that_is_gone_when_it_is_looked_up_again(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The refusal is the error. httpx does not say which address refused, so the host is looked up once more."""
        look_up = socket.getaddrinfo

        def names(host: object, service: object, *args: object, **settings: object) -> object:
            if service is None:
                raise socket.gaierror(socket.EAI_AGAIN, "no name server")
            return look_up("127.0.0.1", service, *args, **settings)  # type: ignore[arg-type]  # passed on

        monkeypatch.setattr(socket, "getaddrinfo", names)
        with pytest.raises(ConnectionFailed, match="refused the connection"):
            Caller("sync", over_httpx=True).complete(f"http://our-server:{port}/v1")

    @pytest.mark.parametrize("code", [errno.ECONNRESET, errno.ENETUNREACH, errno.ETIMEDOUT])
    def test_other_failures_stay_retryable(self, code: int) -> None:
        """Only a refusal means that nobody listens."""
        found = translated(OSError(code, "failed"), "localhost", 80, Limits(Timeouts(), total=None))
        assert isinstance(found, ConnectionFailed)
        assert found.retryable
