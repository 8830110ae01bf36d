"""The commands of the console script, a module each. `app.py` has their application and its exit status."""

from fluxibly.cli.commands import batch, chat, inspect, logs, models, serve, trace
from fluxibly.cli.commands.app import app, run

__all__ = ["app", "batch", "chat", "inspect", "logs", "models", "run", "serve", "trace"]
