"""How calls reach Amazon Bedrock: regions, addresses, bearer keys, and AWS credentials that sign the calls."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import anyio
import attrs
import pytest
from support.aws import exception, stream
from support.libraries import MODES, STREAM_MODES, ask
from support.tracing_tools import Recorder

from fluxibly import LLM, AsyncLLM, LLMConfig, StreamInterrupted
from fluxibly.errors import (
    AuthenticationError,
    BadRequest,
    ConfigError,
    ConnectionFailed,
    PermissionDenied,
    RateLimitError,
    StreamProtocolError,
)
from fluxibly.middleware import Retry
from fluxibly.providers.bedrock import AWSCredentials, BedrockProvider
from fluxibly.registry import make_provider
from fluxibly.types import Request

BACKENDS = ["asyncio", "trio"]
MODEL = "us.anthropic.claude-sonnet-4-20250514-v1:0"
ARN = "arn:aws:bedrock:eu-west-3:123456789012:application-inference-profile/ab12"
ACCESS, SECRET = "AKIAEXAMPLE0123456789", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"  # they open nothing
TOKEN = "IQoJb3JpZ2luX2VjEXAMPLE//token+=="  # noqa: S105
BEARER = "ABSK-bearer-0123456789"

WHOLE = {
    "output": {"message": {"role": "assistant", "content": [{"text": "Hello there"}]}},
    "stopReason": "end_turn",
    "usage": {"inputTokens": 3, "outputTokens": 2, "totalTokens": 5},
    "metrics": {"latencyMs": 7},
}
EVENTS: list[tuple[str, Any]] = [
    ("messageStart", {"role": "assistant"}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "Hello"}}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": " there"}}),
    ("contentBlockStop", {"contentBlockIndex": 0}),
    ("messageStop", {"stopReason": "end_turn"}),
    ("metadata", {"usage": WHOLE["usage"], "metrics": {"latencyMs": 7}}),
]


@attrs.frozen
class Seen:
    """A request: its path, its headers with lower-case names, and its body."""

    path: str
    headers: dict[str, str]
    body: bytes


Answer = tuple[int, dict[str, str], bytes]
Rule = Callable[[Seen], Answer | None]


@attrs.define
class Server:
    """A loopback server in Bedrock's dialect. `rule` returns another answer than the usual one, or None.

    It stands for the services that give AWS credentials too: each time others, which are good for `lifetime`. `refuse`
    answers in place of credentials. The request for credentials with the number `held` waits for `released`.
    """

    url: str = ""
    seen: list[Seen] = attrs.Factory(list)
    rule: Rule = lambda _: None
    asked: int = 0
    """How often credentials were asked for."""
    lifetime: timedelta = timedelta(hours=1)
    refuse: Callable[[], Answer | None] = lambda: None
    held: int = 0
    waiting: threading.Event = attrs.Factory(threading.Event)
    released: threading.Event = attrs.Factory(threading.Event)

    @property
    def last(self) -> Seen:
        return self.seen[-1]

    def answer(self, seen: Seen) -> Answer:
        if seen.path == "/latest/api/token":
            return 200, {"x-aws-ec2-metadata-token-ttl-seconds": "21600"}, b"metadata"
        if seen.path == "/latest/meta-data/iam/security-credentials/":
            return 200, {}, b"a-role"
        if seen.path == "/" or seen.path.startswith(("/credentials", "/latest/", "/federation/")):
            return self.refuse_or_give(seen)
        self.seen.append(seen)
        return self.rule(seen) or usual(seen)

    def refuse_or_give(self, seen: Seen) -> Answer:
        self.asked += 1
        number = self.asked
        if number == self.held:
            self.waiting.set()
            self.released.wait(20)
        return self.refuse() or credentials(seen, f"ASIAEXAMPLE{number:09}", datetime.now(UTC) + self.lifetime)


def credentials(seen: Seen, access: str, end: datetime) -> Answer:
    """Return credentials, as the service that was asked gives them."""
    ending = end.strftime("%Y-%m-%dT%H:%M:%SZ")
    found = {"AccessKeyId": access, "SecretAccessKey": SECRET, "Expiration": ending}
    if seen.path == "/":
        (action,) = parse_qs(seen.body.decode())["Action"]
        fields = "".join([f"<{name}>{value}</{name}>" for name, value in {**found, "SessionToken": TOKEN}.items()])
        whole = f"<Credentials>{fields}</Credentials><AssumedRoleUser><Arn>a</Arn></AssumedRoleUser>"
        return 200, {}, f"<{action}Response><{action}Result>{whole}</{action}Result></{action}Response>".encode()
    if seen.path.startswith("/federation/"):
        end_ms = int(end.timestamp() * 1000)
        role = {"accessKeyId": access, "secretAccessKey": SECRET, "sessionToken": TOKEN, "expiration": end_ms}
        return 200, {}, json.dumps({"roleCredentials": role}).encode()
    return 200, {}, json.dumps({**found, "Token": TOKEN, "Code": "Success"}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            headers = {name.lower(): ", ".join(self.headers.get_all(name, [])) for name in self.headers}
            seen = Seen(self.path, headers, body)
            status, more, answer = found.answer(seen)
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST  # noqa: N815  # the names that the handler calls

        def log_message(self, *_: object) -> None:
            """Do not log requests."""

    class Many(ThreadingHTTPServer):
        request_queue_size = 50  # a test makes many calls at once

    with Many(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        found.url = f"http://127.0.0.1:{http.server_port}"
        yield found
        found.released.set()
        http.shutdown()
        thread.join()


def usual(seen: Seen) -> tuple[int, dict[str, str], bytes]:
    if seen.path.endswith("/converse-stream"):
        return 200, {"content-type": "application/vnd.amazon.eventstream"}, stream(*EVENTS)
    return 200, {"content-type": "application/json"}, json.dumps(WHOLE).encode()


def refusing(status: int, named: str, message: str, wrong: Callable[[Seen], bool] = lambda _: True) -> Rule:
    """Return a rule of the server: it refuses the requests that are `wrong` with an error of a name."""
    body = json.dumps({"message": message}).encode()
    return lambda seen: (status, {"x-amzn-errortype": f"{named}:http://internal"}, body) if wrong(seen) else None


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Take every AWS setting out of the environment, and make an empty home directory."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield tmp_path
    for name in list(os.environ):  # what the functions below have set
        if name.startswith("AWS_"):
            del os.environ[name]


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set AWS credentials, as a role gives them."""
    for name, value in {"ACCESS_KEY_ID": ACCESS, "SECRET_ACCESS_KEY": SECRET, "SESSION_TOKEN": TOKEN}.items():
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def config_for(server: Server, **settings: Any) -> LLMConfig:
    return LLMConfig(
        **{"framework": "bedrock", "model": MODEL, "api_base": server.url, "region": "us-east-1", **settings}
    )


def call(mode: str, config: LLMConfig, **request: Any) -> Any:
    """Return the response to a request in a mode of `MODES`."""
    asked = Request(**{"model": config.model, "messages": "hi", **request})
    return ask(mode, *[partial(make_provider, config, asynchronous=each) for each in (False, True)], asked)


def text_of(mode: str, config: LLMConfig, *layers: Any) -> str:
    """Return the text of a call through middleware, in a mode of `MODES`."""
    backend, _, streamed = mode.partition(" ")
    if backend == "sync":
        with LLM(config, middleware=layers) as llm:
            return "".join(llm.forward_stream("hi")) if streamed else llm.forward("hi")

    async def main() -> str:
        async with AsyncLLM(config, middleware=layers) as llm:
            if not streamed:
                return await llm.forward("hi")
            return "".join([text async for text in llm.forward_stream("hi")])

    return anyio.run(main, backend=backend)


