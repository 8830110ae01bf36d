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
from urllib.parse import quote, urlsplit

import anyio
import attrs
import pytest
from support.aws import exception, stream
from support.libraries import MODES, STREAM_MODES, ask
from support.tracing_tools import Recorder

from fluxibly import LLM, AsyncLLM, LLMConfig, StreamInterrupted
from fluxibly.errors import (
    AuthenticationError,
    ConfigError,
    PermissionDenied,
    RateLimitError,
    StreamProtocolError,
)
from fluxibly.middleware import Retry
from fluxibly.providers.bedrock import AWSCredentials, BedrockProvider
from fluxibly.registry import make_provider
from fluxibly.types import Request

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


Rule = Callable[[Seen], "tuple[int, dict[str, str], bytes] | None"]


@attrs.define
class Server:
    """A loopback server in Bedrock's dialect. `rule` returns another answer than the usual one, or None."""

    url: str = ""
    seen: list[Seen] = attrs.Factory(list)
    rule: Rule = lambda _: None

    @property
    def last(self) -> Seen:
        return self.seen[-1]


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen = Seen(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            found.seen.append(seen)
            status, headers, answer = found.rule(seen) or usual(seen)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Do not log requests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        found.url = f"http://127.0.0.1:{http.server_port}"
        yield found
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
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take every AWS setting out of the environment, and make an empty home directory."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


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
        *("POST", quote(url.path, safe="/~"), url.query, headers, ";".join(sorted(names))),
        hashlib.sha256(seen.body).hexdigest(),
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

    def test_through_an_httpx_transport(self, server: Server) -> None:
        """Calls through a transport of httpx are signed too."""
        import httpx

        provider = BedrockProvider(config_for(server), transport=httpx.HTTPTransport())
        assert provider.complete(Request(model=MODEL, messages="hi")).text == "Hello there"
        check_signature(server.last)
        provider.close()

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

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
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

    def test_a_process_that_fails(self, server: Server, home: Path, mode: str) -> None:
        """The error of a program that should give credentials reaches the caller without what it printed to stdout."""
        Process(home, lifetime=timedelta(hours=1), fails=True)
        with pytest.raises(AuthenticationError, match="cannot be used") as caught:
            call(mode, config_for(server))
        assert SECRET not in str(caught.value)


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
            "header": {"headers": {"authorization": f"Bearer {BEARER}"}},
        }.get(given, {})
        if given == "variable":
            monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", BEARER)
        assert call(mode, config_for(server, region=None, **settings)).text == "Hello there"
        assert server.last.headers["authorization"] == f"Bearer {BEARER}"
        assert not [name for name in server.last.headers if name.startswith("x-amz")]

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
            "bedrock needs a key: set AWS_BEARER_TOKEN_BEDROCK, or api_key in the config; AWS credentials need botocore: "
            "pip install botocore"
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

    @pytest.mark.parametrize(
        "region",
        [
            "us-east-1",
            "eu-central-2",
            "us-gov-west-1",
            "cn-north-1",
            "eusc-de-east-1",
            "us-iso-east-1",
            "ap-southeast-7",
        ],
    )
    def test_the_address_of_each_partition(self, region: str) -> None:
        """The address in each partition of AWS is that of botocore's own rules."""
        boto3 = pytest.importorskip("boto3")
        client = boto3.client("bedrock-runtime", region_name=region, aws_access_key_id="x", aws_secret_access_key="x")  # noqa: S106
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


def test_the_time_of_a_signature(server: Server, signed: None) -> None:
    """A signature has the present time, in UTC."""
    call("sync", config_for(server))
    sent = datetime.strptime(server.last.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - sent).total_seconds()) < 60
