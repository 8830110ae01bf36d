"""Spans for the command line: kept to be shown, and sent to a file or a backend if asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fluxibly.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan


class Recorder:
    """Records nothing: what there is without the OpenTelemetry SDK. See `cli_sdk` for the other kind."""

    def take(self) -> Sequence[ReadableSpan]:
        """The spans that ended since the last time."""
        return ()

    def close(self) -> str | None:
        """Send what is left; what went wrong with it, if anything did."""
        return None


def recorder(file: Path | None = None, otlp: str | None = None, *, keep: bool = True) -> Recorder:
    """A recorder of the spans of this process, where the OpenTelemetry SDK is installed.

    Args:
        keep: whether anyone will `take` them.
        file: where to write them too, as OTLP JSON lines.
        otlp: the address of a backend, to which they are sent as OTLP over HTTP.

    Raises:
        ConfigError: the extra for it is missing, the file cannot be written, or the address is none.
    """
    if not keep and file is None and otlp is None:
        return Recorder()
    if all(map(_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"))):
        from fluxibly.cli_sdk import SDKRecorder

        return SDKRecorder(file, otlp)
    if file is not None or otlp is not None:
        raise ConfigError("--trace and --otlp need an extra: pip install 'fluxibly[otel]'")
    return Recorder()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
