"""The spans of a chat, and the packages that a chat needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from fluxibly._extras import pip_install
from fluxibly.errors import ConfigError
from fluxibly.registry import find_framework

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan


def check_installed(framework: str, *, spans: bool) -> None:
    """Check that the packages for a chat are installed. `spans`: whether spans go to a file or a backend.

    Raises:
        FrameworkNotRegistered: there is no such framework.
        ConfigError: packages are missing; the message has one command that installs them all.
    """
    found = find_framework(framework)
    if not spans or _sdk_installed():
        return  # the registry reports the packages that the framework alone lacks
    extras, who = ["otel"], "--trace and --otlp"
    if found.extra is not None and not found.installed:
        extras, who = [found.extra, *extras], f"the framework {framework!r}, {who}"
    raise ConfigError(f"{who} need packages that are not installed: {pip_install(*extras)}")


class Recorder(Protocol):
    """A recorder of the spans of this process, which are shown under an answer."""

    def take(self) -> Sequence[ReadableSpan]:
        """Return the spans that ended since the last call."""
        ...

    def close(self) -> str | None:
        """Export the remaining spans. Return a description of the failure, or None."""
        ...


class _NoRecorder:
    """A recorder that keeps no spans, because none are wanted or the OpenTelemetry SDK is not installed."""

    def take(self) -> Sequence[ReadableSpan]:
        return ()

    def close(self) -> str | None:
        return None


def recorder(file: Path | None = None, otlp: str | None = None, *, keep: bool = True) -> Recorder:
    """Return a recorder of the spans of this process. Without the OpenTelemetry SDK, it records nothing.

    Args:
        keep: whether the caller will `take` the spans.
        file: a file to write the spans to as well, as OTLP JSON lines.
        otlp: the URL of a backend to send the spans to, as OTLP over HTTP.

    Raises:
        ConfigError: the file cannot be written, or `otlp` is not an http:// or https:// URL.
    """
    wanted = keep or file is not None or otlp is not None
    if not wanted or not _sdk_installed():
        return _NoRecorder()
    from fluxibly.cli.spans import SDKRecorder

    return SDKRecorder(file, otlp)


def _sdk_installed() -> bool:
    return all(map(_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed either
        return False
