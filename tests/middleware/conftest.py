"""Fixtures for the tests of middleware."""

from __future__ import annotations

import pytest

from fluxibly._logs import forget_reports
from fluxibly.testing.modes import MODES, Mode


@pytest.fixture(autouse=True)
def own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards which functions a test has registered."""
    monkeypatch.setattr("fluxibly.functions._functions", {})


@pytest.fixture(params=[MODES[0], MODES[-1]], ids=lambda mode: f"then {mode}")
def later(request: pytest.FixtureRequest) -> Mode:
    """The mode of a later call: whole, or a stream."""
    mode: Mode = request.param
    return mode


@pytest.fixture
def file(tmp_path):
    """The file of a recording."""
    return tmp_path / "answers.jsonl"


@pytest.fixture
def reports(capsys):
    """Return a function that returns what was reported on stderr since the last call."""
    forget_reports()
    yield lambda: capsys.readouterr().err
    forget_reports()
