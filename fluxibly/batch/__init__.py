"""Batches: files of prompts in, files of answers out, with a journal that outlives whatever stops them.

`_input.py` reads rows (of `_jsonl.py`, `_csv.py`, `_parquet.py`), `_journal.py` keeps what is done, `_lines.py` writes answers as
lines, `_finish.py` makes other outputs of them at the end (`_sinks.py`), and `_runner.py` has `Batch`, which asks the rows that have no
answer yet: by calls (`_asking.py`), or by batches of the provider (`_services.py`). Both write lines by `_line_writer.py`.
`_estimate.py` says what that would take, and `_trace.py` has the span of a batch.

Batches of the provider: `_provider_batches.py` has their settings and checks them. `_services.py` is the loop; `_control.py` ends it.
A row of the input (`_batch_rows.py`) is packed into an upload (`_packing.py`) and submitted (`_submitting.py`), if the service's queue
has room (`_queue.py`). If the submission is not answered, the batch is looked for (`_finding.py`). Once it has ended, its results are
collected (`_collecting.py`) and become lines (`_outcomes.py`). `_submissions.py` is the journal of all these steps.

Imports: llm, pipeline, middleware, dialects, http, data and their helpers. Imported by: `cli`.
"""

from fluxibly.batch._estimate import Estimate
from fluxibly.batch._finish import Output
from fluxibly.batch._input import Row, Source, open_input
from fluxibly.batch._provider_batches import ProviderBatches
from fluxibly.batch._runner import Batch, Report

__all__ = ["Batch", "Estimate", "Output", "ProviderBatches", "Report", "Row", "Source", "open_input"]
