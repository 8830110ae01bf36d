"""The routes to servers, on real sockets: addresses, TLS, and proxies from the environment."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
from pathlib import Path

import pytest
from support.misbehaving import Peer, Received, serve
from support.tiny import DONE, SERVICE, Caller, TinyCodec, config, event, whole

from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError, ConnectionFailed
from fluxibly.providers.http import HTTPProvider

CERTIFICATE = Path(__file__).parents[1] / "data" / "localhost.pem"


@pytest.fixture
def context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        [
            "api.example.com",
            "localhost:8080/v1",
            "/run/model.sock",
            "unix:///run/model.sock",
            "ftp://example.com",
            "http://",
            "http:///v1",
            " http://example.com",
            "http://example.com/v1 ",
            "http://example.com/v1\n",
            "http://exam ple.com",
            "http://[::1",
            "http://example.com:port",
            "http://example.com:0",
            "http://example.com:-1",
            "http://example.com:65536",
            "http://example.com:99999/v1",
        ],
    )
    def test_invalid_addresses(self, url: str) -> None:
        """An invalid address is refused with the setting's name, for any framework."""
        with pytest.raises(ConfigError, match="api_base"):
            LLMConfig(framework="litellm", model="m", api_base=url)

    @pytest.mark.parametrize("url", ["http://u:p@example.com", "http://[nowhere]/", "http://xn--/v1"])
    def test_unusable_addresses(self, url: str) -> None:
        """A user name, a password and an invalid host are refused. A password would show in printed addresses."""
        with pytest.raises(ConfigError, match="api_base"):
            HTTPProvider(TinyCodec(), SERVICE, config(url))

    @pytest.mark.parametrize(
        "url", ["http://h/v1/chat/completions", "https://h/v1/messages/", "http://h:11434/api/chat"]
    )
    def test_an_endpoint_is_not_a_base(self, url: str) -> None:
        """Services document addresses whose path the codec would append a second time."""
        with pytest.raises(ConfigError, match=r"api_base: expected the address without /\S+, which is appended to it"):
            HTTPProvider(TinyCodec(), SERVICE, config(url))

    @pytest.mark.parametrize("host", ["double..dot", "a" * 64 + ".example", ".example"])
    def test_an_impossible_host_name(self, caller: Caller, host: str) -> None:
        """The error is the same as for a host that does not exist."""
        with pytest.raises(ConnectionFailed, match="was not found"):
            caller.complete(f"http://{host}/v1")

    @pytest.mark.parametrize("url", ["HTTP://LOCALHOST:{}/v1", "http://127.0.0.1:{}/v1/#there"])
    def test_spellings_of_an_address(self, caller: Caller, url: str) -> None:
        """Capitals are accepted, and so are a slash and a fragment at the end."""
        with serve(whole) as server:
            assert caller.complete(url.format(server.port)).text == "hi"
            assert server.requests[0].target == "/v1/chat"

    def test_ipv6(self, caller: Caller) -> None:
        """The host header has the brackets of an IPv6 address."""
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"IPv6 is not available: {error}")
        with serve(whole, host="::1") as server:
            assert caller.complete(f"http://[::1]:{server.port}/v1").text == "hi"
            assert server.requests[0].headers["host"] == f"[::1]:{server.port}"


