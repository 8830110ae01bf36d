"""The commands of the console script, a module each. `app.py` has their application and its exit status."""

from fluxibly.cli.commands import chat, inspect, logs, models, trace
from fluxibly.cli.commands.app import app, run

__all__ = ["app", "chat", "inspect", "logs", "models", "run", "trace"]
