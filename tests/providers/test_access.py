"""How a provider reaches its service: headers, keys that a function gives, addresses in the environment, and what it
learns from a refusal.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import anyio
import pytest
from support.canned_server import Canned, Seen, canned_server
from support.libraries import MODES, ask, cases

from fluxibly import LLM, AsyncLLM, LLMConfig
from fluxibly.errors import AuthenticationError, BadRequest, ConfigError, ProviderError
from fluxibly.providers.anthropic import AnthropicProvider
from fluxibly.providers.gemini import GeminiProvider
from fluxibly.providers.openai import OpenAIProvider
from fluxibly.providers.services import SERVICES
from fluxibly.registry import make_provider
from fluxibly.types import Request

TOKEN = "token-0123456789"  # noqa: S105  # it opens nothing
VARIABLES = (
    *("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL"),
    *("GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_GEMINI_BASE_URL", "OPENAI_API_VERSION"),
    *(name for row in SERVICES.values() for name in (row.env_var, row.url_var) if name),
)


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Canned]:
    with canned_server() as server:
        yield server


def config_for(server: Canned, framework: str = "openai", **settings: Any) -> LLMConfig:
    return LLMConfig(**{"framework": framework, "model": "m", "api_base": server.url, "api_key": "k-12345", **settings})


def call(mode: str, config: LLMConfig, **request: Any) -> Any:
    """Return the response to a request in a mode of `MODES`."""
    asked = Request(**{"model": config.model, "messages": "hi", **request})
    makers = [partial(make_provider, config, asynchronous=asynchronous) for asynchronous in (False, True)]
    return ask(mode, *makers, asked)


def refusing(status: int, wrong: Callable[[Seen], bool], message: str) -> Callable[[Seen], Any]:
    """Return a rule of the server: it refuses the requests that are `wrong`."""
    return lambda seen: (status, {"error": {"message": message}}) if wrong(seen) else None


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


class TestHeaders:
    def test_each_call_has_them(self, server: Canned, mode: str) -> None:
        """Headers of the configuration are sent with each call; those of a call replace them."""
        config = config_for(server, headers={"X-Gateway": "harbour", "HTTP-Referer": "https://a.test"})
        call(mode, config, headers={"x-gateway": "quay"})
        sent = server.last.headers
        assert (sent["x-gateway"], sent["http-referer"], sent["authorization"]) == (
            "quay",
            "https://a.test",
            "Bearer k-12345",
        )

    @pytest.mark.parametrize("framework", ["openai", "anthropic", "azure", "openai-responses"])
    def test_in_each_dialect(self, server: Canned, framework: str) -> None:
        """Each dialect sends the headers, and an `Authorization` in place of its key."""
        headers = {"x-gateway": "harbour", "authorization": f"Bearer {TOKEN}"}
        call("sync", config_for(server, framework, headers=headers))
        sent = server.last.headers
        assert (sent["x-gateway"], sent["authorization"]) == ("harbour", f"Bearer {TOKEN}")
        assert {"api-key", "x-api-key"}.isdisjoint(sent)

    @pytest.mark.parametrize("case", cases(""))
    def test_through_other_libraries(self, server: Canned, case: Any) -> None:
        """LangChain and LiteLLM send the headers too."""
        settings = case.config(server, headers={"x-gateway": "harbour"})
        case.library.call("sync", settings, headers={"x-call": "one"})
        assert (server.last.headers["x-gateway"], server.last.headers["x-call"]) == ("harbour", "one")

    def test_they_are_secret(self, server: Canned, mode: str) -> None:
        """Values of headers are masked in the repr and in errors, also if the server quotes them."""
        config = config_for(server, headers={"x-gateway": TOKEN})
        assert TOKEN not in repr(config)
        assert "x-gateway" in repr(config)
        server.refuse = refusing(400, lambda seen: True, f"bad header {TOKEN}")
        with pytest.raises(BadRequest) as caught:
            call(mode, config)
        assert TOKEN not in f"{caught.value!r} {vars(caught.value)}"
        assert "bad header ***" in str(caught.value)

    @pytest.mark.parametrize("case", cases("openai"))
    def test_they_are_secret_through_other_libraries(self, server: Canned, case: Any) -> None:
        """LangChain's and LiteLLM's errors have the values masked too, and those of a call."""
        server.refuse = refusing(400, lambda seen: True, f"bad headers {TOKEN} and {TOKEN[::-1]}")
        settings = case.config(server, headers={"x-gateway": TOKEN})
        error = case.library.failure("sync", settings, headers={"x-call": TOKEN[::-1]})
        assert "bad headers *** and ***" in str(error)

    @pytest.mark.parametrize(
        ("configured", "called"),
        [
            ({"Authorization": f"Bearer {TOKEN}"}, {}),
            ({}, {"Authorization": f"Bearer {TOKEN}"}),
            ({}, {"x-gateway": TOKEN}),
        ],
        ids=["configuration", "call", "another header of the call"],
    )
    def test_a_token_is_secret_as_a_key_is(
        self, server: Canned, mode: str, configured: dict[str, str], called: dict[str, str]
    ) -> None:
        """A server that quotes the token without `Bearer` does not bring it into the error."""
        server.refuse = refusing(401, lambda seen: True, f"Incorrect API key provided: {TOKEN}")
        with pytest.raises(AuthenticationError, match=r"Incorrect API key provided: \*\*\*") as caught:
            call(mode, config_for(server, headers=configured), headers=called)
        assert TOKEN not in f"{caught.value!r} {vars(caught.value)}"

    def test_a_value_outside_ascii_is_secret(self, server: Canned, mode: str) -> None:
        """A value that the server quotes in UTF-8 is masked in the message, the body and the code."""
        value = "café-0123456789"
        server.fail = (400, json.dumps({"error": {"message": value, "code": value}}, ensure_ascii=False), {})
        with pytest.raises(BadRequest) as caught:
            call(mode, config_for(server, headers={"x-gateway": value}))
        assert "0123456789" not in f"{caught.value!r} {vars(caught.value)}"

    @pytest.mark.parametrize(
        ("headers", "message"),
        [
            ({"x": "a\r\nb: c"}, "headers: the header 'x' cannot be sent"),
            ({"content-length": "5"}, "headers: the header 'content-length' cannot be set"),
            ({"x y": "5"}, "headers: the header 'x y' cannot be sent"),
        ],
    )
    def test_a_header_that_http_forbids(self, server: Canned, headers: dict[str, str], message: str) -> None:
        """A header that cannot be sent is found when the provider is made; its value is not shown."""
        with pytest.raises(ConfigError, match=message):
            make_provider(config_for(server, headers=headers), asynchronous=False)

    @pytest.mark.parametrize("name", ["default_headers", "extra_headers", "header"])
    def test_other_names_are_told(self, name: str) -> None:
        """The names that other clients have for it are errors that name `headers`."""
        with pytest.raises(ConfigError, match=f"{name}: there is no such setting; did you mean 'headers'"):
            LLMConfig.from_mapping({"framework": "echo", "model": "m", name: {"a": "b"}})
        with pytest.raises(TypeError, match="did you mean 'headers'"):
            LLMConfig(framework="echo", model="m", **{name: {"a": "b"}})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"headers\.a: expected a str, got an int"):
            LLMConfig(framework="echo", model="m", headers={"a": 5})  # type: ignore[dict-item]


class TestAuthorizationOfACall:
    def test_azure_with_a_token_of_the_call(self, server: Canned, mode: str) -> None:
        """Azure needs no key if the call has an `Authorization`."""
        call(mode, config_for(server, "azure", api_key=None), headers={"Authorization": f"Bearer {TOKEN}"})
        assert server.last.headers["authorization"] == f"Bearer {TOKEN}"
        assert "api-key" not in server.last.headers

    def test_azure_without_either(self, server: Canned, mode: str) -> None:
        """Without a key and without an `Authorization` nothing is sent, and the error names both."""
        with pytest.raises(AuthenticationError, match=r"AZURE_OPENAI_API_KEY.*Authorization"):
            call(mode, config_for(server, "azure", api_key=None), headers={"x-other": "1"})
        assert not server.seen

    def test_it_takes_the_place_of_the_key(self, server: Canned) -> None:
        """A key that is configured is not sent beside the call's own authorization, under whatever name."""
        call("sync", config_for(server, "azure"), headers={"Authorization": f"Bearer {TOKEN}"})
        assert "api-key" not in server.last.headers
        call("sync", config_for(server, "azure"), headers={"Api-Key": "another"})
        assert server.last.headers["api-key"] == "another"

    def test_an_empty_key_is_none(self, server: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        """With an empty key in the configuration, the environment's counts."""
        monkeypatch.setenv("OPENAI_API_KEY", "k-environment")
        call("sync", config_for(server, api_key=""))
        assert server.last.headers["authorization"] == "Bearer k-environment"

    @pytest.mark.parametrize(
        "key", [f" {TOKEN}", f"{TOKEN}\n", f"{TOKEN}\r\nx-b: 2", f"{TOKEN}\x7f", f"{TOKEN}é", f"Bearer {TOKEN}"]
    )
    @pytest.mark.parametrize("source", ["api_key", "OPENAI_API_KEY"])
    def test_a_key_that_no_header_can_carry(self, key: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A malformed key is found when the provider is made. The error says where it is from, and does not show it."""
        monkeypatch.setenv("OPENAI_API_KEY", key)
        settings = {"api_key": key} if source == "api_key" else {}
        with pytest.raises(AuthenticationError, match=f"the API key in .*{source} (begins|has)") as caught:
            make_provider(LLMConfig(framework="openai", model="m", **settings), asynchronous=False)
        assert TOKEN not in repr(caught.value)

    def test_other_services_miss_their_key_at_once(self) -> None:
        """Without a key, the providers of other services are not made."""
        with pytest.raises(AuthenticationError, match=r"GROQ_API_KEY.*Authorization"):
            make_provider(LLMConfig(framework="groq", model="m"), asynchronous=False)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        make_provider(LLMConfig(framework="groq", model="m", headers=headers), asynchronous=False)


class Tokens:
    """A function that gives another token at each call. It counts the calls, and knows in which threads they were."""

    def __init__(self, *, same: bool = False) -> None:
        self.given: list[str] = []
        self.threads: list[threading.Thread] = []
        self._same = same

    def __call__(self) -> str:
        self.threads.append(threading.current_thread())
        self.given.append(f"{TOKEN}-{1 if self._same else len(self.given) + 1}")
        return self.given[-1]

    async def later(self) -> str:
        await asyncio.sleep(0) if _on_asyncio() else None
        return self()


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class TestKeyFunctions:
    @pytest.fixture(params=["function", "coroutine function"])
    def tokens(self, request: pytest.FixtureRequest) -> tuple[Tokens, Any]:
        """Return the tokens, and the function for the configuration."""
        tokens = Tokens()
        return tokens, tokens if request.param == "function" else tokens.later

    def test_it_is_asked_at_the_first_call(self, server: Canned, mode: str, tokens: tuple[Tokens, Any]) -> None:
        """The token is sent as a key is; making the provider does not ask for it."""
        config = config_for(server, api_key=tokens[1])
        make_provider(config, asynchronous=False)
        assert not tokens[0].given
        call(mode, config)
        assert server.last.headers["authorization"] == f"Bearer {TOKEN}-1"

    def test_it_is_asked_again_after_a_401(
        self, server: Canned, mode: str, tokens: tuple[Tokens, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """A refused token is replaced, the request sent again, and the new token kept. The warning says what changed."""
        caplog.set_level(logging.WARNING, "fluxibly")
        server.refuse = refusing(401, lambda seen: seen.headers["authorization"].endswith("-1"), "expired")
        response = call(mode, config_for(server, api_key=tokens[1]))
        assert response.text.startswith("You said")
        assert [seen.headers["authorization"][-2:] for seen in server.seen] == ["-1", "-2"]
        (record,) = caplog.records
        assert 'change="sends a new api_key"' in record.getMessage()
        assert TOKEN not in record.getMessage()

    def test_once(self, server: Canned, mode: str) -> None:
        """A service that refuses the new token too is not asked a third time; the error shows no token."""
        tokens = Tokens()
        server.refuse = lambda seen: (401, {"error": {"message": f"bad {seen.headers['authorization']}"}})
        with pytest.raises(AuthenticationError) as caught:
            call(mode, config_for(server, api_key=tokens))
        assert len(server.seen) == len(tokens.given) == 2
        assert TOKEN not in f"{caught.value!r} {vars(caught.value)}"

    def test_the_same_token_is_not_sent_again(self, server: Canned, mode: str) -> None:
        """If the function has no other token, the error reaches the caller at once."""
        server.refuse = refusing(401, lambda seen: True, "wrong")
        with pytest.raises(AuthenticationError):
            call(mode, config_for(server, api_key=Tokens(same=True)))
        assert len(server.seen) == 1

    def test_azure_gets_a_token(self, server: Canned, mode: str, tokens: tuple[Tokens, Any]) -> None:
        """What a function gives to Azure is a token of Entra ID, which is no `api-key`."""
        call(mode, config_for(server, "azure", api_key=tokens[1]))
        assert server.last.headers["authorization"] == f"Bearer {TOKEN}-1"
        assert "api-key" not in server.last.headers

    def test_other_refusals_keep_it(self, server: Canned) -> None:
        """Only a 401 asks for a new token."""
        tokens = Tokens()
        server.refuse = refusing(403, lambda seen: True, "no")
        with pytest.raises(ProviderError):
            call("sync", config_for(server, api_key=tokens))
        assert len(server.seen) == len(tokens.given) == 1

    @pytest.mark.parametrize("given", [None, "", 5, TOKEN.encode(), [TOKEN]])
    def test_what_is_no_token(self, server: Canned, mode: str, given: Any) -> None:
        """A function that returns something else is told so. What it returned may be a token all the same."""
        message = "api_key: expected the function to return a non-empty str, got"
        with pytest.raises(AuthenticationError, match=message) as caught:
            call(mode, config_for(server, api_key=lambda: given))
        assert TOKEN not in repr(caught.value)
        assert not server.seen

    def test_a_malformed_token(self, server: Canned, mode: str) -> None:
        """A token that a header cannot carry is not sent, and not shown."""
        with pytest.raises(AuthenticationError, match="white space") as caught:
            call(mode, config_for(server, api_key=lambda: f"{TOKEN}\n"))
        assert TOKEN not in repr(caught.value)

    def test_after_a_malformed_token_it_is_asked_again(self, server: Canned) -> None:
        """No call is sent with a token that was refused here, or without any."""
        tokens = iter([f"{TOKEN}\n", TOKEN])
        with LLM(config_for(server, api_key=lambda: next(tokens), max_retries=0)) as llm:
            with pytest.raises(AuthenticationError, match="white space"):
                llm.forward("hi")
            assert llm.forward("hi") == "You said: hi"
        assert [seen.headers["authorization"] for seen in server.seen] == [f"Bearer {TOKEN}"]

    def test_the_tokens_before_stay_secret(self, server: Canned, mode: str) -> None:
        """A server that quotes an earlier token, or a header, does not bring it into the error of a later call."""
        tokens = Tokens()

        def refuse(seen: Seen) -> tuple[int, dict[str, Any]]:
            if seen.headers["authorization"].endswith("-1"):
                return 401, {"error": {"message": "expired"}}
            return 400, {"error": {"message": f"refused after {TOKEN}-1: {TOKEN}-2 of harbour"}}

        server.refuse = refuse
        with pytest.raises(BadRequest, match=r"refused after \*\*\*: \*\*\* of \*\*\*") as caught:
            call(mode, config_for(server, api_key=tokens, headers={"x-gateway": "harbour"}))
        assert TOKEN not in f"{caught.value!r} {vars(caught.value)}"

    def test_an_object_with_an_asynchronous_call(self, server: Canned, mode: str) -> None:
        """An object that is called as a coroutine function is one. A call in an event loop calls it in that loop's thread."""
        threads: list[threading.Thread] = []

        class Identity:
            def __call__(self) -> Any:
                return self.token()

            async def token(self) -> str:
                threads.append(threading.current_thread())
                return TOKEN

        class AsyncIdentity:
            async def __call__(self) -> str:
                threads.append(threading.current_thread())
                return TOKEN

        for give in (Identity(), AsyncIdentity()):
            call(mode, config_for(server, api_key=give))
            assert server.last.headers["authorization"] == f"Bearer {TOKEN}"
        inside = [thread is threading.current_thread() for thread in threads]
        assert inside == [not mode.startswith("sync")] * 2

    def test_an_authorization_of_ones_own_comes_first(self, server: Canned, mode: str) -> None:
        """The function is not asked if the configuration's headers have the authorization."""
        tokens = Tokens()
        call(mode, config_for(server, api_key=tokens, headers={"Authorization": "Bearer mine"}))
        assert server.last.headers["authorization"] == "Bearer mine"
        assert not tokens.given

    def test_its_errors_reach_the_caller(self, server: Canned, mode: str, tokens: tuple[Tokens, Any]) -> None:
        """An exception of the function is the caller's, at the first call and after a 401."""

        def broken() -> str:
            raise LookupError("no identity")

        with pytest.raises(LookupError, match="no identity"):
            call(mode, config_for(server, api_key=broken))

    def test_it_runs_beside_the_event_loop(self, server: Canned) -> None:
        """A function that may block does not run in the event loop's thread; without a loop, it runs in the caller's."""
        tokens = Tokens()
        call("asyncio", config_for(server, api_key=tokens))
        call("sync", config_for(server, api_key=tokens))
        assert tokens.threads[0] is not threading.current_thread()
        assert tokens.threads[1] is threading.current_thread()

    def test_a_coroutine_function_inside_of_a_running_loop(self, server: Canned) -> None:
        """A synchronous call in a notebook, whose thread has a running loop, may have a coroutine function."""

        async def cell() -> str:
            with LLM(config_for(server, api_key=Tokens().later)) as llm:
                return llm.forward("hi")

        assert asyncio.run(cell()) == "You said: hi"

    def test_many_calls_share_a_token(self, server: Canned) -> None:
        """Concurrent calls ask for one token, and for one more when it is refused."""
        tokens = Tokens()

        async def calls() -> None:
            async with AsyncLLM(config_for(server, api_key=tokens, max_retries=0)) as llm:
                await asyncio.gather(*[llm.forward("hi") for _ in range(20)])
                assert len(tokens.given) == 1
                server.refuse = refusing(401, lambda seen: seen.headers["authorization"].endswith("-1"), "expired")
                await asyncio.gather(*[llm.forward("hi") for _ in range(20)])

        asyncio.run(calls())
        assert len(tokens.given) == 2

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_call_that_is_cancelled_meanwhile(self, server: Canned, backend: str) -> None:
        """A call that is cancelled while it waits for a token does not hold up the next one."""
        hang = True

        async def token() -> str:
            if hang:
                await anyio.sleep_forever()
            return TOKEN

        async def main() -> str:
            nonlocal hang
            async with AsyncLLM(config_for(server, api_key=token, max_retries=0)) as llm:
                with anyio.move_on_after(0.05) as scope:
                    await llm.forward("hi")
                assert scope.cancelled_caught
                with anyio.move_on_after(0.05):
                    async with llm.stream("hi") as stream:
                        async for _ in stream:
                            pass
                hang = False
                return await llm.forward("hi")

        assert anyio.run(main, backend=backend) == "You said: hi"
        assert len(server.seen) == 1

    def test_an_interrupt_meanwhile(self, server: Canned) -> None:
        """Ctrl-C while a function gives the token reaches the caller, and the next call asks anew."""
        given: list[BaseException | str] = [KeyboardInterrupt(), TOKEN]

        def token() -> str:
            found = given.pop(0)
            if isinstance(found, BaseException):
                raise found
            return found

        with LLM(config_for(server, api_key=token)) as llm:
            with pytest.raises(KeyboardInterrupt):
                llm.forward("hi")
            assert llm.forward("hi") == "You said: hi"

    def test_many_threads_share_a_token(self, server: Canned) -> None:
        """The same of threads."""
        tokens = Tokens()
        with LLM(config_for(server, api_key=tokens, max_retries=0)) as llm:
            threads = [threading.Thread(target=llm.forward, args=("hi",)) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(server.seen) == 10
        assert len(tokens.given) == 1

    def test_its_repr_shows_no_arguments(self) -> None:
        """The configuration's repr does not show what a partial holds."""
        config = LLMConfig(framework="echo", model="m", api_key=partial(str, TOKEN))
        assert TOKEN not in repr(config)
        assert config.fixed_key is None

    @pytest.mark.parametrize("case", cases(""))
    def test_through_other_libraries(self, server: Canned, case: Any) -> None:
        """OpenAI's models through LangChain take a function; otherwise the error says who takes one."""
        settings = case.config(server, api_key=Tokens())
        if str(case) == "langchain openai":
            case.library.call("sync", settings)
            assert server.last.headers["authorization"].startswith(f"Bearer {TOKEN}")
        else:
            with pytest.raises(ConfigError, match="api_key: expected a str for"):
                case.library.call("sync", settings)


class TestAddressesInTheEnvironment:
    @pytest.mark.parametrize(
        ("framework", "variable", "value", "url"),
        [
            ("openai", "OPENAI_BASE_URL", "https://a.test/v1/", "https://a.test/v1"),
            ("openai-responses", "OPENAI_BASE_URL", "https://a.test/v1", "https://a.test/v1"),
            ("azure", "AZURE_OPENAI_ENDPOINT", "https://name.openai.azure.com/", "https://name.openai.azure.com"),
            ("groq", "GROQ_BASE_URL", "https://a.test", "https://a.test/openai/v1"),
            ("groq", "GROQ_BASE_URL", "https://a.test/openai/v1", "https://a.test/openai/v1"),
            ("cerebras", "CEREBRAS_BASE_URL", "https://a.test/x", "https://a.test/x/v1"),
            ("fireworks", "FIREWORKS_BASE_URL", "https://a.test", "https://a.test/inference/v1"),
            ("together", "TOGETHER_BASE_URL", "https://a.test/v1", "https://a.test/v1"),
            ("perplexity", "PERPLEXITY_BASE_URL", "https://a.test", "https://a.test"),
            ("zai", "ZAI_BASE_URL", "https://a.test/v4", "https://a.test/v4"),
            ("nvidia", "NVIDIA_BASE_URL", "https://a.test/v1", "https://a.test/v1"),
            ("anthropic", "ANTHROPIC_BASE_URL", "https://a.test", "https://a.test/v1"),
            ("gemini", "GOOGLE_GEMINI_BASE_URL", "https://a.test", "https://a.test/v1beta"),
        ],
    )
    def test_it_is_followed(
        self, framework: str, variable: str, value: str, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A service's address is the one that its vendor's own client would take."""
        monkeypatch.setenv(variable, value)
        for asynchronous in (False, True):
            provider = make_provider(LLMConfig(framework=framework, model="m", api_key="k"), asynchronous=asynchronous)
            assert repr(provider).endswith(f"({url})")

    def test_the_configuration_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`api_base` stands before the variable, and an empty variable is none."""
        monkeypatch.setenv("OPENAI_BASE_URL", "https://a.test/v1")
        provider = OpenAIProvider(LLMConfig(framework="openai", model="m", api_base="https://b.test/v1"))
        assert provider.info.server_address == "b.test"
        monkeypatch.setenv("OPENAI_BASE_URL", " ")
        provider = OpenAIProvider(LLMConfig(framework="openai", model="m", api_key="k"))
        assert provider.info.server_address == "api.openai.com"

    @pytest.mark.parametrize(
        ("provider", "framework", "variable"),
        [
            (OpenAIProvider, "openai", "OPENAI_BASE_URL"),
            (AnthropicProvider, "anthropic", "ANTHROPIC_BASE_URL"),
            (GeminiProvider, "gemini", "GOOGLE_GEMINI_BASE_URL"),
        ],
    )
    @pytest.mark.parametrize("value", ["a.test/v1", "ftp://a.test", "https://", "https://a.test:99999/v1"])
    def test_it_is_checked(
        self, provider: Any, framework: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error names the variable, not `api_base`, which the user has not set."""
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError, match=f"^{variable}: .*expected an http:// or https:// URL"):
            provider(LLMConfig(framework=framework, model="m", api_key="k"))

    def test_a_gateway_has_the_quirks_of_a_server_of_ones_own(
        self, server: Canned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """OPENAI_BASE_URL is as good as `api_base`: no key is needed, and `max_tokens` keeps its old name."""
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        call("sync", LLMConfig(framework="openai", model="llama"), max_tokens=5)
        assert server.last.path == "/v1/chat/completions"
        assert server.last.body["max_tokens"] == 5
        assert "authorization" not in server.last.headers

    def test_anthropics_gateway_token(self, server: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
        """ANTHROPIC_AUTH_TOKEN is sent as a bearer token if there is no key."""
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", TOKEN)
        call("sync", LLMConfig(framework="anthropic", model="m"))
        assert server.last.headers["authorization"] == f"Bearer {TOKEN}"
        assert "x-api-key" not in server.last.headers
        monkeypatch.setenv("ANTHROPIC_API_KEY", "k-12345")
        call("sync", LLMConfig(framework="anthropic", model="m"))
        assert server.last.headers["x-api-key"] == "k-12345"
        assert "authorization" not in server.last.headers


NEW = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
OLD = "Unrecognized request argument supplied: max_completion_tokens"


class TestMaxTokens:
    @pytest.mark.parametrize(
        ("model", "name"),
        [
            *(
                (model, "max_completion_tokens")
                for model in ("o1", "o3-mini", "gpt-5-mini", "gpt-6", "gpt-5.1", "gpt5")
            ),
            *((model, "max_completion_tokens") for model in ("ft:o4-mini-2025-04-16:org::id", "prod-gpt-5", "our-o3")),
            *((model, "max_completion_tokens") for model in ("openai/o4-mini", "prefix:gpt-5-mini", "GPT-5", "gpt-12")),
            *(
                (model, "max_tokens")
                for model in ("gpt-4o", "gpt-35-turbo", "gpt-3.5-turbo", "gpt-oss-120b", "gpt-4.1")
            ),
            *((model, "max_tokens") for model in ("marco-o1", "Skywork-o1-8b", "open-o1", "llama-o1", "gpt-j-6b")),
            *((model, "max_tokens") for model in ("qwen3-o", "pro1", "llama-3.1", "foo4-bar", "gpt-50")),
        ],
    )
    def test_by_the_name_of_the_model(self, server: Canned, model: str, name: str) -> None:
        """OpenAI's reasoning models are recognised anywhere in a name, and other models are not taken for them."""
        call("sync", config_for(server, model=model), max_tokens=7)
        assert [key for key in server.last.body if key.startswith("max_")] == [name]

    @pytest.mark.parametrize("refused", ["max_tokens", "max_completion_tokens"])
    def test_a_refusal_teaches_the_other_name(
        self, server: Canned, mode: str, refused: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The request is sent again once under the other name, and a warning says so."""
        caplog.set_level(logging.WARNING, "fluxibly")
        (taken,) = {"max_tokens", "max_completion_tokens"} - {refused}
        message = NEW if refused == "max_tokens" else OLD
        server.refuse = refusing(400, lambda seen: refused in seen.body, message)
        config = config_for(server, model="house-model", quirks={"max_tokens": refused})
        assert call(mode, config, max_tokens=7).text
        assert [[key for key in seen.body if key.startswith("max_")] for seen in server.seen] == [[refused], [taken]]
        (record,) = caplog.records
        assert f'change="sends {taken} instead of {refused}"' in record.getMessage()

    def test_it_is_remembered_for_the_model(self, server: Canned) -> None:
        """The next calls of the model begin with the name that it takes; another model is not concerned."""
        server.refuse = refusing(400, lambda seen: seen.body["model"] == "a" and "max_tokens" in seen.body, NEW)
        with LLM(config_for(server)) as llm:
            for model in ("a", "a", "b"):
                llm.complete("hi", model=model, max_tokens=7)
        sent = [(seen.body["model"], "max_tokens" in seen.body) for seen in server.seen]
        assert sent == [("a", True), ("a", False), ("a", False), ("b", True)]

    @pytest.mark.parametrize(
        ("status", "message", "parameters"),
        [
            (400, "max_tokens is too large: 999999. This model supports at most 16384 tokens", {"max_tokens": 7}),
            (400, NEW, {}),
            (429, NEW, {"max_tokens": 7}),
            (500, NEW, {"max_tokens": 7}),
        ],
    )
    def test_other_errors_teach_nothing(
        self, server: Canned, mode: str, status: int, message: str, parameters: dict[str, Any]
    ) -> None:
        """An error that does not refuse the name is raised at once."""
        server.refuse = refusing(status, lambda seen: True, message)
        with pytest.raises(ProviderError):
            call(mode, config_for(server), **parameters)
        assert len(server.seen) == 1

    def test_it_is_sent_again_only_once(self, server: Canned, mode: str) -> None:
        """A server that refuses both names is asked twice, and its second answer is the error."""
        server.refuse = lambda seen: (400, {"error": {"message": NEW if "max_tokens" in seen.body else OLD}})
        with pytest.raises(BadRequest, match="max_completion_tokens"):
            call(mode, config_for(server), max_tokens=7)
        assert len(server.seen) == 2

    def test_encrypted_reasoning(self, server: Canned, mode: str) -> None:
        """A model with the name of a reasoning model that has no encrypted reasoning is asked without it."""
        message = "Encrypted content is not supported with this model."
        server.refuse = refusing(400, lambda seen: "include" in seen.body, message)
        assert call(mode, config_for(server, "openai-responses", model="our-gpt-5")).finish_reason == "stop"
        assert ["include" in seen.body for seen in server.seen] == [True, False]
