"""The command `batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import attrs
import typer

from fluxibly.cli.commands.app import OK, app, examples
from fluxibly.cli.commands.options import (
    ConfigFile,
    EnvFile,
    Framework,
    LogLevel,
    Model,
    PairsCommand,
    Parameter,
    config_of,
    log_to,
)
from fluxibly.cli.screen import Screen
from fluxibly.errors import ConfigError

_HELP = examples(
    "fluxibly batch prompts.jsonl --out answers.jsonl --config stack.yaml",
    'fluxibly batch titles.csv --template "Summarise: {title}" --out answers.parquet -m openai:gpt-4o-mini',
    "fluxibly batch prompts.jsonl --out answers.jsonl --rpm 3000 --tpm 1M --budget 20",
    "fluxibly batch prompts.jsonl --out answers.jsonl --dry-run       # rows, tokens, cost, hours; sends nothing",
    "fluxibly batch prompts.jsonl --out answers.jsonl --retry-errors  # again, and only what failed",
    "fluxibly batch prompts.jsonl --out answers.jsonl --executor provider  # at half the price, within a day",
)


@app.command(cls=PairsCommand, epilog=_HELP)
def batch(  # noqa: PLR0917  # typer reads the options from the parameters
    context: typer.Context,
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A file of prompts: JSON lines (also those of OpenAI's batches), CSV or Parquet; - is standard input.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="OUT", help="The file for the answers. A row that has one is not asked again.")
    ],
    config: ConfigFile = None,
    model: Model = None,
    framework: Framework = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="Instructions for the model, before each prompt without any.")
    ] = None,
    option: Parameter = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="The column with the prompts.")] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT|@FILE", help='A prompt with columns in it, such as "Summarise: {title}".'),
    ] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N|auto", help="The most calls at once; auto finds it by latency.")
    ] = "auto",
    rpm: Annotated[
        str | None, typer.Option(metavar="N", help="The most requests a minute, such as 3000 or 50k; else it is found.")
    ] = None,
    tpm: Annotated[str | None, typer.Option(metavar="N", help="The most tokens a minute, such as 1M.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N rows.")] = None,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Ask equal requests only once.")] = False,
    budget: Annotated[str | None, typer.Option(metavar="DOLLARS", help="Stop when this run has spent so much.")] = None,
    stop_after_errors: Annotated[
        int, typer.Option(min=0, metavar="N", help="Stop if the first N rows all fail alike; 0: never.")
    ] = 20,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask what failed again.")] = False,
    changed: Annotated[
        Literal["keep", "ask"] | None,
        typer.Option(
            help="If the input or the configuration has changed: keep the answers, or ask what changed again."
        ),
    ] = None,
    executor: Annotated[
        Literal["online", "provider"],
        typer.Option(help="Call by call, or by the provider's own batches: half the price, within a day."),
    ] = "online",
    then: Annotated[
        Literal["online"] | None,
        typer.Option(help="Ask what the provider's batches have not answered call by call."),
    ] = None,
    cancel: Annotated[
        bool,
        typer.Option("--cancel", help="Cancel the provider's batches, and keep what they have answered."),
    ] = False,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="In the order of the input; by default, as answers come.")
    ] = False,
    errors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file for the errors; by default they are lines of OUT.")
    ] = None,
    output_format: Annotated[
        Literal["openai"] | None, typer.Option("--format", help="Lines as OpenAI's batches return them.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take: rows, tokens, cost, hours. Sends nothing.")
    ] = False,
    trace: Annotated[Path | None, typer.Option(help="A file to write the spans to, as OTLP JSON lines.")] = None,
    otlp: Annotated[str | None, typer.Option(metavar="URL", help="A backend to send the spans to, over HTTP.")] = None,
    one_trace: Annotated[
        bool,
        typer.Option("--one-trace", help="All calls in one trace; by default each has one, linked to the batch's."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, for scripts.")] = False,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="The lowest level to log on standard error; by default, critical.")
    ] = None,
    env_file: EnvFile = None,
) -> int:
    """Ask a model for each row of a file; run it again to go on.

    Ctrl-C stops it when what is in flight has ended; twice, at once. The exit status is 0 if every row is answered, 1 if some
    failed, 2 for a mistake in the command, 75 if it has stopped and the same command goes on, and 130 after Ctrl-C.
    """
    from fluxibly.batch import Batch
    from fluxibly.batch._finish import Output
    from fluxibly.batch._input import open_input
    from fluxibly.cli.batch import Ending, estimated, run, show_estimate
    from fluxibly.cli.batch.display import Display
    from fluxibly.cli.batch.settings import (
        check_files,
        concurrency_of,
        count_of,
        dollars_of,
        template_of,
    )
    from fluxibly.cli.chat import check_installed, recorder
    from fluxibly.cli.chat.settings import parameters_of
    from fluxibly.cli.turns.masking import Masking
    from fluxibly.llm import LLM
    from fluxibly.providers.local import model_path

    if column is not None and template is not None:
        raise ConfigError("expected --column or --template, got both; a template has columns in it: {name}")
    if then is not None and executor != "provider":
        raise ConfigError(f"--then {then}: it is for what a provider's batches leave; add --executor provider")
    if cancel and executor != "provider":
        raise ConfigError("--cancel: it is for the batches of a provider; add --executor provider")
    if one_trace and trace is None and otlp is None:
        raise ConfigError("--one-trace: expected a place for the spans; add --trace FILE or --otlp URL")
    at_once = concurrency_of(concurrency)
    dollars = dollars_of(budget)
    requests, tokens = count_of("--rpm", rpm), count_of("--tpm", tpm)
    text = template_of(template)
    check_files(prompts, out, errors)
    parameters = parameters_of(option or ())
    settings = parameters.configure(config_of(config, framework, model))
    screen = Screen(quiet=quiet)
    log_to(screen, log_level or "critical")
    check_installed(settings.framework, spans=trace is not None or otlp is not None)
    with LLM(settings) as llm:
        made = Batch(
            llm,
            open_input(prompts, column=column, template=text),
            Output(out, format=output_format, ordered=ordered, errors=errors),
            system=system,
            concurrency=at_once,
            rpm=requests,
            tpm=tokens,
            limit=limit,
            dedupe=dedupe,
            budget=dollars,
            stop_after_errors=stop_after_errors,
            retry_errors=retry_errors,
            changed=changed,
            executor=executor,
            then=then,
            one_trace=one_trace,
        )
        if dry_run:
            found = estimated(screen, made)
            if as_json:
                typer.echo(json.dumps(attrs.asdict(found)))
            else:
                show_estimate(screen, made, found)
            return OK
        if settings.framework == "local":
            model_path(settings.model)  # no row must wait for a download
        spans = recorder(trace, otlp, keep=False)
        try:
            was_told = run(made, Display(made, screen), cancels=cancel)
        finally:
            problem = spans.close()
            if problem is not None:
                screen.aside(f"fluxibly: {problem}", "yellow")
    ending = Ending(made, context.obj, was_told, Masking.of(settings).text)
    if as_json:
        typer.echo(json.dumps(attrs.asdict(made.report)))
    say = screen.aside if as_json else screen.line
    for line in ending.lines():
        say(line)
    return ending.status
