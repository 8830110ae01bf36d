"""The drivers: they carry out the effects that flows ask for, synchronously and asynchronously.

`stack.py` holds a provider, its middleware and a clock. `streams.py` has the drivers of streams; the drivers of whole calls
are the loops in `pipeline.py`. `stepping.py` raises errors in flows and closes flows, `diagnosis.py` names the middleware
that broke a rule. Imports: `flow`, data and its helpers. Imported by: `pipeline`, `stream`, `testing`.
"""
