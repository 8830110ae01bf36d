"""Middleware that runs the functions that a model calls, and asks again with their results."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import isawaitable
from typing import Any, Literal, TypeAlias, TypeVar, cast

import attrs

from fluxibly._checks import kind_of, one_of, truth, validator, whole
from fluxibly._logs import log_decision
from fluxibly._loops import run_to_end
from fluxibly._masking import as_text
from fluxibly._threads import NotInTime
from fluxibly.errors import ConfigError, DeadlineExceeded, MaxTurnsExceeded, error_type
from fluxibly.flow import CallNext, Flow, emit, gather, perform
from fluxibly.flow.combinators import effects_of
from fluxibly.flow.compose import deadline_exceeded
from fluxibly.flow.relay import is_flow
from fluxibly.flow.verbs import discard
from fluxibly.functions import arity, check_function, find_function, to_function
from fluxibly.limits import time_left
from fluxibly.middleware._copies import Rebuilt
from fluxibly.middleware._going_on import has_time
from fluxibly.middleware._keys import whom
from fluxibly.tools import BadArguments, FunctionTool, tool
from fluxibly.types import CallRecord, Chunk, Content, Message, Request, Response, Tool, ToolCall, ToolRun, observers_of

T = TypeVar("T")
Verdict: TypeAlias = Generator[Any, Any, bool] | bool
"""True to run the function, False to refuse; or a flow that returns one of these."""
Approve: TypeAlias = Callable[[ToolCall], Verdict] | Callable[[ToolCall, Request], Verdict]
Function: TypeAlias = Callable[..., Any] | str
"""A function, a `FunctionTool`, or in YAML the registered name of one."""

_CUT = ("length", "content_filter", "error")
"""The finish reasons of answers whose calls may be incomplete."""


def _to_tools(values: Function | Iterable[Function]) -> tuple[FunctionTool[..., Any], ...]:
    if isinstance(values, str) or callable(values):
        values = [values]
    if not isinstance(values, Iterable) or isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        got = kind_of(cast("Any", values))
        raise ConfigError(f"Tools: functions: expected a list of functions, got {got}; write Tools([function])")
    made = [_to_tool(value, number) for number, value in enumerate(values)]
    if not made:
        raise ConfigError("Tools: functions: expected at least one function, got none; write Tools([function])")
    names = [each.name for each in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"Tools: functions: expected a name for each, got {name!r} twice; write tool(function, name='…')"
            )
    return tuple(made)


def _to_tool(value: Any, number: int) -> FunctionTool[..., Any]:
    if value is None:  # which makes a decorator of `tool`
        raise ConfigError(f"Tools: functions[{number}]: expected a function, got None; write Tools([function])")
    if isinstance(value, (Tool, Mapping)) and not isinstance(value, FunctionTool):
        raise ConfigError(
            f"Tools: functions[{number}]: expected a function, got {kind_of(cast('Any', value))}, which has none; give "
            "such tools to the call itself, complete(…, tools=[…]), and its answer has their calls"
        )
    try:
        return tool(find_function(value) if isinstance(value, str) else cast("Callable[..., Any]", value))
    except ConfigError as error:
        raise ConfigError(f"Tools: functions[{number}]: {error}") from None


def _to_approve(value: Approve | str | None) -> Approve | None:
    return to_function(value)


def _names(tools: Sequence[Tool]) -> str:
    return f"({', '.join([each.name for each in tools])})"


@attrs.frozen
class Tools(Rebuilt):
    """Middleware that runs the functions that the model calls, and asks again with their results, until it answers.

    The model is told of the functions beside the tools of the request. A stream goes on over all turns: a mark
    (`Chunk.added`) stands between two, and the response is the last answer, with the messages before it in `added`.

    An answer comes to the caller as it is, and none of its calls runs, if it calls a tool that only the request has, if it
    was cut off (its finish reason is "length", "content_filter" or "error"), or if the request has `tool_choice="none"`.
    Any other `tool_choice` holds for the first turn, because the model could never answer otherwise.

    Arguments are checked, and converted to the types of the function's parameters. The model is told of wrong arguments,
    of an unknown tool, of a refusal, and of an exception of the function (its class and message), and may try again. The
    log and the trace have the class alone. `DeadlineExceeded` of the call's own deadline goes to the caller.

    A synchronous pipeline runs an async function in an event loop of its own; an asynchronous pipeline runs a sync function
    in a worker thread. Put `Tools` outside of whatever sends requests again, or functions would run again.

    Args:
        functions: functions, and tools that `tool` has made of them; in YAML, registered names. One alone stands for a list
            of one.
        max_turns: the number of requests, at least 1. If the model then still calls tools, `MaxTurnsExceeded` is raised.
        parallel: whether the calls of one answer run at the same time. Otherwise they run in their order.
        on_error: "tell" tells the model of an exception of a function; "raise" raises it.
        approve: a function that takes a call, and returns whether its function may run; or a generator function, which may
            wait (`perform`, `ask`). With a second parameter it takes the request, too. No function of an answer runs before
            all its calls have been decided on, in their order.

    Raises:
        ConfigError: a function cannot be a tool, two have the same name, or in a call, the request has another tool of
            the name of one.
        ValueError: another setting is wrong.
        MaxTurnsExceeded: the model still called tools after `max_turns` requests.
        TypeError: `approve` returned something else than a bool.
    """

    functions: tuple[FunctionTool[..., Any], ...] = attrs.field(converter=_to_tools, repr=_names)
    max_turns: int = attrs.field(default=10, kw_only=True, validator=validator(whole, 1))
    parallel: bool = attrs.field(default=True, kw_only=True, validator=validator(truth))
    on_error: Literal["tell", "raise"] = attrs.field(
        default="tell", kw_only=True, validator=validator(one_of, ("tell", "raise"))
    )
    approve: Approve | None = attrs.field(
        default=None,
        kw_only=True,
        converter=_to_approve,
        validator=attrs.validators.optional(validator(check_function, flows=True)),
    )
    _by_name: Mapping[str, FunctionTool[..., Any]] = attrs.field(init=False, repr=False, eq=False)
    _approve_takes_request: bool = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {each.name: each for each in self.functions})
        takes = "a call, or a call and the request"
        both = self.approve is not None and _arity(self.approve, takes) == 2
        object.__setattr__(self, "_approve_takes_request", both)

    def __call__(self, request: Request, call_next: CallNext) -> Flow[Response]:
        asked = request.evolve(tools=self._with_tools_of(request))
        added: tuple[Message, ...] = ()
        turns = 1
        while True:
            response = yield from call_next(asked)
            if not response.tool_calls or not self._runs_calls_of(response, request):
                return response.evolve(added=(*added, *response.added)) if added else response
            added = (*added, *response.added)
            if turns == self.max_turns:
                log_decision(request, "Tools", f"gives up after {turns} requests")
                raise MaxTurnsExceeded(
                    f"Tools: {whom(asked)} still calls tools after {turns} requests; increase max_turns, or tell the model "
                    "when to answer",
                    partial=response.evolve(added=added),
                )
            results = yield from self._results(response.tool_calls, asked)
            said = (response.message, *results)
            yield from emit(Chunk(added=said))
            added = (*added, *said)
            asked = asked.evolve(messages=(*request.messages, *added), tool_choice=None)
            turns += 1

    def _with_tools_of(self, request: Request) -> tuple[Tool, ...]:
        """Return the tools of a request, and ours."""
        others: list[Tool] = []
        for each in request.tools:
            own = self._by_name.get(each.name)
            if own is None:
                others.append(each)
            elif own is not each and own != each:
                raise ConfigError(
                    f"Tools: expected other names in the tools of the request than those of the functions, got {each.name!r} "
                    "in both; leave it out of the request, or write tool(function, name='…')"
                )
        return (*others, *self.functions)

    def _runs_calls_of(self, response: Response, request: Request) -> bool:
        """Whether the calls of an answer run. Otherwise the answer is the caller's."""
        others = {each.name for each in request.tools} - self._by_name.keys()
        if request.tool_choice == "none":
            reason = "tool_choice is 'none'"
        elif response.finish_reason in _CUT:
            reason = f"the finish reason is {response.finish_reason!r}"
        elif any(call.name in others for call in response.tool_calls):
            reason = "it calls a tool of the caller's"
        else:
            return True
        log_decision(request, "Tools", f"runs no call of the answer, because {reason}")
        return False

    def _results(self, calls: Sequence[ToolCall], request: Request) -> Flow[list[Message]]:
        """Return the results of calls, in their order."""
        begun = yield from _in_order([self._begun(call, request) for call in calls])
        running = [each for each in begun if not isinstance(each, Message)]
        following = iter((yield from gather(request, *running) if self.parallel else _in_order(running)))
        return [each if isinstance(each, Message) else next(following) for each in begun]

    def _begun(self, call: ToolCall, request: Request) -> Flow[Message | Flow[Message]]:
        """Return the flow that runs the function of a call; or what the model is told if it may not run."""
        chosen = self._by_name.get(call.name)
        if chosen is None:
            known = ", ".join([each.name for each in request.tools])
            return self._told(call, request, f"there is no tool {call.name!r}; expected one of {known}")
        try:
            arguments = chosen.read(call)
        except BadArguments as error:
            return self._told(call, request, f"the arguments of {chosen.name} are wrong: {error}")
        if self.approve is not None and not (yield from self._approved(call, request)):
            log_decision(request, "Tools", f"refuses a call of {chosen.name}")
            return Message.tool("the call was refused, and has not run", call, is_error=True)
        return self._run(chosen, arguments, call, request)

    def _told(self, call: ToolCall, request: Request, mistake: str) -> Message:
        known = call.name in self._by_name
        what = f"the arguments of {call.name} are wrong" if known else "it called an unknown tool"
        log_decision(request, "Tools", f"tells the model that {what}")
        return Message.tool(mistake, call, is_error=True)

    def _approved(self, call: ToolCall, request: Request) -> Flow[bool]:
        approve: Callable[..., object] = cast("Any", self.approve)
        try:
            found = approve(call, request) if self._approve_takes_request else approve(call)
            if is_flow(found):
                found = yield from effects_of(found, "Tools(approve=…): expected the function to yield only from")
        except Exception:
            _mask_arguments(call, request)
            raise
        if isinstance(found, bool):
            return found
        discard(found)
        raise TypeError(
            f"Tools(approve=…): expected True to run the function, or False to refuse, got {kind_of(found)}; to wait for "
            "something, write a generator function: result = yield from perform(call, acall)"
        )

    def _run(
        self, chosen: FunctionTool[..., Any], arguments: Mapping[str, Any], call: ToolCall, request: Request
    ) -> Flow[Message]:
        """Run a function, and return its result, or what the model is told of its failure."""
        runs = [run for each in observers_of(request) if (run := each.run_tool(chosen, call)) is not None]
        result: Message | None = None
        failure: BaseException | None = None
        try:
            content = yield from _performed(_Work(chosen, arguments, runs), request.call)
            result = Message.tool(content, call)
            return result
        except NotInTime:
            failure = deadline_exceeded(request.call, request.call.sent_model)
            raise failure from None
        except Exception as error:
            failure = error
            if self.on_error == "raise" or (isinstance(error, DeadlineExceeded) and not has_time(request.call)):
                _mask_arguments(call, request)
                raise
            log_decision(request, "Tools", f"tells the model that {chosen.name} raised {error_type(error)}")
            message = as_text(error)
            text = f"{chosen.name} raised {type(error).__name__}{f': {message}' if message else ''}"
            result = Message.tool(text, call, is_error=True)
            return result
        except BaseException as error:
            failure = error
            raise
        finally:
            for run in reversed(runs):
                run.end(result, failure)
            del failure  # its frames refer to this one