# Signatures


def parts_of(authorization: str) -> tuple[str, str, list[str]]:
    """Return the scope, the signature and the names of the signed headers."""
    kind, _, rest = authorization.partition(" ")
    assert kind == "AWS4-HMAC-SHA256"
    fields = dict(part.strip().split("=", 1) for part in rest.split(","))
    return fields["Credential"], fields["Signature"], fields["SignedHeaders"].split(";")


def signature_of(seen: Seen) -> str:
    """Return the signature that a request should have, computed from what the server received (Signature Version 4)."""
    credential, _, names = parts_of(seen.headers["authorization"])
    _, day, region, service, last = credential.split("/")
    url = urlsplit(seen.path)
    headers = "".join([f"{name}:{' '.join(seen.headers[name].split())}\n" for name in sorted(names)])
    canonical = [
        *("POST", quote(url.path, safe="/~"), "&".join(sorted(url.query.split("&"))), headers, ";".join(sorted(names))),
        seen.headers.get("x-amz-content-sha256", hashlib.sha256(seen.body).hexdigest()),
    ]
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", seen.headers["x-amz-date"], "/".join([day, region, service, last]), digest])
    key = f"AWS4{SECRET}".encode()
    for part in (day, region, service, last):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def check_signature(seen: Seen) -> None:
    assert parts_of(seen.headers["authorization"])[1] == signature_of(seen)


