"""Configuration: `LLMConfig`, read from code, YAML and the environment."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import attrs

from fluxibly._checks import (
    is_list,
    is_mapping,
    kind_of,
    mapping,
    one_of,
    problem,
    public_headers,
    repr_of_headers,
    repr_without_secrets,
    shown_url,
    suggests_names,
    text,
    unknown_settings,
    whole,
    without_secrets,
)
from fluxibly._parameters import CONFIGURED, PARAMETERS, parameter_problems
from fluxibly._values import Value
from fluxibly.errors import ConfigError, Problems
from fluxibly.limits import KEEP_ALIVES as KEEP_ALIVES, Timeouts as Timeouts, seconds_problem

if TYPE_CHECKING:
    from pathlib import Path

    from fluxibly._parameters import Parameters

    class Settings(Parameters, total=False):
        """The settings of an `LLMConfig`, as `LLM` takes them. `LLMConfig` says what they mean."""

        framework: str
        api_key: Secret | str | KeyFunction | None
        api_base: str | None
        region: str | None
        project: str | None
        headers: Mapping[str, str]
        timeout: float | Timeouts | None
        max_retries: int
        additional_params: Mapping[str, Any]
        quirks: Mapping[str, Any]


_ADDRESS = re.compile(
    r"https?://(?:[^/?#@\s]*@)?(?:\[[^]/\s]+\]|[^][/?#@:\s]+)(?::(?P<port>[0-9]{0,5}))?(?:[/?#]\S*)?", re.IGNORECASE
)


class Secret:
    """An API key that only `reveal()` shows. It is equal to the str that it holds."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Secret: expected a str, got {kind_of(value)}")
        self._value = value

    def reveal(self) -> str:
        """Return the key itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Secret):
            return self._value == other._value
        return self._value == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)


KeyFunction: TypeAlias = Callable[[], str | Awaitable[str]]
"""A function that returns an API key or a token, or a coroutine function."""


def _secret(value: Secret | str | KeyFunction | None) -> Secret | KeyFunction | None:
    return Secret(value) if isinstance(value, str) else value


def _repr_of_key(key: object) -> str:
    # The repr of a function may show a key: that of a partial has its arguments.
    return f"<{type(key).__name__}>" if callable(key) else repr(key)


def _copied(value: Any) -> Any:
    """Copy a mapping or a list, so that the caller can change its own without changing the configuration."""
    return dict(value) if is_mapping(value) else list(value) if is_list(value) else value


def _repr_of_url(url: object) -> str:
    """Return the `repr` of an address, with the secrets in it masked."""
    return repr(shown_url(url)) if isinstance(url, str) else re.sub("//.*@", "//***@", repr(url))


def _repr_of_layers(layers: object) -> str:
    """Return the `repr` of middleware, with the secrets in its settings masked, and the logins of URLs."""

    def shown(value: object) -> object:
        if is_mapping(value):
            return {name: shown(each) for name, each in value.items()}
        if is_list(value):
            return [shown(each) for each in value]
        return shown_url(value) if isinstance(value, str) and re.match(r"\w+://", value) else value

    return repr(shown(without_secrets(layers)))


def _to_stop(value: Any) -> Any:
    """Return the texts of `stop` as a tuple. The checks report another value."""
    return (value,) if isinstance(value, str) else tuple(value) if is_list(value) else value


@suggests_names
@attrs.frozen(kw_only=True, repr=False, eq=False)
class LLMConfig(Value):
    """Which model to call, and how.

    Args:
        framework: the provider, by its registered name.
        model: the model, by the provider's name for it.
        temperature: from 0 to 2. This and every other parameter that is None is not sent.
        max_tokens: a whole number from 1 up.
        top_p: from 0 to 1.
        top_k: a whole number.
        frequency_penalty, presence_penalty: from -2 to 2.
        stop: a text or several, each of which ends the answer.
        seed: a whole number. Equal seeds give similar answers, where the service has seeds.
        n: the number of choices, from 1 up.
        response_format: "text", "json", or a JSON Schema that the answers have to follow.
        reasoning_effort: the provider's own word, such as "low" or "high".
        api_key: None takes the provider's environment variable. A function that returns a token, also a coroutine
            function, is called at the first call, and again when the service refuses the token (401).
        api_base: the base URL of the service. None takes the vendor's environment variable (such as OPENAI_BASE_URL), or
            else the service's own address.
        region: where the service runs the model, such as "us-east-1": for `bedrock` and `vertex` only. None takes the
            vendor's environment variable.
        project: the project that pays: for `vertex` only. None takes the vendor's environment variable, or the project
            of the credentials.
        headers: HTTP headers to send with every call. An `Authorization` header is sent in place of the key.
        timeout: seconds. A number bounds connecting, the first byte, the idle time between chunks, and each whole attempt
            of a call that is not streamed. `Timeouts` sets each limit; None takes the defaults of `Timeouts`.
        max_retries: the retries after the first attempt.
        additional_params: fields of the provider's request body, sent as they are.
        quirks: differences of an OpenAI-compatible server's dialect, by name, such as
            `{"reasoning_fields": ["reasoning_content"]}`. They replace those that are known of the service. `QUIRKS`
            lists the names.
        middleware: the stack, outermost first; None is the default stack. In a list, "default" is the default stack, and
            `{"default_stack": {"retry": {…}, "mine": {}}}` the default stack with these layers in it.

    Raises:
        ConfigError: it lists every problem, with its path and range.
        TypeError: an unknown setting; the message names the nearest known setting.
    """

    framework: str
    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | Sequence[str] | None = attrs.field(default=None, converter=_to_stop)
    seed: int | None = None
    n: int | None = None
    response_format: Literal["text", "json"] | Mapping[str, Any] | None = attrs.field(default=None, converter=_copied)
    reasoning_effort: str | None = None
    api_key: Secret | KeyFunction | None = attrs.field(default=None, converter=_secret, repr=_repr_of_key)
    api_base: str | None = attrs.field(default=None, repr=_repr_of_url)
    region: str | None = None
    project: str | None = None
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str], converter=_copied, repr=repr_of_headers)
    timeout: float | Timeouts | None = None
    max_retries: int = 3
    additional_params: Mapping[str, Any] = attrs.field(
        factory=dict[str, Any], converter=_copied, repr=repr_without_secrets
    )
    quirks: Mapping[str, Any] = attrs.field(factory=dict[str, Any], converter=_copied)
    middleware: Sequence[Any] | None = attrs.field(default=None, converter=_copied, repr=_repr_of_layers)

    def __attrs_post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError.of(problems)

    @property
    def fixed_key(self) -> str | None:
        """Return the API key itself; None if there is none, or if a function gives it."""
        return self.api_key.reveal() if isinstance(self.api_key, Secret) else None

    @property
    def timeouts(self) -> Timeouts:
        """Spell out each limit of `timeout`. `total` is for calls that are not streamed; see `stream_total`."""
        timeout = self.timeout
        if timeout is None:
            return Timeouts()
        return timeout if isinstance(timeout, Timeouts) else Timeouts(timeout, timeout, timeout, timeout)

    @property
    def stream_total(self) -> float | None:
        """The limit on a whole stream, which only `Timeouts` can set."""
        return self.timeout.stream_total if isinstance(self.timeout, Timeouts) else None

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, path: str = "") -> LLMConfig:
        """Make a configuration from plain data, as YAML and JSON have it. `path` precedes the names in messages.

        Numbers may be strings, because environment variables are.

        Raises:
            ConfigError: it lists every problem.
        """
        wrong = mapping(path.rstrip(".") or "the configuration", settings)
        if wrong is not None:
            raise ConfigError(wrong)
        # `${VAR:-}` becomes an empty string where the variable is not set.
        given = {name: value for name, value in settings.items() if value is not None and value != ""}
        names = [field.name for field in attrs.fields(cls)]
        problems = unknown_settings(settings, names)
        problems += [f"{name}: is required" for name in ("framework", "model") if name not in given]
        known: dict[str, Any] = {"framework": "-", "model": "-"}
        for name in names:
            if name in given:
                try:
                    known[name] = _read(name, given[name])
                except ConfigError as error:
                    problems += error.problems
        try:
            config = cls(**known)
        except ConfigError as error:
            problems += error.problems
        else:
            if not problems:
                return config
        problems = [path + each for each in problems]
        raise ConfigError.of(problems)

    @classmethod
    def from_yaml(cls, file: str | Path, *, section: str = "llm") -> LLMConfig:
        """Read the configuration from a section of a YAML file.

        Environment variables replace `${VAR}` and `${VAR:-default}` in strings, after parsing.

        Raises:
            ConfigError: the file cannot be read or parsed, lacks the section, or holds bad settings. It lists every
                problem, but not those of the middleware: they are registered later, and `LLM.from_yaml` lists them too.
        """
        from fluxibly._yaml import read_section

        settings, known = read_section(file, section)
        problems = Problems(known)
        config = problems.of(cls.from_mapping, settings, path=f"{section}.")
        problems.check()
        return cast("LLMConfig", config)


_LACKED = [name for name in PARAMETERS if name not in ("model", "extra", "headers", "metadata")]


def _flag(name: str, value: object) -> str | None:
    return None if isinstance(value, bool) else problem(name, "true or false", value)


def _names(name: str, value: object, known: Sequence[str]) -> str | None:
    """Check a list of known names."""
    expected = f"a list of names among {', '.join(known)}"
    if not isinstance(value, (list, tuple)):
        return problem(name, expected, value)
    wrong = [each for each in cast("Sequence[object]", value) if each not in known]
    return problem(name, expected, wrong[0]) if wrong else None


_MESSAGE_FIELDS = (
    "audio",
    "extra_content",
    "images",
    "provider_specific_fields",
    "reasoning_details",
    "refusal",
    "thinking_blocks",
)
"""The fields of an assistant's message, besides reasoning as text, that some server takes back."""
QUIRKS: Mapping[str, Callable[[str, object], str | None]] = {
    "max_tokens": partial(one_of, choices=("max_tokens", "max_completion_tokens", "by model")),
    "seed": text,
    "stream_usage": _flag,
    "top_k": _flag,
    "lacks": partial(_names, known=_LACKED),
    "formats": partial(_names, known=("text", "json", "schema")),
    "short_call_ids": _flag,
    "reasoning_fields": partial(_names, known=("reasoning_content", "reasoning")),
    "message_fields": partial(_names, known=_MESSAGE_FIELDS),
    "thinks_first": _flag,
    "thinking_parts": _flag,
    "prefill": partial(one_of, choices=("", "message", "prefix", "continue_final_message")),
}
"""The check of each quirk: a field of `Quirks` in `providers/dialects/openai_request.py`, which says what it means."""
PLACE = ("region", "project")
"""The settings for services that run in a cloud, where an account has projects and the cloud has regions."""