def _mask_arguments(call: ToolCall, request: Request) -> None:
    """Have the log mask the arguments of a call in the error that is raised, which may quote them."""
    # The log masks an error against these messages.
    said = Message.assistant("", tool_calls=[call])
    request.call.sent_messages = (*request.call.sent_messages, said)


def _in_order(flows: Iterable[Flow[T]]) -> Flow[list[T]]:
    """Run flows one after the other, and return their results."""
    results: list[T] = []
    for flow in flows:
        result = yield from flow
        results.append(result)
    return results


class _Pending:
    """The awaitable that a sync function has returned."""

    def __init__(self, awaitable: Awaitable[object]) -> None:
        self.awaitable = awaitable


class _Work:
    """A call of a function. The spans of `runs` are current while it is at work, in whatever thread or task."""

    def __init__(self, chosen: FunctionTool[..., Any], arguments: Mapping[str, Any], runs: Sequence[ToolRun]) -> None:
        self.chosen = chosen
        self.arguments = arguments
        self.runs = runs

    def run(self) -> Content | _Pending:
        """Call the function. It may return something to be awaited."""
        with self._current():
            result = self.chosen.function(**self.arguments)
            return _Pending(cast("Any", result)) if isawaitable(result) else self.chosen.content_of(result)

    async def arun(self, pending: _Pending | None = None) -> Content:
        """Await the function, or what it has returned."""
        with self._current():
            awaitable = self.chosen.function(**self.arguments) if pending is None else pending.awaitable
            return self.chosen.content_of(await awaitable)

    @contextmanager
    def _current(self) -> Generator[None]:
        with ExitStack() as leaving:
            for run in self.runs:
                leaving.callback(run.leave, run.enter())
            yield


def _performed(work: _Work, call: CallRecord) -> Flow[Content]:
    """Do the work, and return its result."""
    if work.chosen.is_async:
        return (yield from perform(partial(_run_in_time, work.arun, call), work.arun))
    result = yield from perform(work.run)
    if isinstance(result, _Pending):
        rest = partial(work.arun, result)
        return (yield from perform(partial(_run_in_time, rest, call), rest))
    return result


def _run_in_time(function: Callable[[], Awaitable[T]], call: CallRecord) -> T:
    """Run an async function in a sync pipeline, at most until the deadline of the call. (An async pipeline sees to it itself.)"""
    return run_to_end(function, time_left(call.leash, call.clock))


def _arity(approve: Callable[..., Any], takes: str) -> int:
    try:
        return arity("approve", approve, most=2, takes=takes)
    except ConfigError as error:
        raise ConfigError(f"Tools: {error}") from None
