"""Batches: files of prompts in, files of answers out, with a journal that outlives whatever stops them.

`_input.py` reads rows (of `_jsonl.py`, `_csv.py`, `_parquet.py`), `_journal.py` keeps what is done, `_lines.py` writes answers as
lines, `_finish.py` makes other outputs of them at the end (`_sinks.py`), and `_runner.py` has `Batch`, which asks the rows that have no
answer yet: by calls (`_asking.py`), or by batches of the provider (`_services.py`, `_submissions.py`). `_estimate.py` says what that
would take, and `_trace.py` has the span of a batch.

Imports: llm, the loops of `llm.map`, data and its helpers. Imported by: `cli`.
"""

from fluxibly.batch._estimate import Estimate
from fluxibly.batch._finish import Output
from fluxibly.batch._input import Row, Source, open_input
from fluxibly.batch._provider_batches import ProviderBatches
from fluxibly.batch._runner import Batch, Report

__all__ = ["Batch", "Estimate", "Output", "ProviderBatches", "Report", "Row", "Source", "open_input"]
