"""Fixtures for the tests of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.terminals import Terminal


@pytest.fixture(autouse=True)
def log_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the log of chats, in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder / "fluxibly" / "logs.db"


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts a command at a terminal; see `start_at_terminal`. The command is killed after the test."""
    pytest.importorskip("pty")
    from support.terminals import start_at_terminal

    begun: list[Terminal] = []

    def start(*arguments: str, **options: str) -> Terminal:
        begun.append(start_at_terminal(*arguments, **options))
        return begun[-1]

    yield start
    for each in begun:
        if each.pid:
            os.kill(each.pid, 9)
            os.waitpid(each.pid, 0)
        os.close(each.fd)


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    """Return the path of a configuration file, which the test writes."""
    return tmp_path / "framework.yaml"