class TestTLS:
    @pytest.mark.usefixtures("patient")
    def test_tls_with_a_private_certificate(
        self, caller: Caller, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SSL_CERT_FILE sets the trusted certificates. Whole and streamed responses leave the connection reusable."""
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))

        def script(peer: Peer, request: Received) -> None:
            peer.begin_stream()
            peer.chunk(event("x" * 100_000) + DONE if request.json["stream"] else '{"text": "hello"}')
            peer.chunk("")

        with serve(script, context) as server:
            assert caller.complete(server.url, times=3).text == "hello"
            assert server.connections == 1
            assert caller.stream(server.url, times=3) == "x" * 100_000
            assert server.connections == 2

    @pytest.mark.parametrize("clean", [True, False])
    def test_a_body_that_ends_with_tls(
        self, caller: Caller, context: ssl.SSLContext, clean: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without TLS's close_notify, the body may have been cut on the way (RFC 9112 §9.8)."""
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))

        def script(peer: Peer, request: Received) -> None:
            peer.send(b'HTTP/1.1 200 OK\r\n\r\n{"text": "hello"}')
            if clean:
                with contextlib.suppress(OSError):
                    peer.sock.unwrap()
            peer.close()

        with serve(script, context) as server:
            if clean:
                assert caller.complete(server.url).text == "hello"
            else:
                with pytest.raises(ConnectionFailed):
                    caller.complete(server.url)

    def test_an_untrusted_certificate(self, caller: Caller, context: ssl.SSLContext) -> None:
        """Certificates are verified. The error names the remedy, and is not retryable."""
        with serve(whole, context) as server:
            with pytest.raises(ConnectionFailed, match=r"not trusted.*SSL_CERT_FILE") as caught:
                caller.complete(server.url)
            assert not caught.value.retryable
            assert server.requests == []

    @pytest.mark.parametrize("content", [None, "no certificate"])
    def test_unreadable_certificates(
        self, caller: Caller, tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error is a ConfigError, which nothing retries, and it names the variable."""
        path = tmp_path / "trusted.pem"
        if content is not None:
            path.write_text(content)
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        with serve(whole) as server, pytest.raises(ConfigError, match="SSL_CERT_FILE"):
            caller.complete(f"https://127.0.0.1:{server.port}/v1")


class TestProxies:
    def test_a_proxy_forwards_plain_http(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """The proxy gets the whole URL and its own password."""
        with serve(whole) as proxy:
            monkeypatch.setenv("http_proxy", f"http://us%2540er:p%40ss@127.0.0.1:{proxy.port}")
            assert caller.complete("http://models.example/v1").text == "hi"
            request = proxy.requests[0]
        assert request.target == "http://models.example/v1/chat"
        assert request.headers["host"] == "models.example"
        assert request.headers["proxy-authorization"] == "Basic dXMlNDBlcjpwQHNz"

    def test_no_proxy(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hosts in `no_proxy` are reached directly."""
        monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with serve(whole) as server:
            assert caller.complete(server.url).text == "hi"

    def test_a_proxy_tunnels_tls(
        self, caller: Caller, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The proxy sees a CONNECT without the API key. The requests go through the tunnel to the server."""
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))

        def tunnel(peer: Peer, request: Received) -> None:
            peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            peer.sock = context.wrap_socket(peer.sock, server_side=True)
            inner = Peer(peer.server, peer.sock)
            while (received := inner.receive()) is not None:
                whole(inner, received)
            inner.close()

        with serve(tunnel) as proxy:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
            assert caller.complete("https://localhost:4430/v1", times=2).text == "hi"
            connect, *requests = proxy.requests
        assert (connect.method, connect.target) == ("CONNECT", "localhost:4430")
        assert "authorization" not in connect.headers
        assert [request.target for request in requests] == ["/v1/chat"] * 2

    def test_a_proxy_that_refuses(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error says that the proxy refused the connection."""
        with serve(lambda peer, request: peer.answer("no", "407 Proxy Authentication Required")) as proxy:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
            with pytest.raises(ConnectionFailed, match=r"the proxy refused.*407"):
                caller.complete("https://localhost/v1")

    def test_a_missing_proxy(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the proxy rather than the server."""
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        with pytest.raises(ConnectionFailed, match=r"no connection to the proxy 127\.0\.0\.1:1"):
            caller.complete("http://models.example/v1")

    @pytest.mark.parametrize("url", ["http://", "http://a:b:c", "http://127.0.0.1:99999", "socks4://127.0.0.1:1080"])
    def test_invalid_proxies(self, caller: Caller, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """An invalid or unsupported proxy is refused when the provider is made."""
        monkeypatch.setenv("all_proxy", url)
        with pytest.raises(ConfigError, match="the proxy that the environment sets"):
            caller.complete("http://models.example/v1")

    def test_socks_without_its_package(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the package to install."""
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1080")
        monkeypatch.setitem(sys.modules, "socksio", None)
        with pytest.raises(ConfigError, match=r"httpx\[socks\]"):
            caller.complete("http://models.example/v1")
