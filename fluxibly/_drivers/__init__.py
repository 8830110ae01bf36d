"""The drivers: they carry out the effects that flows ask for, synchronously and asynchronously.

`stack.py` is what they drive (provider, middleware, clock), `streams.py` has the drivers of streams; those of whole
calls are the loops in `pipeline.py`. `stepping.py` throws into flows and closes them, `diagnosis.py` names the
middleware that broke a rule. Imports: `flow` and data. Imported by: `pipeline`, `stream`, `testing`.
"""
