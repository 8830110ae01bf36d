"""Fixtures for the tests of spans."""

from __future__ import annotations

import pytest
from support.tracing_tools import Recorder

from fluxibly._logs import forget_reports


@pytest.fixture
def recorder():
    forget_reports()
    return Recorder()


@pytest.fixture
def no_complaints(caplog):
    """Check that OpenTelemetry never logs that a context could not be detached."""
    yield
    assert not [record for record in caplog.records if "detach" in record.getMessage()]
