"""Batches: files of prompts in, files of answers out, with a journal that outlives whatever stops them.

`_input.py` reads rows (of `_jsonl.py`, `_csv.py`, `_parquet.py`), `_journal.py` keeps what is done, `_lines.py` writes answers as
lines, and `_finish.py` makes other outputs of them at the end (`_sinks.py`). `_runner.py` has `Batch`, which asks the rows that have no
answer yet: by calls (`_asking.py`, with the layers that `_stack.py` adds), or by batches of the provider (`_services.py`,
`_submissions.py`). `_patience.py` decides what happens to rows while a service is out, `_repeats.py` asks equal rows once, `_state.py`
notices what has changed since an earlier run, `_estimate.py` says what a batch would take, and `_trace.py` has its span.

Imports: llm, the loops of `llm.map`, data and its helpers. Imported by: `cli`.
"""

from fluxibly.batch._estimate import Estimate
from fluxibly.batch._finish import Output
from fluxibly.batch._input import Row, Source, open_input
from fluxibly.batch._runner import Batch, Report
from fluxibly.batch._services import ProviderBatches

__all__ = ["Batch", "Estimate", "Output", "ProviderBatches", "Report", "Row", "Source", "open_input"]
