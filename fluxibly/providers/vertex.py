"""Providers for Vertex AI: Google's models and Claude, in a project of Google Cloud.

google-auth finds credentials and renews their tokens. It is imported only if no key or token is given.
"""

from __future__ import annotations

import os
import re
from textwrap import shorten
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import attrs
import httpx

from fluxibly._checks import kind_of
from fluxibly._extras import pip_install
from fluxibly.errors import AuthenticationError, ConfigError, ConnectionFailed, RequestTimeout
from fluxibly.providers.addresses import refuse_path, with_address
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.anthropic import PREFILL
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.dialects.errors import QUOTE_LENGTH
from fluxibly.providers.dialects.json_values import as_text
from fluxibly.providers.dialects.vertex import PLACED, VertexCodec
from fluxibly.providers.http import AsyncHTTPProvider, Authorizer, HTTPProvider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fluxibly.config import LLMConfig
    from fluxibly.errors import ProviderError
    from fluxibly.providers.http import Key

PROJECT_VARS: Final = ("GOOGLE_CLOUD_PROJECT", "ANTHROPIC_VERTEX_PROJECT_ID")
REGION_VARS: Final = ("GOOGLE_CLOUD_LOCATION", "CLOUD_ML_REGION")
URL_VAR: Final = "GOOGLE_VERTEX_BASE_URL"
KEY_VAR: Final = "GOOGLE_API_KEY"
"""The environment variable with an API key, which is followed if no project is set, as by Google's own client."""
FILE_VAR: Final = "GOOGLE_APPLICATION_CREDENTIALS"
"""The environment variable with the path of a file with credentials."""
SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"
FETCH_TIMEOUT: Final = 30.0
"""Seconds to wait for each answer of the service that gives tokens, unless the configuration's limits are lower."""
GLOBAL_URL: Final = "https://aiplatform.googleapis.com"
QUOTA_HEADER: Final = "x-goog-user-project"

_API_KEY: Final = re.compile(r"AIza|AQ\.")
"""The beginning of API keys. Other keys are tokens."""
_PROJECT: Final = re.compile(r"[a-z0-9][a-z0-9:.-]*")
"""A project's id or number. An old id may begin with a domain: "example.com:harbour"."""
_REGION: Final = re.compile(r"[a-z][a-z0-9-]*")
_ENDPOINT: Final = re.compile(r"/(projects|publishers|endpoints)/.*")
_VERSION: Final = re.compile(r"/v\d+\w*/?(?:\?|$)")

SERVICE = Service(
    framework="vertex",
    telemetry_name="gcp.vertex_ai",
    base_url=GLOBAL_URL,
    key_required=False,
    other_auth_headers=("x-goog-api-key",),
    prefill=PREFILL,
    lists=model_lists.VERTEX,
)


def _setup(config: LLMConfig) -> tuple[VertexCodec, Service, LLMConfig, GoogleCredentials | None]:
    """Return the parts of a provider.

    Raises:
        ConfigError: the project or the region is malformed or missing, or google-auth is not installed.
        AuthenticationError: there are no credentials to take the project from.
    """
    config = with_address(config, URL_VAR)
    refuse_path(config, _ENDPOINT)
    authorized = not {"authorization", "x-goog-api-key"}.isdisjoint(map(str.lower, config.headers))
    unset = not config.api_key and not authorized
    keyed = not authorized and _API_KEY.match(config.fixed_key or "") is not None
    project, region = _place(config, variables=not keyed)
    keyed = keyed or (unset and not project and bool(os.environ.get(KEY_VAR)))
    parent, service, credentials = None, SERVICE, None
    if keyed:
        service = attrs.evolve(service, env_var=KEY_VAR, auth_header="x-goog-api-key", auth_prefix="")
    elif unset:
        times = config.timeouts
        limits = [limit for limit in (times.first_byte, times.total) if limit is not None]
        credentials = GoogleCredentials(min(FETCH_TIMEOUT, *limits))
        project = project or _checked("the project of the Google credentials", credentials.project, _PROJECT)
    if project:
        parent = f"projects/{project}/locations/{region}"
        service = attrs.evolve(service, base_url=_base_url(region))
    elif not keyed or region != "global":
        also = f" besides the API key, for the region {region!r}" if keyed else ""
        raise ConfigError(f"{SERVICE.framework} needs a project{also}: set project in the config, or {PROJECT_VARS[0]}")
    versioned = _VERSION.search(config.api_base or "") is not None
    codec = VertexCodec(parent, versioned=versioned, region=region if config.api_base is None else None)
    return codec, service, config, credentials


