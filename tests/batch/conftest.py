"""Fixtures for the tests of batches."""

from __future__ import annotations

import pytest

from fluxibly import registry


@pytest.fixture(autouse=True)
def own_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget after each test which frameworks it has registered."""
    monkeypatch.setattr(registry, "_frameworks", {**registry._frameworks})
