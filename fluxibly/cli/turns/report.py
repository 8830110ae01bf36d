"""Turns as `fluxibly logs` shows and exports them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text as Styled

from fluxibly.cli.report import described
from fluxibly.cli.screen import clean
from fluxibly.cli.trace.file import duration
from fluxibly.messages import Message
from fluxibly.parts import Media, Reasoning, Text, ToolCall
from fluxibly.types import Response

if TYPE_CHECKING:
    from fluxibly.calls import Usage
    from fluxibly.cli.turns.store import Listed, Turn
    from fluxibly.parts import Part

START = 200
"""The most characters of a question or an answer in a list that is no terminal's."""


def on_one_line(text: str) -> str:
    """Return a text on one line, without characters that control the terminal."""
    return clean(" ".join(text.split()))


# Lists


def rows(turns: Iterable[Listed]) -> Iterator[str]:
    """Yield a line for each turn, for programs: its fields with tabs between them, and empty if they are not known."""
    for turn in turns:
        fields = (
            turn.id,
            iso(turn.time),
            turn.model,
            turn.input_tokens,
            turn.output_tokens,
            None if turn.elapsed is None else f"{turn.elapsed:.3f}",
            turn.prompt[: 5 * START],
            _outcome(turn)[: 5 * START],
        )
        yield "\t".join(["" if field is None else on_one_line(str(field))[:START] for field in fields])


def blocks(turns: Iterable[Listed], width: int) -> Iterator[Styled]:
    """Yield two lines for each turn, for a person: its figures, and below them the question and the answer."""
    turns = list(turns)
    ids = max((len(str(turn.id)) for turn in turns), default=0)
    for turn in turns:
        numbers = f"{_tokens(turn)}{'' if turn.elapsed is None else duration(turn.elapsed):>10}"
        line = Styled(f"{turn.id:>{ids}}  ", "bold")
        line.append(datetime.fromtimestamp(turn.time).strftime("%Y-%m-%d %H:%M  "), "cyan")  # local time
        model = _cut(on_one_line(_model(turn)), width - cell_len(line.plain) - len(numbers) - 2)
        line.append(model)
        line.append(f"{numbers:>{max(0, width - cell_len(line.plain))}}", "dim")
        yield _fit(line, width)
        room = width - ids - 2
        asked = _cut(on_one_line(turn.prompt[: 5 * width]), max(room // 2, room - 3 - cell_len(_start(turn, room))))
        said = Styled(" " * (ids + 2)).append(asked).append(" → ", "dim")
        said.append(_start(turn, width), "red" if turn.error_type is not None else "")
        yield _fit(said, width)


def _start(turn: Listed, width: int) -> str:
    return _cut(on_one_line(_outcome(turn)[: 5 * width]), width)


def _outcome(turn: Listed) -> str:
    """Return the answer, or why there is none."""
    if turn.error_type is None:
        return turn.answer
    return _error(turn) + (f": {turn.answer}" if turn.answer else "")


def _error(turn: Listed) -> str:
    if turn.error_type == "KeyboardInterrupt":
        return "stopped"
    return f"{turn.error_type}: {turn.error}" if turn.error else str(turn.error_type)


def _model(turn: Listed) -> str:
    """Return the model's name; of a model in a file, the name of the file."""
    return PurePath(turn.model).name if turn.framework == "local" else turn.model


def _tokens(turn: Listed) -> str:
    if turn.input_tokens is None and turn.output_tokens is None:
        return ""
    given, made = ("?" if count is None else str(count) for count in (turn.input_tokens, turn.output_tokens))
    return f"{given} → {made}"


def _cut(text: str, width: int) -> str:
    """Return a text of at most so many columns."""
    cut = Styled(text)
    cut.truncate(max(1, width), overflow="ellipsis")
    return cut.plain


def _fit(line: Styled, width: int) -> Styled:
    line.truncate(width, overflow="ellipsis")
    return line


# A whole turn


def whole(turn: Turn) -> Iterator[Styled]:
    """Yield the paragraphs of a turn, in Markdown: its figures, the messages, and the answer."""
    response = None if turn.response is None else Response.from_dict(turn.response)
    yield Styled(f"# Turn {turn.id}", "bold")
    yield Styled("\n".join([f"- {name}: {on_one_line(value)}" for name, value in _facts(turn, response)]), "dim")
    messages = [Message.from_dict(message) for message in turn.messages]
    for message in (*messages, *(response.added if response is not None else ())):
        yield from _section(message.role if message.name is None else f"{message.role} {message.name}", message.parts)
    if response is not None:
        yield from _section("answer", response.parts)
        for number, other in enumerate(response.alternatives, 2):
            yield from _section(f"answer {number}", other.parts)
    if turn.error_type is not None:
        yield Styled("## error", "bold")
        yield Styled(on_one_line(_error(turn)), "red")


def _facts(turn: Turn, response: Response | None) -> Iterator[tuple[str, str]]:
    yield "time", datetime.fromtimestamp(turn.time).strftime("%Y-%m-%d %H:%M:%S")  # local time
    yield "conversation", turn.conversation
    yield "framework", turn.framework
    yield "model", turn.model
    if turn.config_file is not None:
        yield "configuration", turn.config_file
    if response is not None:
        if response.model not in (None, turn.model):
            yield "answered by", str(response.model)
        if response.finish_reason is not None:
            yield "ended by", response.finish_reason
        if response.usage is not None:
            yield "tokens", _usage(response.usage)
        if response.total_usage is not None and response.total_usage != response.usage:
            yield "tokens of all attempts", _usage(response.total_usage)
        if response.cost is not None:
            yield "cost", f"${response.cost:f}"
        if response.cache_hit:
            yield "cache", "hit"
    if turn.elapsed is not None:
        yield "duration", duration(turn.elapsed)


def _usage(usage: Usage) -> str:
    import attrs

    found = {name: count for name, count in attrs.asdict(usage).items() if count is not None}
    return ", ".join([f"{name.removesuffix('_tokens').replace('_', ' ')} {count}" for name, count in found.items()])


def _section(title: str, parts: Iterable[Part]) -> Iterator[Styled]:
    yield Styled(f"## {on_one_line(title)}", "bold")
    for part in parts:
        if isinstance(part, Text):
            yield Styled(clean(part.text))
        elif isinstance(part, Reasoning):
            if part.text:
                yield Styled("\n".join([f"> {line}" for line in clean(part.text).splitlines()]), "dim")
        elif isinstance(part, ToolCall):
            yield Styled(f"- calls {on_one_line(part.name)}: {on_one_line(part.raw_arguments)}", "yellow")
        elif isinstance(part, Media):
            yield Styled(on_one_line(described(part)), "yellow")
        else:
            yield Styled(f"[{on_one_line(part.type or 'opaque')}]", "yellow")


# Exports


def iso(seconds: float) -> str:
    """Return a time as ISO 8601, with the distance to UTC."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")  # local time


def as_jsonl(turn: Turn, *, ascii_only: bool = False) -> str:
    """Return a turn as one line of JSON.

    `messages` is a list of `Message.to_dict`, and `response` is a `Response.to_dict`.
    """
    fields: Mapping[str, Any] = {
        "id": turn.id,
        "conversation": turn.conversation,
        "time": iso(turn.time),
        "framework": turn.framework,
        "model": turn.model,
        "config_file": turn.config_file,
        "messages": turn.messages,
        "response": turn.response,
        "error": None if turn.error_type is None else {"type": turn.error_type, "message": turn.error or ""},
        "elapsed": turn.elapsed,
    }
    return json.dumps(fields, ensure_ascii=ascii_only)
