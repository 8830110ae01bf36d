"""The command `fluxibly batch`: a file of prompts in, a file of answers out.

`settings.py` reads the options, `running.py` runs a batch until it ends or has to stop, `progress.py` says how far it is and
`display.py` shows that, `ending.py` has the last lines and the exit status, and `dry_run.py` the figures of a batch that was not run.
"""

from fluxibly.cli.batch.dry_run import estimated, show_estimate
from fluxibly.cli.batch.ending import Ending
from fluxibly.cli.batch.running import run

__all__ = ["Ending", "estimated", "run", "show_estimate"]