def _problems(config: LLMConfig) -> list[str]:
    """List the problems of a configuration."""
    timeout, key, base, layers = config.timeout, config.api_key, config.api_base, config.middleware
    found = [
        text("framework", config.framework),
        *parameter_problems({name: getattr(config, name) for name in ("model", *CONFIGURED)}),
        _stop_problem(config.stop),
        mapping("headers", config.headers, keys=str, values=str),
        None if timeout is None or isinstance(timeout, Timeouts) else seconds_problem("timeout", timeout),
        *(text(name, value) for name in PLACE if (value := getattr(config, name)) is not None),
        whole("max_retries", config.max_retries, 0),
        mapping("additional_params", config.additional_params, keys=str),
        *_quirk_problems(config.quirks),
    ]
    if key is not None and not isinstance(key, Secret) and not callable(key):  # callers may be untyped
        # Never the value: it may be a key all the same.
        found.append(f"api_key: expected a str or a function that returns one, got {kind_of(key)}")
    if base is not None and not (isinstance(base, str) and _is_address(base)):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        found.append(f"api_base: expected an http:// or https:// URL, got {_repr_of_url(base)[:200]}")
    if layers is not None and (isinstance(layers, (str, Mapping)) or not isinstance(layers, Sequence)):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        found.append(problem("middleware", "a list", layers))
    return [each for each in found if each is not None]


