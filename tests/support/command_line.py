"""The command line in this process: fast, in an environment without keys, with a home and a cache of its own."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from opentelemetry.util._once import Once

from fluxibly._plugins import entry_points

OTHERS = re.compile("API_KEY|_TOKEN|_BASE_URL|_ENDPOINT|AWS_|GOOGLE_|OLLAMA|FLUXIBLY|COLOR|XDG_")
"""The variables that would change what the commands find."""


class Ran(NamedTuple):
    """What a command has printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class CommandLine:
    """Runs commands. `home` is the folder of the user, with the cache in it."""

    def __init__(self, home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self._capfd = capfd
        self._monkeypatch = monkeypatch

    @property
    def cache(self) -> Path:
        """The folder with the lists of models."""
        return self.home / "cache" / "models"

    def set(self, **variables: str) -> None:
        """Set environment variables for the commands that follow."""
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)

    def __call__(self, *arguments: str) -> Ran:
        from fluxibly.cli.commands import run

        self._capfd.readouterr()
        status = run(arguments)
        return Ran(status, *self._capfd.readouterr())

    def at_terminal(self, *arguments: str, columns: int = 80) -> Ran:
        """Run a command as if a person read its output, in a terminal of that width. Colours and trailing spaces are left out."""
        with self._monkeypatch.context() as patches:
            patches.setenv("COLUMNS", str(columns))
            patches.setattr("sys.stdout.isatty", lambda: True)
            status, out, err = self(*arguments)
        return Ran(status, re.sub(r" +$", "", re.sub(r"\x1b\[[0-9;]*m", "", out), flags=re.MULTILINE), err)


@contextmanager
def command_line(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CommandLine]:
    """Make a command line that finds the packages in `home`, and undo afterwards what its commands leave in this process."""
    from fluxibly.cli import environment

    for name in filter(OTHERS.search, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FLUXIBLY_CACHE", str(home / "cache"))
    monkeypatch.setattr(environment, "_from_files", {})
    monkeypatch.setattr("sys.stdin", io.StringIO())
    # `chat` sets the provider of spans of this process, which can be done once.
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", None)
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER_SET_ONCE", Once())
    monkeypatch.syspath_prepend(str(home))
    variables, modules = set(os.environ), set(sys.modules)
    loggers = [logging.getLogger(name) for name in ("fluxibly", "opentelemetry")]
    before = [(each.level, each.propagate, list(each.handlers)) for each in loggers]
    entry_points.cache_clear()
    try:
        yield CommandLine(home, capfd, monkeypatch)
    finally:
        entry_points.cache_clear()
        for each, (level, propagate, handlers) in zip(loggers, before, strict=True):
            each.setLevel(level)
            each.propagate = propagate
            each.handlers[:] = handlers
        for name in set(os.environ) - variables:
            del os.environ[name]
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(home)):
                del sys.modules[name]
