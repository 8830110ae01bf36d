"""The optional packages, by the extra that brings them, and the command that installs those that are missing.

The command names packages, never this project: a distribution called `fluxibly` on the public index is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "cli": (
        "rich",
        "typer",
        "platformdirs",
        "python-dotenv",
        "prompt_toolkit",
        "markdown-it-py",
        "jsonschema",
    ),
    "serve": ("starlette", "uvicorn"),
    "otel": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
    "local": ("xllamacpp",),
    "langchain": ("langchain", "langchain-openai", "langchain-anthropic"),
    "litellm": ("litellm[mcp]",),
    "bedrock": ("botocore",),
    "vertex": ("google-auth[requests]",),
    "schema": ("jsonschema",),
    "brotli": ("brotli",),
    "prices": ("genai-prices",),
    "redis": ("redis",),
    "tables": ("pyarrow",),
}


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package.partition("[")[0])
    except PackageNotFoundError:
        return None


def pip_install(*extras: str) -> str:
    """Return the command that installs every missing package of these extras."""
    import shlex

    packages = [package for extra in extras for package in EXTRAS[extra]]
    missing = [package for package in packages if version_of(package) is None]
    return shlex.join(["pip", "install", *(missing or packages)])  # all of them, where one is there but broken