def _stop_problem(stop: object) -> str | None:
    texts = cast("tuple[object, ...]", stop) if isinstance(stop, tuple) else () if stop is None else (stop,)
    return next((problem("stop", "a str or several", each) for each in texts if not isinstance(each, str)), None)


def _quirk_problems(quirks: object) -> list[str]:
    wrong = mapping("quirks", quirks, keys=str)
    if wrong is not None:
        return [wrong]
    given = cast("Mapping[str, Any]", quirks)
    found = [QUIRKS[name](f"quirks.{name}", value) for name, value in given.items() if name in QUIRKS]
    return [*unknown_settings(given, list(QUIRKS), "quirks."), *[each for each in found if each is not None]]


def _is_address(url: str) -> bool:
    """Whether a URL is an http(s) address with a valid port. Sockets would take a port over 65535 for another port."""
    match = _ADDRESS.fullmatch(url)
    return match is not None and (not match["port"] or 0 < int(match["port"]) < 65536)


def _read(name: str, value: Any) -> Any:
    """Read a setting that plain data give: numbers may be strings. The checks report a value that does not fit."""
    if name == "timeout" and isinstance(value, Mapping):
        return _timeouts(cast("Mapping[str, Any]", value))
    if name == "project" and type(value) is int:  # a project has a number too
        return str(value)
    if not isinstance(value, str) or name not in _NUMBERS:
        return value
    try:
        return _NUMBERS[name](value)
    except ValueError:
        return value


_NUMBERS: dict[str, type[float]] = {
    **dict.fromkeys(("temperature", "top_p", "frequency_penalty", "presence_penalty", "timeout"), float),
    **dict.fromkeys(("connect", "first_byte", "idle", "total"), float),
    **dict.fromkeys(("max_tokens", "max_retries", "top_k", "seed", "n"), int),
}
"""The settings that are numbers, of the configuration and of `Timeouts`."""


def _timeouts(table: Mapping[str, Any]) -> Timeouts:
    names = ("connect", "first_byte", "idle", "total")
    problems = unknown_settings(table, names, "timeout.")
    try:
        # None is no limit, and not the same as a limit that is left out.
        timeouts = Timeouts(**{name: _read(name, table[name]) for name in names if table.get(name, "") != ""})
    except ConfigError as error:
        problems += error.problems
    else:
        if not problems:
            return timeouts
    raise ConfigError.of(problems)


def identity_of(framework: str, url: object, config: LLMConfig | None) -> str:
    """Return what an answer depends on beside the request, without secrets: see `ProviderInfo.identity`.

    Args:
        url: the base URL that requests go to, or None if only the framework knows it.
    """
    found: list[object] = [framework, None if url is None else shown_url(str(url))]
    if config is not None:
        headers = sorted(public_headers(config.headers).items())
        found += [config.region, config.project, headers, sorted(config.quirks.items())]
    while found[-1] in (None, []):
        found.pop()
    return repr(found)
