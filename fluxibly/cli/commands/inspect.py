"""The commands that inspect the configuration and the installation: `explain`, `frameworks` and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from fluxibly.cli.commands.app import app, examples
from fluxibly.cli.commands.options import ConfigFile, EnvFile, Framework, Model, config_of
from fluxibly.cli.screen import Screen


@app.command(
    short_help="Print the stack that would run, and warnings of orders that hurt.",
    epilog=examples("fluxibly explain", "fluxibly explain --config stack.yaml --strict"),
)
def explain(  # noqa: PLR0917  # typer reads the options from the parameters
    config: ConfigFile = None,
    framework: Framework = None,
    model: Model = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an order of the layers hurts.")] = False,
    mermaid: Annotated[
        bool, typer.Option("--mermaid", help="Print a flowchart in Mermaid's language instead.")
    ] = False,
    env_file: EnvFile = None,
) -> None:
    """Print the stack that would run: what each layer does, the worst case of a call, and warnings of orders that hurt."""
    from fluxibly.cli.inspect import explained

    explanation = explained(config_of(config, framework, model))
    screen = Screen()
    screen.lines(explanation.mermaid() if mermaid else str(explanation))
    if strict:
        explanation.check()


@app.command(
    short_help="List the frameworks, and what each one needs.",
    epilog=examples("fluxibly frameworks", "fluxibly frameworks --all"),
)
def frameworks(
    everything: Annotated[bool, typer.Option("--all", help="Say of each what it needs.")] = False,
    env_file: EnvFile = None,
) -> None:
    """List the registered frameworks: whether each is ready, and which package or key is missing."""
    from fluxibly.cli.inspect import show_frameworks

    show_frameworks(Screen(), everything=everything)


@app.command(
    short_help="Check versions, keys and endpoints.",
    epilog=examples("fluxibly doctor", "fluxibly doctor -m openai:gpt-4o-mini"),
)
def doctor(
    config: ConfigFile = None, framework: Framework = None, model: Model = None, env_file: EnvFile = None
) -> int:
    """Check versions, keys and endpoints, and say how to fix problems."""
    from fluxibly.cli.doctor import examine

    settings = config_of(config, framework, model) if config or framework or model else None
    return examine(Screen(), settings, file=config)