def _place(config: LLMConfig, *, variables: bool) -> tuple[str, str]:
    """Return the project, or "" if nothing names it, and the region.

    Google's own client too gives an API key in the code precedence over the `variables`.

    Raises:
        ConfigError: the project or the region is malformed.
    """
    placed = PLACED.fullmatch(config.model)
    projects = {"project": config.project, "model": placed and placed["project"]}
    regions = {"region": config.region, "model": placed and placed["region"]}
    if variables:
        projects |= {name: os.environ.get(name, "").strip() for name in PROJECT_VARS}
        regions |= {name: os.environ.get(name, "").strip() for name in REGION_VARS}
    return _first(projects, _PROJECT), _first(regions, _REGION) or "global"


def _first(values: Mapping[str, str | None], valid: re.Pattern[str]) -> str:
    """Return the first value that is set, or "". `values` have the names of the settings that hold them."""
    name, value = next(((name, value) for name, value in values.items() if value), ("", ""))
    return _checked(name, value, valid)


def _checked(name: str, value: str, valid: re.Pattern[str]) -> str:
    if value and valid.fullmatch(value) is None:
        raise ConfigError(f"{name}: expected small letters, digits and hyphens, got {value!r}")
    return value


def _base_url(region: str) -> str:
    if region == "global":
        return GLOBAL_URL
    if region in ("us", "eu"):  # several regions at once
        return f"https://aiplatform.{region}.rep.googleapis.com"
    return f"https://{region}-aiplatform.googleapis.com"


class GoogleCredentials:
    """The application default credentials of this process, as google-auth finds them.

    Args:
        timeout: the seconds to wait for each answer of the service that gives tokens.

    Raises:
        ConfigError: google-auth is not installed.
    """

    def __init__(self, timeout: float = FETCH_TIMEOUT) -> None:
        self._timeout = timeout
        try:
            import google.auth
        except ImportError:
            raise ConfigError(
                f"{SERVICE.framework} needs Google credentials, and so google-auth: {pip_install('vertex')} (or give an "
                "API key or a token as api_key)"
            ) from None
        self._library: Any = google.auth  # it is typed in part only
        self._found: Any = None
        self._project: object = None

    @property
    def project(self) -> str:
        """The project of the credentials; "" if they have none.

        Raises:
            AuthenticationError: there are no credentials.
        """
        self._find()
        return as_text(self._project)

    @property
    def origin(self) -> str:
        """Where the credentials are from: a variable, or a source in words."""
        if os.environ.get(FILE_VAR):
            return FILE_VAR
        on_machine = "compute_engine" in type(self._find()).__module__
        return "the metadata server" if on_machine else "gcloud auth application-default login"

    def _find(self) -> Any:
        if self._found is None:
            try:
                self._found, self._project = self._library.default(scopes=[SCOPE])
            except Exception as error:  # noqa: BLE001  # google-auth lets through what a malformed file leads to
                raise AuthenticationError(
                    f"{SERVICE.framework} found no Google credentials: {_said(error)} (Or give an API key or a token as "
                    "api_key.)",
                    provider=SERVICE.framework,
                ) from None
        return self._found

    def obtain(self) -> Key:
        """Return a new token.

        Raises:
            AuthenticationError: there are no credentials, or they do not give a token.
            ConnectionFailed, RequestTimeout: the service that gives tokens cannot be reached, or does not answer.
        """
        found = self._find()
        try:
            with httpx.Client() as client:
                found.refresh(_fetching(client, self._timeout))
            return Token(_token(found.token), as_text(getattr(found, "quota_project_id", None)))
        except Exception as error:  # noqa: BLE001  # google-auth lets through what a malformed answer leads to
            raise _failure(error, found) from None

    def is_fresh(self, key: Key) -> bool:
        """Whether a token is the newest one, and valid for some minutes more."""
        return isinstance(key, Token) and key.token == self._found.token and bool(self._found.valid)


