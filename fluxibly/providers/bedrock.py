"""Providers for Amazon Bedrock, through its Converse API.

A bearer key authorizes the calls; without one, botocore finds AWS credentials and signs each call (SigV4). botocore is
imported only then.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import attrs

from fluxibly._extras import pip_install
from fluxibly.errors import AuthenticationError, ConfigError, ConnectionFailed
from fluxibly.providers.addresses import refuse_path, with_address
from fluxibly.providers.dialects import model_lists
from fluxibly.providers.dialects.anthropic import PREFILL
from fluxibly.providers.dialects.bedrock import ARN, BedrockCodec
from fluxibly.providers.dialects.codec import Service
from fluxibly.providers.dialects.errors import QUOTE_LENGTH
from fluxibly.providers.http import AsyncHTTPProvider, Authorizer, HTTPProvider, free_after_fork

if TYPE_CHECKING:
    import httpx
    from botocore.credentials import ReadOnlyCredentials

    from fluxibly.config import LLMConfig
    from fluxibly.errors import ProviderError
    from fluxibly.providers.http import Key

BEARER_VAR: Final = "AWS_BEARER_TOKEN_BEDROCK"
URL_VARS: Final = ("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", "AWS_ENDPOINT_URL")
"""The environment variables with the address, as for AWS's own clients."""
REGION_VARS: Final = ("AWS_REGION", "AWS_DEFAULT_REGION")
SIGNED: Final = ("host", "content-type")
"""The headers that are signed, besides those of AWS (`x-amz-…`). A proxy may change others."""

_REGION: Final = re.compile(r"[a-z]{2,5}(?:-[a-z]+)+-\d+")
_ENDPOINT: Final = re.compile(r"/model/.*|/converse(-stream)?/?$")
_HOST: Final = re.compile(rf"(?:^|\.)bedrock-runtime[^.]*\.({_REGION.pattern})\.")
"""An address of AWS that names its region. That of a VPC endpoint has a name of its own in front."""
_TEMPORARY: Final = re.compile(r"throttl|toomanyrequests|requestlimit|idpcommunication", re.IGNORECASE)
"""The codes of AWS's refusals that pass."""
_ON_THE_MACHINE: Final = ("container-role", "iam-role")
"""The services that give credentials to a container and to a machine, by botocore's names."""
_ORIGINS: Final[Mapping[str, str]] = {
    "env": "AWS_ACCESS_KEY_ID",
    "shared-credentials-file": "~/.aws/credentials",
    "config-file": "~/.aws/config",
}
"""Sources of credentials as users know them, by botocore's names."""
_MANDATORY: Final = 600.0
"""Seconds before credentials expire from which botocore no longer gives them out without renewing them."""
_DOMAINS: Final[Mapping[str, str]] = {
    "cn-": "amazonaws.com.cn",
    "eusc-": "amazonaws.eu",
    "us-iso-": "c2s.ic.gov",
    "us-isob-": "sc2s.sgov.gov",
    "us-isof-": "csp.hci.ic.gov",
    "eu-isoe-": "cloud.adc-e.uk",
}
"""The domains of AWS's partitions besides `amazonaws.com`, by the beginning of the region."""

SERVICE = Service(
    framework="bedrock",
    telemetry_name="aws.bedrock",
    base_url=None,
    env_var=BEARER_VAR,
    key_required=False,
    prefill=PREFILL,
    lists=model_lists.BEDROCK,
)


def region_of(config: LLMConfig) -> str | None:
    """Return the region of the calls; None if nothing names it.

    It is the region of the model's ARN, or the setting, or that of the address, of an environment variable, or of the AWS
    profile.

    Raises:
        ConfigError: the region is malformed, or the setting and the ARN differ.
    """
    found = ARN.match(config.model)
    named = None if found is None else found[1]
    if named and config.region and named != config.region:
        raise ConfigError(f"region: expected {named!r}, as in the model's ARN, got {config.region!r}")
    host = _HOST.search(urlsplit(config.api_base or "").hostname or "")
    region = (
        named
        or config.region
        or (host and host[1])
        or next((value for name in REGION_VARS if (value := os.environ.get(name, "").strip())), None)
        or _region_of_profile()
    )
    if region and _REGION.fullmatch(region) is None:
        raise ConfigError(f"region: expected the name of an AWS region, such as 'us-east-1', got {region!r}")
    return region or None


