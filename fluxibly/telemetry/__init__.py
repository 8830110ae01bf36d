"""Spans, metrics and captured content, by OpenTelemetry's conventions for generative AI; and an SDK in one line.

`semconv.py` is the table of names; `_spans.py`, `_metrics.py` and `_content.py` are the work of the middleware
`Tracing` and `Metrics`, which load them once there may be an SDK. `_arrivals.py`, `_sdk.py` and `semconv.py` import no
OpenTelemetry. Imports: `flow` and data. Imported by: `middleware`, `cli`.
"""

from fluxibly.telemetry._setup import Telemetry, setup

__all__ = ["Telemetry", "setup"]