def _token(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a non-empty str as the token, got {kind_of(value)}")
    return value


def _failure(error: Exception, credentials: Any) -> ProviderError:
    """Return the error of a call for which no token could be fetched."""
    said = _said(error, [as_text(getattr(credentials, name, None)) for name in ("refresh_token", "client_secret")])
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, httpx.HTTPError):
            kind = RequestTimeout if isinstance(cause, httpx.TimeoutException) else ConnectionFailed
            return kind(f"the token of Google cannot be fetched: {said}", provider=SERVICE.framework)
        cause = cause.__cause__
    return AuthenticationError(
        f"the Google credentials give no token: {said}",
        provider=SERVICE.framework,
        retryable=bool(getattr(error, "retryable", False)),
    )


def _said(error: Exception, secrets: Iterable[str] = ()) -> str:
    """Return what went wrong, without `secrets`, which the service may quote."""
    from google.auth.exceptions import GoogleAuthError

    if isinstance(error, GoogleAuthError) and error.args:
        said = str(error.args[0])  # the other arguments hold the whole answer, tokens included
    else:
        said = f"{type(error).__name__}: {error}"
    for secret in filter(None, secrets):
        said = said.replace(secret, "***")
    return shorten(said, QUOTE_LENGTH, placeholder="…")


def _fetching(client: httpx.Client, longest: float) -> Callable[..., object]:
    """Return the function with which google-auth makes its HTTP requests. `longest` limits each wait, in seconds."""
    from google.auth.exceptions import TransportError

    failure: Any = TransportError  # it is not typed

    def fetch(
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **_: object,
    ) -> object:
        try:
            answer = client.request(
                method, url, content=body, headers=headers, timeout=min(timeout or longest, longest)
            )
        except httpx.HTTPError as error:
            raise failure(f"{type(error).__name__}: {error} ({url.partition('?')[0]})") from error
        return SimpleNamespace(status=answer.status_code, headers=answer.headers, data=answer.content)

    return fetch


@attrs.frozen
class Token(Authorizer):
    """An access token of Google's, and the project whose quota it uses; "" if that is the called project."""

    name = "Google credentials"
    token: str = attrs.field(repr=False)
    quota_project: str = ""

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.token,)

    def authorize(
        self, url: str, headers: Mapping[str, str], body: bytes, *, method: str = "POST"
    ) -> Mapping[str, str]:
        more = {QUOTA_HEADER: self.quota_project} if self.quota_project and QUOTA_HEADER not in headers else {}
        return {"authorization": f"Bearer {self.token}", **more}


class VertexProvider(HTTPProvider):
    """Provider for Vertex AI: Gemini and other models of Google's, Claude, and endpoints with models of your own.

    The model is a name ("gemini-2.5-flash", "claude-sonnet-4-5@20250929"), or a path that begins with "publishers/",
    "endpoints/" or "projects/". `project` and `region` say where it runs. `api_key` is an API key or an access token;
    without it, google-auth finds credentials.

    Raises:
        ConfigError: the project is unknown; or there is no key, and google-auth is not installed.
        AuthenticationError: there are no credentials.
    """

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        codec, service, config, credentials = _setup(config)
        super().__init__(codec, service, config, transport=transport, credentials=credentials)


class AsyncVertexProvider(AsyncHTTPProvider):
    """Asynchronous variant of `VertexProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        codec, service, config, credentials = _setup(config)
        super().__init__(codec, service, config, transport=transport, credentials=credentials)
