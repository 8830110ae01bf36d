"""A meter provider for tests, and the attributes that calls of `tracing_tools` are measured with."""

from __future__ import annotations

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from fluxibly.middleware import Metrics

WHO = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "m-1",
    "gen_ai.response.model": "m-1-2026",
    "server.address": "api.test",
    "server.port": 443,
}


class Meters:
    """A meter provider, and a reader of its metrics."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def metrics(self, **options) -> Metrics:
        return Metrics(meter_provider=self.provider, **options)

    def read(self):
        """Return the metrics by name."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {m.name: m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics}

    def points(self):
        """Return the data points by the metric's name."""
        return {name: list(metric.data.data_points) for name, metric in self.read().items()}
