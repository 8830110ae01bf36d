"""Keys that a function or credentials give: how calls share them, and what becomes of their failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest
from support.canned_server import Canned, Seen, canned_server
from support.libraries import MODES, ask

from fluxibly import LLMConfig, Request
from fluxibly.errors import AuthenticationError, BadRequest, ConnectionFailed, ProviderError
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.dialects.openai_chat import OpenAICodec
from fluxibly.providers.http import AsyncHTTPProvider, Authorizer, HTTPProvider, Key

TOKEN = "token-0123456789"  # noqa: S105  # it opens nothing
SERVICE = Service(framework="quay", telemetry_name="quay", base_url=None, key_required=False)
BACKENDS = ["sync", "asyncio", "trio"]


@pytest.fixture
def server() -> Iterator[Canned]:
    with canned_server() as server:
        yield server


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@attrs.frozen
class Token(Authorizer):
    """A token that signs each request by its length."""

    token: str

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.token, *[f"{number} of {self.token}" for number in range(15)])

    def authorize(self, url: str, headers: Mapping[str, str], body: bytes) -> Mapping[str, str]:
        return {"authorization": f"Signed {self.token}", "x-signed": f"{url} {headers['host']} {len(body)}"}


@attrs.define
class Vault:
    """Credentials that `give` tokens, numbered from 1. A call with a `gate` waits until it is open."""

    give: Callable[[int], Key] = lambda number: Token(f"{TOKEN}-{number}")
    fresh: bool = True
    asked: int = 0
    waiting: threading.Event = attrs.Factory(threading.Event)
    gate: threading.Event | None = None

    def obtain(self) -> Key:
        self.asked += 1
        number = self.asked
        self.waiting.set()
        if self.gate is not None:
            self.gate.wait(10)
        return self.give(number)

    def is_fresh(self, key: Key, /) -> bool:
        return self.fresh


def config_for(server: Canned, **settings: Any) -> LLMConfig:
    return LLMConfig(**{"framework": "quay", "model": "m", "api_base": server.url, "max_retries": 0, **settings})


def providers(server: Canned, vault: Vault | None = None, **settings: Any) -> Any:
    """Return the functions that make the providers of both kinds."""
    config = config_for(server, **settings)
    return [
        partial(kind, OpenAICodec(), SERVICE, config, credentials=vault) for kind in (HTTPProvider, AsyncHTTPProvider)
    ]


def at_once(backend: str, server: Canned, requests: list[Request], vault: Vault | None, **settings: Any) -> list[Any]:
    """Return the answers to requests that are sent at once, in their order, or the errors."""
    found: list[Any] = [None] * len(requests)
    sync, asynchronous = providers(server, vault, **settings)
    if backend == "sync":
        with sync() as provider:

            def one(number: int) -> None:
                try:
                    found[number] = provider.complete(requests[number])
                except Exception as error:  # noqa: BLE001  # the test looks at it
                    found[number] = error

            threads = [threading.Thread(target=one, args=(number,)) for number in range(len(requests))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return found

    async def main() -> None:
        async with asynchronous() as provider, anyio.create_task_group() as tasks:

            async def one(number: int) -> None:
                try:
                    found[number] = await provider.complete(requests[number])
                except Exception as error:  # noqa: BLE001  # the test looks at it
                    found[number] = error

            for number in range(len(requests)):
                tasks.start_soon(one, number)

    anyio.run(main, backend=backend)
    return found


def slow(error: Callable[[], Exception]) -> tuple[Callable[[], str], list[int]]:
    """Return a function that fails after a time in which other calls ask too, and the list of its calls."""
    calls: list[int] = []

    def give() -> str:
        calls.append(len(calls))
        threading.Event().wait(0.2)
        raise error()

    return give, calls


class Odd(ProviderError):
    """An error of a user's own, which cannot be copied."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class TestFailures:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("kind", [AuthenticationError, ConnectionFailed])
    def test_each_call_has_its_own(self, server: Canned, backend: str, kind: type[ProviderError]) -> None:
        """Calls that wait for credentials fail together, each with an error that names its own model."""

        def refuse(number: int) -> Key:
            raise kind("the vault is closed")

        vault = Vault(refuse)
        vault.gate = threading.Event()
        threading.Timer(0.2, vault.gate.set).start()
        requests = [Request(model=f"m-{number}", messages="hi") for number in range(4)]
        errors = at_once(backend, server, requests, vault)
        assert vault.asked == 1
        assert [type(error) for error in errors] == [kind] * 4
        assert [(error.model, str(error)) for error in errors] == [
            (f"m-{number}", f"quay (m-{number}): the vault is closed") for number in range(4)
        ]
        assert len({id(error) for error in errors}) == 4

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("error", [lambda: LookupError("closed"), lambda: Odd("the vault", "is closed")])
    def test_a_functions_own(self, server: Canned, backend: str, error: Callable[[], Exception]) -> None:
        """Calls that wait for a function get the exception that it raised, whatever it is."""
        give, calls = slow(error)
        requests = [Request(model="m", messages="hi")] * 4
        errors = at_once(backend, server, requests, None, api_key=give)
        assert len(calls) == 1
        assert [type(error) for error in errors] == [type(error())] * 4
        assert not server.seen

    def test_the_next_call_asks_again(self, server: Canned) -> None:
        """A failure is not kept for calls that begin after it."""
        answers: Iterator[Any] = iter([LookupError("closed"), LookupError("still closed"), TOKEN])

        def give() -> str:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        sync, _ = providers(server, api_key=give)
        with sync() as provider:
            for message in ("^closed", "^still closed"):
                with pytest.raises(LookupError, match=message):
                    provider.complete(Request(model="m", messages="hi"))
            assert provider.complete(Request(model="m", messages="hi")).text == "You said: hi"

    @pytest.mark.parametrize("kind", [ConnectionError, TimeoutError, LookupError])
    def test_after_a_401(self, server: Canned, mode: str, kind: type[Exception]) -> None:
        """An exception of a function that is asked again reaches the caller unchanged, even if it looks like the network's."""
        error = kind("closed")
        answers: Iterator[Any] = iter([TOKEN, error])

        def give() -> str:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        server.refuse = lambda _: (401, {"error": {"message": "expired"}})
        with pytest.raises(kind) as caught:
            ask(mode, *providers(server, api_key=give), Request(model="m", messages="hi"))
        assert caught.value is error
        assert len(server.seen) == 1

    def test_what_is_no_key_after_a_401(self, server: Canned, mode: str) -> None:
        """A function that gives no key after a refusal is an error that names the service and the model."""
        answers: Iterator[Any] = iter([TOKEN, None])
        server.refuse = lambda _: (401, {"error": {"message": "expired"}})
        with pytest.raises(
            AuthenticationError, match=r"^quay \(quay-1\): api_key: expected the function to return"
        ) as caught:
            ask(mode, *providers(server, api_key=lambda: next(answers)), Request(model="quay-1", messages="hi"))
        assert (caught.value.provider, caught.value.model) == ("quay", "quay-1")

    def test_an_interrupt_of_a_coroutine(self, server: Canned) -> None:
        """An interrupt in the event loop in which a coroutine function gives the key reaches the caller."""

        async def give() -> str:
            raise KeyboardInterrupt

        sync, _ = providers(server, api_key=give)
        with sync() as provider, pytest.raises(KeyboardInterrupt):
            provider.complete(Request(model="m", messages="hi"))