def _region_of_profile() -> str | None:
    if find_spec("botocore") is None:
        return None
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        return Session().get_config_variable("region")  # type: ignore[no-any-return]
    except BotoCoreError as error:
        raise ConfigError(f"the AWS profile cannot be read: {error}") from None


def _with_address(config: LLMConfig) -> LLMConfig:
    for variable in URL_VARS:
        config = with_address(config, variable)
    refuse_path(config, _ENDPOINT)
    return config


def _service_of(config: LLMConfig, region: str | None, *, signed: bool) -> Service:
    base_url = None
    if region is not None:
        domain = next((domain for start, domain in _DOMAINS.items() if region.startswith(start)), "amazonaws.com")
        base_url = f"https://bedrock-runtime.{region}.{domain}"
    elif config.api_base is None or signed:
        raise ConfigError(
            f"{SERVICE.framework} needs a region: set region in the config, {REGION_VARS[0]}, or a region in the AWS "
            "profile (which botocore reads)"
        )
    return attrs.evolve(SERVICE, base_url=base_url)


def _codec(config: LLMConfig, region: str | None) -> BedrockCodec:
    return BedrockCodec(region if config.api_base is None else None)


def _credentials(config: LLMConfig, region: str | None) -> AWSCredentials | None:
    """Return AWS credentials, unless a key or a header authorizes the calls.

    Raises:
        ConfigError: there is no key, and botocore is not installed.
    """
    if config.api_key or os.environ.get(BEARER_VAR) or "authorization" in map(str.lower, config.headers):
        return None
    if find_spec("botocore") is None:
        raise ConfigError(
            f"{SERVICE.framework} needs botocore for AWS credentials: {pip_install('bedrock')} (or set {BEARER_VAR}, or "
            "api_key in the config)"
        )
    return AWSCredentials(region or "")


class AWSCredentials:
    """The AWS credentials of this process, as botocore finds them: variables, profiles, roles, single sign-on."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._found: Any = None
        self._given: Key | None = None
        self._lock = threading.Lock()
        """Calls fetch one after another, also those of several event loops, and those that were cancelled meanwhile."""
        free_after_fork(self)

    def __repr__(self) -> str:
        return f"AWSCredentials({self._region!r})"

    def after_fork(self) -> None:
        """Begin anew in a forked process, if another thread was fetching: it is not there to release its locks."""
        if self._lock.locked():
            self._found, self._given, self._lock = None, None, threading.Lock()

    def obtain(self) -> Key:
        """Return the present credentials. Those that botocore does not renew itself are read again.

        Raises:
            AuthenticationError: there are no credentials, or they cannot be renewed.
            ConnectionFailed: the service that gives them cannot be reached.
        """
        with self._lock:
            try:
                found = self._find()
            except Exception as error:  # noqa: BLE001  # botocore lets through what a malformed file or answer leads to
                raise _failure(error) from None
            self._given = SigV4(found, self._region)
            return self._given

    def _find(self) -> ReadOnlyCredentials:
        from botocore.exceptions import NoCredentialsError
        from botocore.session import Session

        if not hasattr(self._found, "refresh_needed"):
            session = Session()
            session.set_config_variable("region", self._region)  # where roles are assumed, as by AWS's own clients
            self._found = session.get_credentials()
        found = None if self._found is None else self._found.get_frozen_credentials()
        if found is None or not found.access_key or not found.secret_key:
            raise NoCredentialsError
        for value in filter(None, (found.access_key, found.secret_key, found.token)):
            if not (value.isascii() and value.isprintable()):
                raise ValueError("expected printable ASCII characters in each of them")
        return found  # type: ignore[no-any-return]

    @property
    def origin(self) -> str:
        """Where the present credentials are from: a variable, a file, or a kind of source by botocore's name."""
        method: str = getattr(self._found, "method", None) or "AWS"
        return _ORIGINS.get(method, method)

    def is_fresh(self, key: Key) -> bool:
        """Whether credentials are the present ones, and botocore would not renew them now.

        While another call renews them, they are fresh until botocore would insist on new ones.
        """
        if key != self._given:
            return False
        needed = getattr(self._found, "refresh_needed", None)
        return needed is None or not needed() or (self._lock.locked() and not needed(_MANDATORY))


