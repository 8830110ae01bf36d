"""The parameters of a request in the form that LangChain's chat models need, so that each reaches the service."""

from __future__ import annotations

import importlib
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable, RunnableBinding

from fluxibly._checks import is_list
from fluxibly._formats import SchemaFormat
from fluxibly._merging import merge_into
from fluxibly.errors import BadRequest
from fluxibly.limits import Timeouts
from fluxibly.providers._libraries.calls import read_timeout
from fluxibly.providers.dialects.anthropic import formatted
from fluxibly.providers.dialects.encoding import bad_request, format_of, reject_unsupported
from fluxibly.providers.dialects.openai_schema import named_schema
from fluxibly.providers.langchain._messages import Dialect
from fluxibly.types import Message, Request, Tool

_FAMILIES: tuple[Dialect, ...] = ("openai", "anthropic")
_SIMPLE = (
    "temperature",
    "max_tokens",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "reasoning_effort",
)


def dialect_of(chat_model: BaseChatModel) -> Dialect:
    """Return the family of a chat model. Many integrations (DeepSeek, xAI, Azure) build on langchain-openai."""
    packages = {kind.__module__.partition(".")[0] for kind in type(chat_model).__mro__}
    for family in _FAMILIES:
        if f"langchain_{family}" in packages:
            return family
    return "other"


def integration_of(chat_model: BaseChatModel) -> str:
    """Return the name of a chat model's integration, such as "langchain-anthropic": the dialect of its blocks."""
    family = dialect_of(chat_model)
    package = f"langchain_{family}" if family != "other" else type(chat_model).__module__.partition(".")[0]
    return package.replace("_", "-")


def form_of(chat_model: BaseChatModel, integration: str) -> dict[str, Any]:
    """Return the metadata of a message whose content is in LangChain's common form, if the chat model uses it."""
    if getattr(chat_model, "output_version", None) != "v1":
        return {}
    service = integration.removeprefix("langchain-").replace("-", "_")
    return {"output_version": "v1", "model_provider": service}


def spoken(request: Request, dialect: Dialect) -> tuple[Message, ...]:
    """Return the messages to send, which tell Claude a JSON Schema that it has no form for."""
    is_schema = dialect == "anthropic" and isinstance(format_of(request), SchemaFormat)
    return formatted(request)[0].messages if is_schema else request.messages


def prepare(chat_model: BaseChatModel, request: Request, dialect: Dialect) -> tuple[Runnable[Any, Any], dict[str, Any]]:
    """Return the runnable to invoke for a request, and its keywords.

    Raises:
        BadRequest: the chat model cannot pass on a parameter.
    """
    service = f"LangChain's {type(chat_model).__name__}"
    reject_unsupported(request, service, ["n"])  # LangChain returns only a single choice
    keywords: dict[str, Any] = {name: value for name in _SIMPLE if (value := getattr(request, name)) is not None}
    if request.stop:
        keywords["stop"] = list(request.stop)
    if request.call.timeouts is not None and dialect != "other":  # the other integrations fix it when they are made
        keywords["timeout"] = sdk_timeout(dialect, request.call.timeouts)
    runnable: Runnable[Any, Any] = chat_model
    if dialect == "openai":
        _for_openai(chat_model, request, keywords)
    elif dialect == "anthropic":
        _for_anthropic(request, keywords, service)
    else:
        chat_model = _with_fields(chat_model, keywords)
        runnable = chat_model
        wanted = format_of(request)
        if wanted not in (None, "text"):
            keywords["response_format"] = _openai_format(wanted)
        merge_into(keywords, request.extra)
    if request.tools:
        return _bind_tools(chat_model, request, dialect, keywords)
    if request.tool_choice is not None:
        raise bad_request(request, f"tool_choice={request.tool_choice!r} needs tools to choose from")
    return runnable, keywords


def sdk_timeout(package: str, times: Timeouts) -> Any:
    """Return the timeout for an SDK (`openai` or `anthropic`)."""
    read = read_timeout(times)
    return importlib.import_module(package).Timeout(connect=times.connect, read=read, write=read, pool=times.connect)


