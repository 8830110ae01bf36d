"""Fixtures for the tests of middleware."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards which functions a test has registered."""
    monkeypatch.setattr("fluxibly.functions._functions", {})