def _failure(error: Exception) -> ProviderError:
    """Return the error of a call for which botocore gives no credentials."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.NoCredentialsError):
        return AuthenticationError(
            f"{SERVICE.framework} found no AWS credentials: set {BEARER_VAR}, or configure credentials as for AWS's own "
            "clients (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, a role, single sign-on)",
            provider=SERVICE.framework,
        )
    own = isinstance(error, (exceptions.BotoCoreError, exceptions.ClientError))
    said = str(error) if own else f"{type(error).__name__}: {error}"
    if isinstance(error, ResponseParserError):
        said = said.partition(":\n")[0]  # the rest is the answer, credentials included
    said = shorten(said, QUOTE_LENGTH, placeholder="…")
    if isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError)):
        return ConnectionFailed(f"the AWS credentials cannot be fetched: {said}", provider=SERVICE.framework)
    return AuthenticationError(
        f"the AWS credentials cannot be used: {said}", provider=SERVICE.framework, retryable=_is_temporary(error)
    )


def _is_temporary(error: Exception) -> bool:
    """Whether a service that gives credentials failed, or refused them for now."""
    from botocore.exceptions import ClientError, CredentialRetrievalError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        return status >= 500 or status == 429 or _TEMPORARY.search(code) is not None
    # botocore gives no reason of theirs; it too tries again, whatever the reason.
    return isinstance(error, CredentialRetrievalError) and error.kwargs.get("provider") in _ON_THE_MACHINE


@attrs.frozen
class SigV4(Authorizer):
    """AWS credentials that sign requests to Bedrock in a region (Signature Version 4)."""

    name = "AWS credentials"
    credentials: ReadOnlyCredentials = attrs.field(repr=False)
    region: str

    @property
    def secrets(self) -> tuple[str, ...]:
        found = self.credentials
        return tuple(filter(None, (found.access_key, found.secret_key, found.token)))

    def authorize(
        self, url: str, headers: Mapping[str, str], body: bytes, *, method: str = "POST"
    ) -> Mapping[str, str]:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        token = self.credentials.token
        added = {"x-amz-date": now} | ({"x-amz-security-token": token} if token else {})
        signed = {name: value for name, value in headers.items() if name in SIGNED or name.startswith("x-amz-")} | added
        request = AWSRequest(method, url, headers=signed, data=body)
        request.context["timestamp"] = now
        auth = SigV4Auth(self.credentials, "bedrock", self.region)
        # `add_auth` would log the token.
        signature = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        names = auth.signed_headers(auth.headers_to_sign(request))
        value = f"AWS4-HMAC-SHA256 Credential={auth.scope(request)}, SignedHeaders={names}, Signature={signature}"
        return {**added, "authorization": value}


class BedrockProvider(HTTPProvider):
    """Provider for Amazon Bedrock: any model that its Converse API serves.

    A bearer key (`api_key`, or AWS_BEARER_TOKEN_BEDROCK) authorizes the calls. Without it they are signed with the AWS
    credentials that botocore finds. The region is that of the model's ARN, or `region`, or AWS_REGION, or that of the
    AWS profile.

    Raises:
        ConfigError: the region is unknown; or there is no key, and botocore is not installed.
    """

    def __init__(self, config: LLMConfig, *, transport: httpx.BaseTransport | None = None) -> None:
        config = _with_address(config)
        region = region_of(config)
        credentials = _credentials(config, region)
        service = _service_of(config, region, signed=credentials is not None)
        super().__init__(_codec(config, region), service, config, transport=transport, credentials=credentials)


class AsyncBedrockProvider(AsyncHTTPProvider):
    """Asynchronous variant of `BedrockProvider`."""

    def __init__(self, config: LLMConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        config = _with_address(config)
        region = region_of(config)
        credentials = _credentials(config, region)
        service = _service_of(config, region, signed=credentials is not None)
        super().__init__(_codec(config, region), service, config, transport=transport, credentials=credentials)