def _for_openai(chat_model: BaseChatModel, request: Request, keywords: dict[str, Any]) -> None:
    """Put parameters that the openai SDK does not know into `extra_body`, which overrides the rest of the body.

    The response format goes there too. If it were a keyword, langchain-openai would parse the answer itself, which
    requires strict tools and fails if `max_tokens` cuts the answer off.
    """
    body: dict[str, Any] = {}
    if "top_k" in keywords:
        body["top_k"] = keywords.pop("top_k")
    wanted = format_of(request)
    if wanted not in (None, "text"):
        shape = _openai_format(wanted)
        # The Responses API needs it in another place, and langchain-openai puts it there.
        (keywords if getattr(chat_model, "use_responses_api", None) else body)["response_format"] = shape
    _add_extra(request, keywords, body)


def _for_anthropic(request: Request, keywords: dict[str, Any], service: str) -> None:
    reject_unsupported(request, service, ["frequency_penalty", "presence_penalty", "seed"])
    if format_of(request) == "json":
        raise bad_request(request, "Anthropic returns JSON only for a schema: pass a JSON schema as response_format")
    _, output = formatted(request)
    if output:
        keywords["output_config"] = output
    _add_extra(request, keywords, {})


def _add_extra(request: Request, keywords: dict[str, Any], body: dict[str, Any]) -> None:
    merge_into(body, request.extra)
    for name, value in request.extra.items():
        if value is None:
            keywords.pop(name, None)
    if body:
        keywords["extra_body"] = body
    if request.headers:
        keywords["extra_headers"] = dict(request.headers)


def _openai_format(wanted: object) -> dict[str, Any]:
    if isinstance(wanted, SchemaFormat):
        return {"type": "json_schema", "json_schema": named_schema(wanted)}
    return {"type": "json_object"}


def _with_fields(chat_model: BaseChatModel, keywords: dict[str, Any]) -> BaseChatModel:
    """Return a copy of the model with its fields set from `keywords`, and remove these keywords.

    The other integrations read their fields at every call, but not all of them accept the same names as keywords.
    """
    fields = type(chat_model).model_fields
    names = {field.alias or name: name for name, field in fields.items()} | {name: name for name in fields}
    changes = {names[name]: keywords.pop(name) for name in list(keywords) if name in names and name != "stop"}
    return chat_model.model_copy(update=changes) if changes else chat_model


def _bind_tools(
    chat_model: BaseChatModel, request: Request, dialect: Dialect, keywords: dict[str, Any]
) -> tuple[Runnable[Any, Any], dict[str, Any]]:
    tools = [_anthropic_tool(tool) if dialect == "anthropic" else _openai_tool(tool) for tool in request.tools]
    choice = _tool_choice(request, dialect)
    try:
        bound = chat_model.bind_tools(tools, **({} if choice is None else {"tool_choice": choice}))
    except NotImplementedError:
        raise BadRequest(
            f"LangChain's {type(chat_model).__name__} does not support tools", model=request.model
        ) from None
    if not isinstance(bound, RunnableBinding):
        return bound, keywords
    # Tools in `extra` are added: `extra_body`, or a keyword, would replace all others.
    holders: tuple[dict[str, Any], ...] = (keywords, keywords.get("extra_body") or {})
    for holder in holders:
        if is_list(holder.get("tools")):
            holder["tools"] = [*bound.kwargs.get("tools", ()), *holder["tools"]]
    return bound.bound, {**bound.kwargs, **keywords}


def _tool_choice(request: Request, dialect: Dialect) -> Any:
    choice = request.tool_choice
    if dialect == "anthropic" and choice == "none":
        return {"type": "none"}
    return "any" if choice == "required" else choice


def _openai_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _anthropic_tool(tool: Tool) -> dict[str, Any]:
    strict = {} if tool.strict is None else {"strict": tool.strict}
    return {"name": tool.name, "description": tool.description, "input_schema": dict(tool.parameters), **strict}
