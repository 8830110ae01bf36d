"""The environment variables from which the vendors' own clients take a service's address."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import attrs

from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from fluxibly.config import LLMConfig


def address_in_environment(variable: str, path: str = "") -> str | None:
    """Return the base URL in an environment variable; None if it is unset or empty.

    `path` is the path that the vendor's client appends to an address. It is appended here too, unless the address ends
    with it.

    Raises:
        ConfigError: the variable does not hold an HTTP URL.
    """
    address = os.environ.get(variable, "").strip().rstrip("/")
    if not address:
        return None
    url = urlsplit(address)
    if url.scheme.lower() not in ("http", "https") or not url.netloc:
        raise ConfigError(f"{variable}: expected an http:// or https:// URL")  # the value may hold a password
    return address if url.path.endswith(path) or url.query else address + path


def with_address(config: LLMConfig, variable: str | None, path: str = "") -> LLMConfig:
    """Return `config` with the address that `variable` holds as `api_base`, unless `config` has an `api_base`.

    Raises:
        ConfigError: the variable does not hold an HTTP URL.
    """
    if config.api_base is not None or variable is None:
        return config
    address = address_in_environment(variable, path)
    if address is None:
        return config
    try:
        return attrs.evolve(config, api_base=address)
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None


def refuse_path(config: LLMConfig, endpoint: re.Pattern[str]) -> None:
    """Raise ConfigError if `api_base` contains the path of an `endpoint`, which the codec appends to the address."""
    found = endpoint.search(urlsplit(config.api_base or "").path)
    if found is not None:
        raise ConfigError(f"api_base: expected the address without {found[0]}, which is appended to it")