@pytest.mark.usefixtures("signed")
class TestSignatures:
    @pytest.mark.parametrize("model", [MODEL, ARN.replace("eu-west-3", "us-east-1"), "amazon.nova-micro-v1:0"])
    def test_as_boto3_signs(self, server: Server, model: str) -> None:
        """Fluxibly and boto3 sign the same headers of the same path, and the server computes both signatures."""
        boto3 = pytest.importorskip("boto3")
        call("sync", config_for(server, model=model))
        client = boto3.client("bedrock-runtime", endpoint_url=server.url, region_name="us-east-1")
        client.converse(modelId=model, messages=[{"role": "user", "content": [{"text": "hi"}]}])
        ours, theirs = server.seen
        check_signature(theirs)
        check_signature(ours)
        assert ours.path == theirs.path
        assert json.loads(ours.body) == json.loads(theirs.body)
        credential, _, names = parts_of(ours.headers["authorization"])
        assert names == parts_of(theirs.headers["authorization"])[2]
        assert names == ["content-type", "host", "x-amz-date", "x-amz-security-token"]
        day = ours.headers["x-amz-date"][:8]
        assert credential == f"{ACCESS}/{day}/us-east-1/bedrock/aws4_request"
        assert ours.headers["x-amz-security-token"] == TOKEN

    def test_botocores_own_signer_agrees(self, server: Server) -> None:
        """Botocore's signer, given what the server received, computes the signature that was sent."""
        auth, awsrequest = pytest.importorskip("botocore.auth"), pytest.importorskip("botocore.awsrequest")
        credentials = pytest.importorskip("botocore.credentials").Credentials(ACCESS, SECRET, TOKEN)
        call("sync", config_for(server), messages="Zürich\n" * 1_000)
        seen = server.last
        _, signature, names = parts_of(seen.headers["authorization"])
        headers = {name: seen.headers[name] for name in names}
        request = awsrequest.AWSRequest("POST", server.url + seen.path, headers=headers, data=seen.body)
        request.context["timestamp"] = seen.headers["x-amz-date"]
        signer = auth.SigV4Auth(credentials, "bedrock", "us-east-1")
        assert signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request) == signature

    def test_in_each_mode(self, server: Server, mode: str) -> None:
        """Calls of all modes are signed, and their answers read."""
        response = call(mode, config_for(server))
        check_signature(server.last)
        assert (response.text, response.finish_reason, response.usage.total_tokens) == ("Hello there", "stop", 5)
        assert server.last.path == f"/model/{quote(MODEL, safe='')}/converse{'-stream' * ('stream' in mode)}"

    def test_each_attempt(self, server: Server, mode: str) -> None:
        """A retry is signed anew, because a signature is only good for some minutes."""
        times = iter([503, 200])
        server.rule = lambda _: (503, {"retry-after-ms": "1"}, b"") if next(times) == 503 else None
        text = text_of(mode, config_for(server), Retry(max_retries=1))
        assert text == "Hello there"
        assert len(server.seen) == 2
        for seen in server.seen:
            check_signature(seen)

    def test_other_headers(self, server: Server) -> None:
        """Headers of AWS that the caller sets are signed; other headers are sent, and may change on the way."""
        config = config_for(
            server, headers={"X-Amzn-Bedrock-Trace": "ENABLED", "x-amz-meta": "a  b", "x-gateway": "quay"}
        )
        call("sync", config, headers={"traceparent": "00-1-2-01"})
        check_signature(server.last)
        sent = server.last.headers
        assert (sent["x-amzn-bedrock-trace"], sent["x-gateway"], sent["traceparent"]) == (
            "ENABLED",
            "quay",
            "00-1-2-01",
        )
        assert "x-amz-meta" in parts_of(sent["authorization"])[2]

    @pytest.mark.parametrize("model", [MODEL, "a/b%2Fc:d", "ünï 日本+;&=#?~'!*()"])
    def test_through_an_httpx_transport(self, server: Server, model: str) -> None:
        """Calls through a transport of httpx, which writes paths in its own way, are signed too."""
        import httpx

        provider = BedrockProvider(config_for(server), transport=httpx.HTTPTransport())
        assert provider.complete(Request(model=model, messages="hi")).text == "Hello there"
        check_signature(server.last)
        provider.close()

    def test_through_a_proxy(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """A proxy gets the whole address, and the signature is that of the host behind it."""
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.setenv("NO_PROXY", "")
        call("sync", config_for(server, api_base="http://bedrock.test/gateway"))
        assert server.last.path.startswith("http://bedrock.test/gateway/model/")
        assert server.last.headers["host"] == "bedrock.test"
        check_signature(attrs.evolve(server.last, path=server.last.path.removeprefix("http://bedrock.test")))

    @pytest.mark.parametrize("path", ["/gate/way/", "/gate%20way/a:b/~x", "/gateway?b=2&a=1&a=0&c=%2F", "/gateway?"])
    def test_an_address_with_a_path(self, server: Server, mode: str, path: str) -> None:
        """The path and the query of the address are signed as they are sent."""
        call(mode, config_for(server, api_base=server.url + path))
        assert server.last.path.startswith(path.partition("?")[0].rstrip("/") + "/model/")
        assert server.last.path.partition("?")[2] == path.partition("?")[2]
        check_signature(server.last)

    def test_the_host(self, server: Server) -> None:
        """A host is signed as it is sent: in small letters, with its port; a `Host` of the caller's as it is given."""
        call("sync", config_for(server, api_base=server.url.replace("127.0.0.1", "LOCALHOST")))
        assert server.last.headers["host"] == server.url.replace("http://127.0.0.1", "localhost")
        check_signature(server.last)
        call("sync", config_for(server, headers={"Host": "Bedrock-Runtime.us-east-1.amazonaws.com"}))
        assert server.last.headers["host"] == "Bedrock-Runtime.us-east-1.amazonaws.com"
        check_signature(server.last)

    @pytest.mark.parametrize("model", ["a/b", "a:b", "a%2Fb", "a b", "ünï", "日本", "a//b", "a?b=c&d#e", "~!*()'"])
    def test_the_name_of_a_model(self, server: Server, mode: str, model: str) -> None:
        """A name is one segment of the path, whatever is in it, and is signed as AWS encodes it, twice."""
        call(mode, config_for(server, model=model))
        assert server.last.path == f"/model/{quote(model, safe='')}/converse{'-stream' * ('stream' in mode)}"
        check_signature(server.last)

    @pytest.mark.parametrize("given", ["configuration", "call"])
    def test_headers_that_sign(self, server: Server, given: str) -> None:
        """The time and the token are those of the signature, whatever the caller sets; a hash of the body counts."""
        headers = {"X-Amz-Date": "20200101T000000Z", "X-Amz-Security-Token": "own", "X-Amz-Content-SHA256": "hash"}
        headers["Content-Type"] = "application/json; charset=UTF-8"
        if given == "call":
            call("sync", config_for(server), headers=headers)
        else:
            call("sync", config_for(server, headers=headers))
        sent = server.last.headers
        assert sent["x-amz-date"] != "20200101T000000Z"
        assert (sent["x-amz-security-token"], sent["x-amz-content-sha256"]) == (TOKEN, "hash")
        assert sent["content-type"] == "application/json; charset=UTF-8"
        names = ["content-type", "host", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"]
        assert parts_of(sent["authorization"])[2] == names
        check_signature(server.last)

    @pytest.mark.parametrize("token", ["", None])
    def test_without_a_token(self, server: Server, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Credentials that last have no token."""
        monkeypatch.delenv("AWS_SESSION_TOKEN")
        if token is not None:
            monkeypatch.setenv("AWS_SESSION_TOKEN", token)
        call("sync", config_for(server))
        assert "x-amz-security-token" not in server.last.headers
        check_signature(server.last)

    def test_a_long_body(self, server: Server, mode: str) -> None:
        """A body of megabytes is signed to its end, with what `extra` changes in it."""
        call(mode, config_for(server), messages="é" * 1_000_000, extra={"guardrailConfig": {"trace": "enabled"}})
        assert json.loads(server.last.body)["guardrailConfig"] == {"trace": "enabled"}
        assert len(server.last.body) > 2_000_000
        check_signature(server.last)

    def test_an_authorization_of_the_call(self, server: Server, mode: str) -> None:
        """A call with an `Authorization` of its own is not signed."""
        call(mode, config_for(server), headers={"Authorization": f"Bearer {BEARER}"})
        assert server.last.headers["authorization"] == f"Bearer {BEARER}"
        assert "x-amz-date" not in server.last.headers

    def test_nothing_secret_shows(self, server: Server, mode: str, caplog: pytest.LogCaptureFixture) -> None:
        """A service that quotes the whole request gets none of its secrets into errors, logs, spans or reprs."""
        caplog.set_level(logging.DEBUG)
        echo = f"The signature does not match. Canonical request: {TOKEN}\n{ACCESS} {SECRET}"
        server.rule = refusing(403, "InvalidSignatureException", echo)
        recorder = Recorder()
        config = config_for(server)
        with pytest.raises(AuthenticationError) as caught:
            text_of(mode, config, recorder.tracing(capture="both"))
        error = caught.value
        provider = make_provider(config, asynchronous=False)
        found = AWSCredentials("us-east-1").obtain()
        shown = [
            repr(error),
            repr(vars(error)),
            caplog.text,
            repr(provider),
            repr(vars(provider)),
            repr(config),
            repr(found),
        ]
        shown += [span.to_json() for span in recorder.spans]
        signatures = [parts_of(seen.headers["authorization"])[1] for seen in server.seen]
        for secret in (ACCESS, SECRET, TOKEN, *signatures):
            assert not [text for text in shown if secret in text]
        assert "***" in str(error)


# Credentials


class TestCredentials:
    def test_of_a_profile(self, server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The credentials and the region of a profile are found in AWS's files."""
        write_profile(home, "work", region="eu-central-1")
        monkeypatch.setenv("AWS_PROFILE", "work")
        call("sync", config_for(server, region=None))
        check_signature(server.last)
        assert "/eu-central-1/" in server.last.headers["authorization"]

    def test_none(self, server: Server, mode: str) -> None:
        """Without credentials the call fails, and says all the ways to give them; nothing is sent."""
        with pytest.raises(
            AuthenticationError, match="found no AWS credentials: set AWS_BEARER_TOKEN_BEDROCK, or"
        ) as caught:
            call(mode, config_for(server))
        assert not caught.value.retryable
        assert not server.seen

    def test_half_of_them(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """An access key without its secret is reported as botocore reports it."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
        with pytest.raises(AuthenticationError, match=r"cannot be used: .*AWS_SECRET_ACCESS_KEY") as caught:
            call("sync", config_for(server))
        assert ACCESS not in str(caught.value)

    def test_an_unknown_profile_has_no_region(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the region would come from the profile, a profile that does not exist is a ConfigError."""
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(ConfigError, match=r"the AWS profile cannot be read: .*nobody"):
            call("sync", config_for(server, region=None))

    def test_an_unknown_profile(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """A profile that does not exist is named."""
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(AuthenticationError, match="nobody"):
            call("sync", config_for(server))

    def test_read_again_after_a_refusal(self, server: Server, home: Path, mode: str) -> None:
        """If a tool has renewed the credentials in the file, a refused call is sent again with them, once."""
        write_profile(home, "default", access="AKIAOLD0000000000000")

        def renewed(seen: Seen) -> bool:
            if ACCESS in seen.headers["authorization"]:
                return False
            write_profile(home, "default")
            return True

        server.rule = refusing(
            403, "ExpiredTokenException", "The security token included in the request is expired", renewed
        )
        assert call(mode, config_for(server)).text == "Hello there"
        assert len(server.seen) == 2
        check_signature(server.last)

    def test_the_same_are_not_sent_again(self, server: Server, home: Path, mode: str) -> None:
        """Credentials that have not changed are refused once."""
        write_profile(home, "default")
        server.rule = refusing(403, "ExpiredTokenException", "The security token included in the request is expired")
        with pytest.raises(AuthenticationError):
            call(mode, config_for(server))
        assert len(server.seen) == 1

    def test_the_advice(self, server: Server, home: Path, mode: str) -> None:
        """The advice of a refusal is about AWS credentials, and not about a key that the caller does not have."""
        write_profile(home, "default")
        for named, advice in (
            ("ExpiredTokenException", "Check the AWS credentials: they may have expired."),
            ("AccessDeniedException", "Check what the owner of the AWS credentials may use."),
        ):
            server.rule = refusing(403, named, "No.")
            with pytest.raises((AuthenticationError, PermissionDenied)) as caught:
                call(mode, config_for(server))
            assert str(caught.value).endswith(advice)

    def test_a_refused_model_is_no_bad_key(self, server: Server, home: Path, mode: str) -> None:
        """An account that may not use the model is told so, and the call is not sent again."""
        write_profile(home, "default")
        server.rule = refusing(
            403, "AccessDeniedException", "You don't have access to the model with the specified model ID."
        )
        with pytest.raises(PermissionDenied):
            call(mode, config_for(server))
        assert len(server.seen) == 1

    def test_renewed_before_they_expire(self, server: Server, home: Path, mode: str) -> None:
        """Credentials with a lifetime are fetched once, and again when they are about to expire."""
        process = Process(home, lifetime=timedelta(hours=1))
        provider = partial(make_provider, config_for(server))
        asked = Request(model=MODEL, messages="hi")
        made: dict[bool, Any] = {}

        def kept(*, asynchronous: bool) -> Any:
            return made.setdefault(asynchronous, _Open(provider(asynchronous=asynchronous)))

        for _ in range(2):
            ask(mode, partial(kept, asynchronous=False), partial(kept, asynchronous=True), asked)
        assert process.count == 1
        process.lifetime(timedelta(minutes=2))
        made.clear()
        for _ in range(2):  # botocore renews credentials within ten minutes of their end
            ask(mode, partial(kept, asynchronous=False), partial(kept, asynchronous=True), asked)
        assert process.count >= 3
        for seen in server.seen:
            check_signature(seen)

    def test_many_calls_fetch_them_once(self, server: Server, home: Path) -> None:
        """Threads and tasks that begin at once wait for the same credentials."""
        process = Process(home, lifetime=timedelta(hours=1))
        with LLM(config_for(server)) as llm:
            threads = [threading.Thread(target=llm.forward, args=("hi",)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (process.count, len(server.seen)) == (1, 8)

        async def main() -> None:
            async with AsyncLLM(config_for(server)) as llm, anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(llm.forward, "hi")

        anyio.run(main)
        assert (process.count, len(server.seen)) == (2, 16)

    def test_event_loops_share_them(self, server: Server, home: Path) -> None:
        """Calls in the event loops of several threads fetch credentials once."""
        set_container(server, home)
        server.held = 1
        provider = make_provider(config_for(server), asynchronous=True)

        async def main() -> None:
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(provider.complete, Request(model=MODEL, messages="hi"))

        threads = [threading.Thread(target=anyio.run, args=(main,), kwargs={"backend": each}) for each in BACKENDS * 2]
        for thread in threads:
            thread.start()
        assert server.waiting.wait(10)
        time.sleep(0.1)  # so that all loops ask
        server.released.set()
        for thread in threads:
            thread.join()
        assert (server.asked, len(server.seen)) == (1, 12)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_call_that_is_cancelled_meanwhile(self, server: Server, home: Path, backend: str) -> None:
        """A call does not wait for credentials after it was cancelled."""
        Process(home, lifetime=timedelta(hours=1), delay=1.5)

        async def main() -> bool:
            async with AsyncLLM(config_for(server)) as llm:
                with anyio.move_on_after(0.1) as scope:
                    await llm.forward("hi")
                return scope.cancelled_caught

        began = time.monotonic()
        assert anyio.run(main, backend=backend)
        assert time.monotonic() - began < 1.2 or backend == "asyncio"  # asyncio waits for its threads at the end
        assert not server.seen

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_cancelled_call_fetches_for_the_next(self, server: Server, home: Path, backend: str) -> None:
        """Calls after one that was cancelled wait for the credentials that it has asked for."""
        set_container(server, home)
        server.held = 1

        async def main() -> str:
            async with AsyncLLM(config_for(server)) as llm:
                for calling in (llm.forward, llm.forward, partial(text_of_stream, llm)):
                    with anyio.move_on_after(0.1) as scope:
                        await calling("hi")
                    assert scope.cancelled_caught
                server.released.set()
                return await llm.forward("hi")

        assert anyio.run(main, backend=backend) == "Hello there"
        assert (server.asked, len(server.seen)) == (1, 1)
        check_signature(server.last)

    def test_after_a_fetch_that_was_cancelled(
        self, server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Credentials that arrived for a call that had been cancelled do not make those before them fresh."""
        set_container(server, home)
        server.lifetime, server.held = timedelta(minutes=5), 3  # botocore fetches them twice at first
        fetched = threading.Event()
        obtain = AWSCredentials.obtain

        def watched(found: AWSCredentials) -> Any:
            try:
                return obtain(found)
            finally:
                fetched.set()

        monkeypatch.setattr(AWSCredentials, "obtain", watched)

        async def main() -> None:
            async with AsyncLLM(config_for(server)) as llm:
                await llm.forward("hi")
                fetched.clear()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(llm.forward, "hi")
                    assert await anyio.to_thread.run_sync(server.waiting.wait, 10)
                    tasks.cancel_scope.cancel()
                server.lifetime = timedelta(hours=1)
                server.released.set()
                assert await anyio.to_thread.run_sync(fetched.wait, 10)
                await llm.forward("hi")

        anyio.run(main)
        assert [parts_of(seen.headers["authorization"])[0][19] for seen in server.seen] == ["2", "3"]
        assert server.asked == 3

    def test_a_process_that_fails(self, server: Server, home: Path, mode: str) -> None:
        """The error of a program that should give credentials reaches the caller without what it printed to stdout."""
        Process(home, lifetime=timedelta(hours=1), fails=True)
        with pytest.raises(AuthenticationError, match="cannot be used") as caught:
            call(mode, config_for(server))
        assert SECRET not in str(caught.value)


# The services that give credentials


def set_container(server: Server, home: Path) -> None:
    os.environ["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = f"{server.url}/credentials"


def set_machine(server: Server, home: Path) -> None:
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": server.url}


def set_web_identity(server: Server, home: Path) -> None:
    (home / "identity").write_text("identity-0123456789")
    role = {"AWS_ROLE_ARN": ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": str(home / "identity")}
    os.environ |= {**role, "AWS_ENDPOINT_URL_STS": server.url}


def set_role(server: Server, home: Path) -> None:
    write_profile(home, "base")
    (home / ".aws" / "config").write_text(f"[default]\nrole_arn = {ROLE}\nsource_profile = base\n")
    os.environ["AWS_ENDPOINT_URL_STS"] = server.url


def set_single_sign_on(server: Server, home: Path, *, lifetime: timedelta = timedelta(hours=1)) -> None:
    login = {"start_url": "https://quay.test", "region": "us-east-1", "account_id": "123456789012", "role_name": "r"}
    folder = home / ".aws" / "sso" / "cache"
    folder.mkdir(parents=True)
    lines = "".join([f"sso_{name} = {value}\n" for name, value in login.items()])
    (home / ".aws" / "config").write_text(f"[default]\n{lines}")
    found = {"accessToken": "login-0123456789", "expiresAt": (datetime.now(UTC) + lifetime).isoformat()}
    name = hashlib.sha1(b"https://quay.test", usedforsecurity=False).hexdigest()
    (folder / f"{name}.json").write_text(json.dumps(found))
    os.environ["AWS_ENDPOINT_URL_SSO"] = server.url


SOURCES = {
    "container": set_container,
    "machine": set_machine,
    "web identity": set_web_identity,
    "role": set_role,
    "single sign-on": set_single_sign_on,
}
ROLE = "arn:aws:iam::123456789012:role/quay"


def error_of_sts(status: int, code: str) -> Answer:
    text = f"<ErrorResponse><Error><Code>{code}</Code><Message>no</Message></Error></ErrorResponse>"
    return status, {"content-type": "text/xml"}, text.encode()


REFUSALS: list[tuple[str, Answer, bool]] = [
    ("container", (500, {}, b"down"), True),
    ("container", (200, {}, b'{"AccessKeyId": "AKIA-cut-0123456789'), True),
    ("container", (200, {}, b'{"AccessKeyId": "AKIA-cut-0123456789"}'), False),
    ("container", (200, {}, b"[]"), False),
    ("machine", (500, {}, b"down"), False),
    ("web identity", error_of_sts(403, "AccessDenied"), False),
    ("web identity", error_of_sts(400, "Throttling"), True),
    ("web identity", error_of_sts(500, "InternalFailure"), True),
    ("web identity", (200, {}, b"<R><SecretAccessKey>AKIA-cut-0123456789"), False),
    ("role", error_of_sts(400, "IDPCommunicationError"), True),
    ("single sign-on", (401, {}, b'{"message": "the session is over"}'), False),
    ("single sign-on", (429, {}, b'{"message": "too many"}'), True),
    ("single sign-on", (200, {}, b'{"roleCredentials": {"accessKeyId": "AKIA-cut-0123456789"}}'), False),
]
"""Answers of the services in place of credentials, and whether the failure may pass."""


class TestSources:
    @pytest.fixture(autouse=True)
    def _without_waits(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let botocore ask each service without a wait between its attempts, and look for a login in this home."""
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(pytest.importorskip("botocore.utils").ContainerMetadataFetcher, "SLEEP_TIME", 0)
        login = pytest.importorskip("botocore.credentials").SSOProvider
        monkeypatch.setattr(
            login, "_SSO_TOKEN_CACHE_DIR", str(home / ".aws" / "sso" / "cache")
        )  # else of the first home

    @pytest.mark.parametrize("source", SOURCES)
    def test_each_of_them(self, server: Server, home: Path, mode: str, source: str) -> None:
        """Credentials of each kind sign the calls. Those of a role need no other region than the calls have."""
        SOURCES[source](server, home)
        assert call(mode, config_for(server)).text == "Hello there"
        check_signature(server.last)
        assert parts_of(server.last.headers["authorization"])[0].startswith("ASIAEXAMPLE000000001/")
        assert server.last.headers["x-amz-security-token"] == TOKEN

    @pytest.mark.parametrize("source", SOURCES)
    def test_many_calls_fetch_them_once(self, server: Server, home: Path, source: str) -> None:
        """Threads, and then tasks, wait for the same credentials, and the event loop goes on meanwhile."""
        SOURCES[source](server, home)
        server.held = 1
        with LLM(config_for(server)) as llm:
            threads = [threading.Thread(target=llm.forward, args=("hi",)) for _ in range(8)]
            for thread in threads:
                thread.start()
            assert server.waiting.wait(10)
            server.released.set()
            for thread in threads:
                thread.join()
        assert (server.asked, len(server.seen)) == (1, 8)
        server.held = 2
        server.waiting.clear()
        server.released.clear()

        async def main() -> None:
            async with AsyncLLM(config_for(server)) as llm, anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(llm.forward, "hi")
                assert await anyio.to_thread.run_sync(server.waiting.wait, 10)
                server.released.set()

        anyio.run(main)
        assert (server.asked, len(server.seen)) == (2, 16)
        for seen in server.seen:
            check_signature(seen)

    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("minutes", [5, 13, 60])
    def test_as_often_as_botocore(self, server: Server, home: Path, source: str, minutes: int) -> None:
        """Credentials are fetched as often as botocore fetches them for its own calls, whenever they expire."""
        session = pytest.importorskip("botocore.session").Session()
        session.set_config_variable("region", "us-east-1")
        SOURCES[source](server, home)
        server.lifetime = timedelta(minutes=minutes)
        found = session.get_credentials()
        for _ in range(10):
            found.get_frozen_credentials()
        theirs, server.asked = server.asked, 0
        with LLM(config_for(server)) as llm:
            for _ in range(10):
                llm.forward("hi")
        assert server.asked == theirs

    @pytest.mark.parametrize("mode", MODES)
    def test_calls_go_on_while_one_renews_them(self, server: Server, home: Path, mode: str) -> None:
        """Some minutes before credentials expire, one call fetches others, and other calls need not wait for it."""
        set_container(server, home)
        server.lifetime, server.held = timedelta(minutes=13), 3  # botocore fetches them twice at first
        provider = partial(make_provider, config_for(server))
        made = {each: _Open(provider(asynchronous=each)) for each in (False, True)}
        asked = Request(model=MODEL, messages="hi")

        def calls() -> None:
            ask(mode, lambda: made[False], lambda: made[True], asked)

        calls()
        thread = threading.Thread(target=calls)
        thread.start()
        assert server.waiting.wait(10)
        server.lifetime = timedelta(hours=1)
        for _ in range(3):
            calls()
        assert (server.asked, len(server.seen)) == (3, 4)
        server.released.set()
        thread.join()
        calls()
        assert [parts_of(seen.headers["authorization"])[0][19] for seen in server.seen] == list("222233")
        assert server.asked == 3

    def test_calls_wait_for_credentials_that_expire_at_once(self, server: Server, home: Path) -> None:
        """In the last minutes, all calls wait for other credentials."""
        set_container(server, home)
        server.lifetime, server.held = timedelta(minutes=5), 3
        with LLM(config_for(server)) as llm:
            llm.forward("hi")
            threads = [threading.Thread(target=llm.forward, args=("hi",)) for _ in range(3)]
            for thread in threads:
                thread.start()
            assert server.waiting.wait(10)
            threads[-1].join(0.2)
            assert len(server.seen) == 1
            server.lifetime = timedelta(hours=1)
            server.released.set()
            for thread in threads:
                thread.join()
        assert len(server.seen) == 4

    @pytest.mark.parametrize("mode", ["sync", "asyncio stream"])
    @pytest.mark.parametrize("refusal", REFUSALS)
    def test_refusals(
        self, server: Server, home: Path, mode: str, refusal: tuple[str, Answer, bool], caplog: Any
    ) -> None:
        """A service that refuses credentials is an authentication error, which shows nothing of a broken answer."""
        caplog.set_level(logging.DEBUG, "fluxibly")
        source, answer, passes = refusal
        SOURCES[source](server, home)
        server.refuse = lambda: answer
        with pytest.raises(AuthenticationError) as caught:
            text_of(mode, config_for(server))
        error = caught.value
        assert (error.provider, error.model, error.retryable) == ("bedrock", MODEL, passes)
        records = [record.getMessage() for record in caplog.records if record.name.startswith("fluxibly")]
        assert "0123456789" not in f"{error!r} {vars(error)} {records}"
        assert not server.seen

    @pytest.mark.parametrize("source", ["web identity", "role", "single sign-on"])
    @pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "https://{server}"])
    def test_services_that_cannot_be_reached(self, server: Server, home: Path, source: str, url: str) -> None:
        """A service that cannot be reached is a failure of the network, which may pass."""
        SOURCES[source](server, home)
        for name in ("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL_SSO"):
            os.environ[name] = url.format(server=server.url.removeprefix("http://"))
        with pytest.raises(ConnectionFailed, match="the AWS credentials cannot be fetched: ") as caught:
            call("sync", config_for(server))
        assert (caught.value.provider, caught.value.model, caught.value.retryable) == ("bedrock", MODEL, True)

    def test_a_connection_that_is_cut(self, server: Server, home: Path) -> None:
        """So is one that breaks off."""
        set_role(server, home)
        server.refuse = lambda: (200, {"content-length": "5000"}, b"<")
        with pytest.raises(ConnectionFailed, match="the AWS credentials cannot be fetched: ") as caught:
            call("sync", config_for(server))
        assert caught.value.retryable

    def test_a_machine_that_gives_no_others(self, server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine whose service fails when credentials have to be renewed may give them later."""
        found = pytest.importorskip("botocore.credentials").RefreshableCredentials
        set_machine(server, home)
        with LLM(config_for(server, max_retries=0)) as llm:
            llm.forward("hi")
            for name in ("_advisory_refresh_timeout", "_mandatory_refresh_timeout"):
                monkeypatch.setattr(found, name, 7_200)
            server.refuse = lambda: (500, {}, b"down")
            with pytest.raises(AuthenticationError, match=r"cannot be used: .*iam-role") as caught:
                llm.forward("hi")
            assert caught.value.retryable
            server.refuse = lambda: None
            server.lifetime = timedelta(hours=10)
            assert llm.forward("hi") == "Hello there"

    def test_a_login_that_has_ended(self, server: Server, home: Path, mode: str) -> None:
        """The error of a login that has ended says how to log in. After that, calls are good again."""
        set_single_sign_on(server, home, lifetime=timedelta(hours=-1))
        with pytest.raises(AuthenticationError, match="run aws sso login") as caught:
            call(mode, config_for(server))
        assert not caught.value.retryable
        assert (server.asked, len(server.seen)) == (0, 0)

    @pytest.mark.parametrize(
        "printed",
        [
            *("AKIA-cut-0123456789", "[]", "5", "null", "", r"\xff", '{"Version": 2}', '{"Version": 1}'),
            '{"Version": 1, "AccessKeyId": "AKIA-cut-0123456789", "SecretAccessKey": "cut-0123456789',
            '{"Version": 1, "AccessKeyId": null, "SecretAccessKey": "cut-0123456789"}',
            '{"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": null}',
            '{"Version": 1, "AccessKeyId": 5, "SecretAccessKey": ["cut-0123456789"]}',
            '{"Version": 1, "AccessKeyId": "AKIA\\nx: y", "SecretAccessKey": "cut-0123456789"}',
            '{"Version": 1, "AccessKeyId": "AKIA\u2603", "SecretAccessKey": "cut-0123456789"}',
            '{"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "cut-0123456789", "SessionToken": 5}',
            '{"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "cut-0123456789", "Expiration": "soon"}',
            '{"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "cut-0123456789", "Expiration": "2020-01-01"}',
            '{"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "cut-01234567890", "Expiration": "2020-01-01T00Z"}',
        ],
    )
    @pytest.mark.parametrize("mode", ["sync", "asyncio stream"])
    def test_what_a_program_prints(self, server: Server, home: Path, mode: str, printed: str) -> None:
        """A program that prints something else than credentials is an error that does not show what it printed."""
        (home / "printed").write_bytes(printed.encode().decode("unicode_escape").encode("latin-1", "ignore"))
        (home / "printed").write_bytes(b"\xff" if printed == r"\xff" else printed.encode())
        (home / ".aws").mkdir()
        (home / ".aws" / "config").write_text(f"[default]\ncredential_process = cat {home / 'printed'}\n")
        with pytest.raises(AuthenticationError) as caught:
            call(mode, config_for(server))
        assert not caught.value.retryable
        assert "0123456789" not in f"{caught.value!r} {vars(caught.value)}"
        assert not server.seen

    @pytest.mark.parametrize("program", ["/nowhere/to/be/found", '"unbalanced', "sh -c 'echo long >&2; exit 1'"])
    def test_programs_that_do_not_run(self, server: Server, home: Path, program: str) -> None:
        """A program that is missing, or ends with an error, is an error of fluxibly."""
        (home / ".aws").mkdir()
        (home / ".aws" / "config").write_text(f"[default]\ncredential_process = {program}\n")
        with pytest.raises(AuthenticationError, match="the AWS credentials cannot be used: "):
            call("sync", config_for(server))

    def test_a_program_that_talks(self, server: Server, home: Path) -> None:
        """Of what a program says about its failure, the beginning is quoted."""
        (home / ".aws").mkdir()
        program = "sh -c 'yes the vault is closed | head -5000 >&2; exit 1'"
        (home / ".aws" / "config").write_text(f"[default]\ncredential_process = {program}\n")
        with pytest.raises(AuthenticationError, match="the vault is closed") as caught:
            call("sync", config_for(server))
        assert len(str(caught.value)) < 700

    def test_variables_that_have_expired(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Exported credentials whose time is over are an error, until others are exported."""
        for name, value in {"ACCESS_KEY_ID": ACCESS, "SECRET_ACCESS_KEY": SECRET, "SESSION_TOKEN": TOKEN}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2020-01-01T00:00:00Z")
        with LLM(config_for(server)) as llm:
            with pytest.raises(AuthenticationError, match=r"cannot be used: .*expired"):
                llm.forward("hi")
            monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2099-01-01T00:00:00Z")
            assert llm.forward("hi") == "Hello there"

    def test_a_refused_call_finds_a_broken_file(self, server: Server, home: Path, mode: str) -> None:
        """If the credentials cannot be read again after a refusal, the error says so, and names the model."""
        write_profile(home, "default")

        def refused(seen: Seen) -> Answer:
            (home / ".aws" / "credentials").write_text("[default\n")
            return 403, {"x-amzn-errortype": "ExpiredTokenException"}, b'{"message": "expired"}'

        server.rule = refused
        with pytest.raises(AuthenticationError, match=rf"bedrock \({MODEL}\): the AWS credentials cannot") as caught:
            call(mode, config_for(server))
        assert caught.value.model == MODEL
        assert len(server.seen) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.parametrize("held", [1, 3])
    def test_a_fork_while_they_are_fetched(self, server: Server, home: Path, held: int) -> None:
        """A forked process does not wait for what a thread of its parent fetches. (botocore fetches twice at first.)"""
        set_container(server, home)
        server.lifetime, server.held = timedelta(minutes=5), held
        code = f"""
            import os, signal, sys, threading
            from fluxibly import LLM, LLMConfig
            llm = LLM(LLMConfig(framework="bedrock", model="m", api_base={server.url!r}, region="us-east-1"))
            if {held} > 1:
                llm.forward("hi")
            thread = threading.Thread(target=llm.forward, args=("hi",))
            thread.start()
            print("started", flush=True)
            sys.stdin.readline()
            if child := os.fork():
                _, status = os.waitpid(child, 0)
                print(status, flush=True)
                sys.stdin.readline()
                thread.join()
            else:
                signal.alarm(15)
                print(llm.forward("hi"), flush=True)
                os._exit(0)
        """
        program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)]
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            assert server.waiting.wait(10)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "Hello there\n"
            assert process.stdout.readline() == "0\n"
            server.released.set()
            process.communicate("\n")
        assert len(server.seen) == (2 if held == 1 else 3)


async def text_of_stream(llm: AsyncLLM, prompt: str) -> str:
    return "".join([text async for text in llm.forward_stream(prompt)])


class _Open:
    """A provider that its pipeline does not close."""

    def __init__(self, provider: Any) -> None:
        self.info = provider.info
        self.complete, self.stream = provider.complete, provider.stream


def write_profile(home: Path, name: str, *, access: str = ACCESS, region: str | None = None) -> None:
    folder = home / ".aws"
    folder.mkdir(exist_ok=True)
    (folder / "credentials").write_text(f"[{name}]\naws_access_key_id = {access}\naws_secret_access_key = {SECRET}\n")
    prefix = "" if name == "default" else "profile "
    (folder / "config").write_text(f"[{prefix}{name}]\n" + (f"region = {region}\n" if region else ""))


class Process:
    """A profile whose credentials come from a program, which counts how often it runs."""

    def __init__(self, home: Path, *, lifetime: timedelta, delay: float = 0, fails: bool = False) -> None:
        self._file, self._lifetime = home / "count", home / "lifetime"
        self.lifetime(lifetime)
        program = home / "give.py"
        program.write_text(
            "import json, sys, time, datetime, pathlib\n"
            f"pathlib.Path({str(self._file)!r}).open('a').write('x')\n"
            f"time.sleep({delay})\n"
            f"seconds = float(pathlib.Path({str(self._lifetime)!r}).read_text())\n"
            "end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)\n"
            f"found = {{'Version': 1, 'AccessKeyId': {ACCESS!r}, 'SecretAccessKey': {SECRET!r}}}\n"
            "print(json.dumps({**found, 'Expiration': end.isoformat()}))\n"
            f"sys.exit({int(fails)})\n"
        )
        (home / ".aws").mkdir()
        (home / ".aws" / "config").write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")

    def lifetime(self, lifetime: timedelta) -> None:
        self._lifetime.write_text(str(lifetime.total_seconds()))

    @property
    def count(self) -> int:
        return len(self._file.read_text()) if self._file.exists() else 0


# Keys, regions and addresses


class TestBearerKeys:
    @pytest.mark.parametrize("given", ["variable", "setting", "function", "header"])
    @pytest.mark.usefixtures("signed")
    def test_it_comes_before_credentials(
        self, server: Server, mode: str, given: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bearer key is sent as it is, and nothing is signed, although there are AWS credentials."""
        settings: dict[str, Any] = {
            "setting": {"api_key": BEARER},
            "function": {"api_key": lambda: BEARER},
            "header": {"headers": {"Authorization": f"Bearer {BEARER}"}},
        }.get(given, {})
        if given == "variable":
            monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", BEARER)
        assert call(mode, config_for(server, region=None, **settings)).text == "Hello there"
        assert server.last.headers["authorization"] == f"Bearer {BEARER}"
        assert not [name for name in server.last.headers if name.startswith("x-amz")]

    @pytest.mark.usefixtures("signed")
    def test_an_empty_key_is_none(self, server: Server, mode: str) -> None:
        """With an empty key, as an unset variable gives it, the credentials count."""
        call(mode, config_for(server, api_key=""))
        check_signature(server.last)

    def test_an_expired_key(self, server: Server, mode: str) -> None:
        """A refused key is an AuthenticationError, and a function is asked for another one."""
        message = "Authentication failed: Please make sure your API Key is valid."
        server.rule = refusing(
            403, "AccessDeniedException", message, lambda seen: "-new" not in seen.headers["authorization"]
        )
        with pytest.raises(AuthenticationError):
            call(mode, config_for(server, api_key=BEARER))
        given = iter([BEARER, f"{BEARER}-new"])
        assert call(mode, config_for(server, api_key=lambda: next(given))).text == "Hello there"

    @pytest.mark.parametrize("streamed", [False, True])
    def test_without_botocore(self, server: Server, streamed: bool) -> None:
        """The bearer key works where botocore is not installed; credentials say what to install."""
        settings = {"framework": "bedrock", "model": MODEL, "api_base": server.url}
        code = f"""
            import sys
            class Missing:
                def find_spec(self, name, *_):
                    if name.partition('.')[0] in ('botocore', 'boto3', 'google'):
                        raise ModuleNotFoundError(name=name)
            import importlib.util
            real = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *a: None if name.startswith('botocore') else real(name, *a)
            sys.meta_path.insert(0, Missing())
            from fluxibly import LLM, LLMConfig
            llm = LLM(LLMConfig(**{settings!r}, api_key={BEARER!r}), middleware=[])
            print(''.join(llm.forward_stream('hi')) if {streamed} else llm.forward('hi'))
            try:
                LLM(LLMConfig(**{settings!r}, region='us-east-1'))
            except ValueError as error:
                print(error)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        answer, error = done.stdout.splitlines()
        assert answer == "Hello there"
        assert error == (
            "bedrock needs botocore for AWS credentials: pip install botocore (or set AWS_BEARER_TOKEN_BEDROCK, or "
            "api_key in the config)"
        )

    def test_nothing_is_imported_that_is_not_used(self, server: Server) -> None:
        """Importing fluxibly, and calling Bedrock with a bearer key, imports neither botocore nor google-auth."""
        settings = {
            "framework": "bedrock",
            "model": MODEL,
            "api_base": server.url,
            "api_key": BEARER,
            "region": "us-east-1",
        }
        code = (
            "import sys, fluxibly; from fluxibly import LLM, LLMConfig\n"
            f"print(LLM(LLMConfig(**{settings!r})).forward('hi'))\n"
            "print([name for name in sys.modules if name.partition('.')[0] in ('botocore', 'boto3', 'google')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["Hello there", "[]"]


def host_of(**settings: Any) -> str | None:
    config = LLMConfig(**{"framework": "bedrock", "model": MODEL, "api_key": BEARER, **settings})
    found: str | None = BedrockProvider(config).info.server_address
    return found


class TestPlaces:
    @pytest.mark.parametrize(
        ("settings", "variables", "region"),
        [
            ({"region": "eu-west-1"}, {"AWS_REGION": "us-west-2"}, "eu-west-1"),
            ({"model": ARN}, {"AWS_REGION": "us-west-2"}, "eu-west-3"),
            ({"model": ARN, "region": "eu-west-3"}, {}, "eu-west-3"),
            ({}, {"AWS_REGION": "us-west-2", "AWS_DEFAULT_REGION": "us-east-2"}, "us-west-2"),
            ({}, {"AWS_REGION": "", "AWS_DEFAULT_REGION": "us-east-2"}, "us-east-2"),
            ({}, {"AWS_REGION": " ", "AWS_DEFAULT_REGION": " us-east-2\n"}, "us-east-2"),
        ],
    )
    def test_the_region(
        self, settings: dict[str, Any], variables: Mapping[str, str], region: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The region comes from the ARN, the setting, a variable."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert host_of(**settings) == f"bedrock-runtime.{region}.amazonaws.com"

    def test_the_region_of_the_profile(self, home: Path) -> None:
        """The region of the AWS profile comes last."""
        write_profile(home, "default", region="ap-south-1")
        assert host_of() == "bedrock-runtime.ap-south-1.amazonaws.com"

    def test_the_address_of_each_region(self) -> None:
        """The address in each region of each partition of AWS is that of botocore's own rules."""
        boto3 = pytest.importorskip("boto3")
        session = boto3.Session(aws_access_key_id="x", aws_secret_access_key="x")  # noqa: S106
        regions = [
            region
            for partition in session.get_available_partitions()
            for region in session.get_available_regions("sts", partition)
            if "-global" not in region and "fips" not in region
        ]
        assert {"us-east-1", "us-gov-west-1", "cn-north-1", "us-isob-east-1", "eusc-de-east-1"} < set(regions)
        for region in regions:
            client = session.client("bedrock-runtime", region_name=region)
            assert f"https://{host_of(region=region)}" == client.meta.endpoint_url

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "bedrock needs a region: set region in the config, AWS_REGION, or a region in the AWS profile"),
            ({"region": "mars"}, "region: expected the name of an AWS region, such as 'us-east-1', got 'mars'"),
            ({"region": "us-east-1.evil.test/"}, "region: expected the name of an AWS region"),
            ({"region": ""}, "region: expected a non-empty str"),
            ({"region": 1}, "region: expected a non-empty str, got"),
            (
                {"model": ARN, "region": "us-east-1"},
                "region: expected 'eu-west-3', as in the model's ARN, got 'us-east-1'",
            ),
        ],
    )
    def test_what_is_wrong(self, settings: dict[str, Any], message: str) -> None:
        """A region that is missing, malformed, or another than the ARN's is a ConfigError."""
        with pytest.raises(ConfigError) as caught:
            host_of(**settings)
        assert message in str(caught.value)

    @pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_BEDROCK_RUNTIME", "AWS_ENDPOINT_URL"])
    def test_addresses_in_the_environment(self, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The address comes from the variables of AWS's own clients, the more specific one first."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://all.test")
        monkeypatch.setenv(variable, "https://vpce.test")
        assert host_of() == "vpce.test"
        assert host_of(api_base="https://mine.test") == "mine.test"

    @pytest.mark.usefixtures("signed")
    def test_the_region_of_an_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An address of AWS names the region of the signature; another address leaves it to the settings."""
        config = LLMConfig(framework="bedrock", model=MODEL, api_base="https://bedrock-runtime.us-west-2.amazonaws.com")
        assert BedrockProvider(config).info.server_address == "bedrock-runtime.us-west-2.amazonaws.com"
        with pytest.raises(ConfigError, match="needs a region"):
            BedrockProvider(LLMConfig(framework="bedrock", model=MODEL, api_base="https://gateway.test"))

    @pytest.mark.parametrize("path", ["/model/m/converse", "/model/m", "/converse", "/converse-stream/"])
    def test_an_address_with_its_endpoint(self, path: str) -> None:
        """The endpoint is not part of the address, because it is appended to it."""
        with pytest.raises(ConfigError, match=r"api_base: expected the address without /(model|converse)"):
            host_of(api_base=f"https://bedrock-runtime.us-east-1.amazonaws.com{path}")

    @pytest.mark.usefixtures("signed")
    @pytest.mark.parametrize(
        ("host", "region"),
        [
            ("bedrock-runtime.us-west-2.amazonaws.com", "us-west-2"),
            ("bedrock-runtime-fips.us-west-2.amazonaws.com", "us-west-2"),
            ("vpce-0a1b-c2d3.bedrock-runtime.us-west-2.vpce.amazonaws.com", "us-west-2"),
            ("bedrock-runtime.us-west-2.api.aws", "us-west-2"),
            ("bedrock-runtime.quay.test", "eu-north-1"),
            ("quay.test", "eu-north-1"),
        ],
    )
    @pytest.mark.parametrize("settings", [{}, {"region": "sa-east-1"}])
    def test_the_region_of_the_signature(
        self, server: Server, host: str, region: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An address of AWS is in its region whatever the variables say. A setting says more than an address."""
        monkeypatch.setenv("AWS_REGION", "eu-north-1")
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.setenv("NO_PROXY", "")
        call("sync", LLMConfig(framework="bedrock", model=MODEL, api_base=f"http://{host}", **settings))
        scope, _, _ = parts_of(server.last.headers["authorization"])
        assert scope.split("/")[2] == settings.get("region", region)

    def test_a_model_of_another_region(self) -> None:
        """An ARN in another region than the calls' is refused before anything is sent; an address of one's own may take it."""
        provider = BedrockProvider(LLMConfig(framework="bedrock", model=MODEL, api_key=BEARER, region="us-east-1"))
        with pytest.raises(
            BadRequest, match="expected a model in 'us-east-1', where the calls go, got an ARN in 'eu-west-3'"
        ):
            provider.complete(Request(model=ARN, messages="hi"))
        gateway = LLMConfig(
            framework="bedrock", model=MODEL, api_key=BEARER, region="us-east-1", api_base="http://[::1]:1"
        )
        with pytest.raises(ConnectionFailed):
            BedrockProvider(gateway).complete(Request(model=ARN, messages="hi"))

    def test_in_yaml(self, server: Server, tmp_path: Path) -> None:
        """A YAML file sets the region; another framework does not take it."""
        file = tmp_path / "config.yaml"
        file.write_text(f"llm:\n  framework: bedrock\n  model: {MODEL}\n  region: sa-east-1\n  api_key: k\n")
        with LLM.from_yaml(file) as llm:
            assert llm.pipeline.provider.info.server_address == "bedrock-runtime.sa-east-1.amazonaws.com"  # type: ignore[union-attr]
        file.write_text("llm:\n  framework: openai\n  model: m\n  region: sa-east-1\n  project: p\n  api_key: k\n")
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file)
        assert [problem.partition(":")[0] for problem in caught.value.problems] == ["llm.region", "llm.project"]
        assert "only 'bedrock' and 'vertex' take this setting, and 'openai' does not" in str(caught.value)


# Streams over HTTP


@pytest.fixture
def keyed(server: Server) -> LLMConfig:
    return config_for(server, api_key=BEARER)


class TestStreams:
    @pytest.mark.parametrize("mode", STREAM_MODES)
    def test_an_exception_in_mid_stream(self, server: Server, keyed: LLMConfig, mode: str) -> None:
        """An exception after output ends the stream, with what came before and the error as cause."""
        body = stream(*EVENTS[:2]) + exception("throttlingException", {"message": "Too many requests"})
        server.rule = lambda _: (200, {"content-type": "application/vnd.amazon.eventstream"}, body)
        with pytest.raises(StreamInterrupted) as caught:
            call(mode, keyed)
        assert caught.value.partial.text == "Hello"
        assert isinstance(caught.value.__cause__, RateLimitError)

    @pytest.mark.parametrize("mode", STREAM_MODES)
    def test_an_exception_at_once(self, server: Server, keyed: LLMConfig, mode: str) -> None:
        """An exception as the first event is the call's error."""
        body = exception("throttlingException", {"message": "Too many requests"})
        server.rule = lambda _: (200, {"content-type": "application/vnd.amazon.eventstream"}, body)
        with pytest.raises(RateLimitError):
            call(mode, keyed)

    @pytest.mark.parametrize("mode", STREAM_MODES)
    def test_json_instead(self, server: Server, keyed: LLMConfig, mode: str) -> None:
        """A gateway that answers a stream with the whole answer is understood."""
        server.rule = lambda _: (200, {"content-type": "application/json"}, json.dumps(WHOLE).encode())
        assert call(mode, keyed).text == "Hello there"

    @pytest.mark.parametrize("mode", STREAM_MODES)
    @pytest.mark.parametrize("cut", [0, 5, 12, 200, -1])
    def test_a_cut(self, server: Server, keyed: LLMConfig, mode: str, cut: int) -> None:
        """A stream that ends before its end is never a whole answer."""
        body = stream(*EVENTS[:5])[:cut]
        server.rule = lambda _: (200, {"content-type": "application/vnd.amazon.eventstream"}, body)
        with pytest.raises((StreamProtocolError, StreamInterrupted)) as caught:
            call(mode, keyed)
        assert isinstance(caught.value.__cause__ or caught.value, StreamProtocolError)

    def test_the_request_id(self, server: Server, keyed: LLMConfig, mode: str) -> None:
        """AWS's id of the request is the answer's, and its telemetry name is well known."""
        server.rule = lambda seen: (200, {**usual(seen)[1], "x-amzn-requestid": "r-77"}, usual(seen)[2])
        assert call(mode, keyed).request_id == "r-77"
        assert make_provider(keyed, asynchronous=False).info.telemetry_name == "aws.bedrock"


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the clock of another time zone."""
    if not hasattr(time, "tzset"):
        pytest.skip("needs time.tzset")
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("signed", "tokyo")
def test_the_time_of_a_signature(server: Server) -> None:
    """A signature has the present time, in UTC."""
    call("sync", config_for(server))
    sent = datetime.strptime(server.last.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - sent).total_seconds()) < 60