class TestSharing:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_key_that_is_not_fresh(self, server: Canned, backend: str) -> None:
        """Calls at once fetch one key in place of a key that is not fresh, and then use it."""
        vault = Vault(fresh=False)
        vault.gate = threading.Event()
        threading.Timer(0.2, vault.gate.set).start()
        requests = [Request(model="m", messages="hi")] * 5
        assert [answer.text for answer in at_once(backend, server, requests, vault)] == ["You said: hi"] * 5
        assert vault.asked == 1

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_same_key_again(self, server: Canned, backend: str) -> None:
        """Calls whose key was refused at once ask once for another; if there is none, all of them fail."""
        vault = Vault(lambda _: Token(TOKEN))
        server.refuse = lambda _: (401, {"error": {"message": f"bad {TOKEN}"}})
        requests = [Request(model="m", messages="hi")] * 5
        errors = at_once(backend, server, requests, vault)
        assert [type(error) for error in errors] == [AuthenticationError] * 5
        assert TOKEN not in "".join([f"{error!r} {vars(error)}" for error in errors])
        assert len(server.seen) == 5

    def test_a_failure_before_a_key(self, server: Canned) -> None:
        """A failure from before a key was found is not that of calls whose key is refused later, at once."""
        answers: Iterator[Any] = iter([LookupError("closed"), TOKEN])
        again = threading.Event()

        def give() -> str:
            answer = next(answers, None)
            if isinstance(answer, Exception):
                raise answer
            if answer is None:
                again.wait(0.3)  # so that the other call waits too
            return TOKEN

        sync, _ = providers(server, api_key=give)
        errors: list[BaseException] = []

        def refused() -> None:
            with pytest.raises(AuthenticationError) as caught:
                provider.complete(Request(model="refused", messages="hi"))
            errors.append(caught.value)

        with sync() as provider:
            with pytest.raises(LookupError):
                provider.complete(Request(model="m", messages="hi"))
            provider.complete(Request(model="m", messages="hi"))
            server.refuse = lambda _: (401, {"error": {"message": "expired"}})
            threads = [threading.Thread(target=refused) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(errors) == 2

    def test_a_refusal_that_another_call_has_dealt_with(self, server: Canned) -> None:
        """A call whose key was refused takes the key that another call has found meanwhile, and asks for none."""
        held, released = threading.Event(), threading.Event()
        vault = Vault()

        def refuse(seen: Seen) -> tuple[int, dict[str, Any]] | None:
            if not seen.headers["authorization"].endswith("-1"):
                return None
            if seen.body["model"] == "slow":
                held.set()
                released.wait(10)
            return 401, {"error": {"message": "expired"}}

        server.refuse = refuse
        sync, _ = providers(server, vault)
        with sync() as provider:
            thread = threading.Thread(target=provider.complete, args=(Request(model="slow", messages="hi"),))
            thread.start()
            assert held.wait(10)
            assert provider.complete(Request(model="m", messages="hi")).text == "You said: hi"
            released.set()
            thread.join()
        assert [(seen.body["model"], seen.headers["authorization"][-1]) for seen in server.seen] == [
            ("slow", "1"),
            ("m", "1"),
            ("m", "2"),
            ("slow", "2"),
        ]
        assert vault.asked == 2

    def test_an_interrupt_is_not_shared(self, server: Canned) -> None:
        """A call that waits while another one is interrupted asks for the key itself."""
        asked: list[int] = []
        inside, released = threading.Event(), threading.Event()

        def give() -> str:
            asked.append(len(asked))
            if len(asked) > 1:
                return TOKEN
            inside.set()
            released.wait(10)
            raise KeyboardInterrupt

        sync, _ = providers(server, api_key=give)
        found: list[Any] = []
        with sync() as provider:

            def call() -> None:
                try:
                    found.append(provider.complete(Request(model="m", messages="hi")).text)
                except KeyboardInterrupt as error:
                    found.append(error)

            threads = [threading.Thread(target=call) for _ in range(2)]
            threads[0].start()
            assert inside.wait(10)
            threads[1].start()
            threads[1].join(0.1)  # so that it waits
            released.set()
            for thread in threads:
                thread.join()
        assert sorted(map(str, found)) == ["", "You said: hi"]
        assert len(asked) == 2

    def test_no_threads_of_the_program_are_taken(self, server: Canned) -> None:
        """Functions that hang in worker threads leave the program's own worker threads free."""
        released = threading.Event()

        def give() -> str:
            released.wait(10)
            return TOKEN

        async def main() -> None:
            _, asynchronous = providers(server, api_key=give)
            made = [asynchronous() for _ in range(3)]
            limiter = anyio.to_thread.current_default_thread_limiter()
            limiter.total_tokens = 1
            async with anyio.create_task_group() as tasks:
                for provider in made:
                    tasks.start_soon(provider.complete, Request(model="m", messages="hi"))
                await anyio.sleep(0.1)
                with anyio.fail_after(5):
                    await anyio.to_thread.run_sync(released.set)
            for provider in made:
                await provider.aclose()

        anyio.run(main)
        assert len(server.seen) == 3


class TestAuthorizers:
    def test_what_they_sign(self, server: Canned, mode: str) -> None:
        """An authorizer gets the address, the headers and the body as they are sent."""
        asked = Request(model="m", messages="hié", headers={"X-Call": "1"})
        ask(mode, *providers(server, Vault(), api_base=f"{server.url}/gate%20way?x=1"), asked)
        path = server.last.path
        assert path.startswith("/gate%20way/chat/completions?x=1")
        host, length = server.last.headers["host"], server.last.headers["content-length"]
        assert server.last.headers["x-signed"] == f"{server.url}{path} {host} {length}"
        assert server.last.headers["authorization"] == f"Signed {TOKEN}-1"

    @pytest.mark.parametrize("given", ["configuration", "call"])
    def test_an_authorization_of_ones_own(self, server: Canned, mode: str, given: str) -> None:
        """An authorization of the configuration or of the call takes the place of the credentials."""
        vault, own = Vault(), {"AUTHORIZATION": "Bearer own"}
        settings = {"headers": own} if given == "configuration" else {}
        asked = Request(model="m", messages="hi", headers=own if given == "call" else {})
        ask(mode, *providers(server, vault, **settings), asked)
        assert server.last.headers["authorization"] == "Bearer own"
        assert "x-signed" not in server.last.headers
        assert vault.asked == 0

    def test_a_refused_authorization_of_the_call(self, server: Canned, mode: str) -> None:
        """The credentials are not asked for others because a call's own authorization was refused."""
        vault = Vault()
        server.refuse = lambda _: (401, {"error": {"message": "bad own-0123456789"}})
        asked = Request(model="m", messages="hi", headers={"Authorization": "own-0123456789"})
        with pytest.raises(AuthenticationError, match=r"bad \*\*\*"):
            ask(mode, *providers(server, vault), asked)
        assert (vault.asked, len(server.seen)) == (0, 1)

    def test_beside_a_call_with_its_own(self, server: Canned) -> None:
        """A call's own authorization is not signed, also when the credentials are already there."""
        sync, _ = providers(server, Vault())
        with sync() as provider:
            provider.complete(Request(model="m", messages="hi"))
            provider.complete(Request(model="m", messages="hi", headers={"Authorization": "own"}))
            provider.complete(Request(model="m", messages="hi"))
        assert [seen.headers["authorization"] for seen in server.seen] == [
            f"Signed {TOKEN}-1",
            "own",
            f"Signed {TOKEN}-1",
        ]
        assert ["x-signed" in seen.headers for seen in server.seen] == [True, False, True]


class TestSecrets:
    def test_keys_before_a_key_that_is_given_often(self, server: Canned) -> None:
        """A key that credentials give anew for each call does not push the keys before it out of the masks."""
        vault = Vault(lambda number: Token(f"{TOKEN}-{min(number, 2)}"), fresh=False)
        quoting(server, f"{TOKEN}-1 and {TOKEN}-2")
        sync, _ = providers(server, vault)
        with sync() as provider:
            for _ in range(8):
                provider.complete(Request(model="m", messages="hi"))
            with pytest.raises(BadRequest, match=r"\*\*\* and \*\*\*") as caught:
                provider.complete(Request(model="refused", messages="hi"))
        assert TOKEN not in f"{caught.value!r} {vars(caught.value)}"

    def test_many_keys(self, server: Canned) -> None:
        """Of many keys, the last ones are masked, and the values of the configuration's headers in any case."""
        quoting(server, "key-0001 key-0005 key-0008 key-0009 harbour", code="key-0009")
        sync, _ = providers(
            server, Vault(lambda number: Token(f"key-{number:04}"), fresh=False), headers={"x": "harbour"}
        )
        with sync() as provider:
            for _ in range(8):
                provider.complete(Request(model="m", messages="hi"))
            with pytest.raises(BadRequest, match=r"key-0001 key-0005 \*\*\* \*\*\* \*\*\*") as caught:
                provider.complete(Request(model="refused", messages="hi"))
        assert caught.value.code == "***"

    def test_the_id_of_a_request(self, server: Canned) -> None:
        """A service that quotes the key as the id of the request does not bring it into the error."""
        server.fail = (400, '{"error": {"message": "no"}}', {"x-request-id": f"of {TOKEN}-1"})
        sync, _ = providers(server, Vault())
        with sync() as provider, pytest.raises(BadRequest) as caught:
            provider.complete(Request(model="m", messages="hi"))
        assert caught.value.request_id == "of ***"


def quoting(server: Canned, message: str, code: str = "") -> None:
    """Let the server refuse the model "refused" with a message."""
    answer = {"error": {"message": message, "code": code}}
    server.refuse = lambda seen: (400, answer) if seen.body["model"] == "refused" else None
