"""Spans, metrics and captured content by OpenTelemetry's conventions for generative AI, and SDK setup in one line.

`semconv.py` is the table of names. `_spans.py`, `_attempts.py`, `_metrics.py` and `_content.py` do the work of the middleware
`Tracing` and `Metrics`, which load them only when an SDK may be set up. `_batches.py` has the span of a batch. `_claim.py` marks what is measured already. `_arrivals.py`, `_attributes.py`,
`_sdk.py` and `semconv.py` do not import OpenTelemetry. Imports: `flow`, data and its helpers. Imported by: `middleware`,
`batch`, `cli`.
"""

from fluxibly.telemetry._setup import Telemetry, setup

__all__ = ["Telemetry", "setup"]
