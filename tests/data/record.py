"""Records the exchanges in `recorded/` again, with servers that run anywhere.

Usage: `python tests/data/record.py llamacpp`, or `ollama ADDRESS`, or `llm-katan`. The names of llama.cpp's and
llm-katan's servers start them (`pip install xllamacpp llm-katan`). Ollama's server has to be running, with the small
model of the framework `local` as `smollm2`; the script makes a copy of that model that calls tools.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "recorded"
KEEP = ("content-type", "server", "x-request-id", "request-id")
"""The response headers that are kept."""

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
}
FUNCTION = {"name": "weather", "description": "The weather in a city.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = '<think>\nI look it up.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'

GREETING = [{"role": "user", "content": "Say hello in five words."}]
WEATHER = [
    {"role": "user", "content": "What is the weather in Oslo?"},
    {"role": "assistant", "content": CALL % "Oslo"},
    {"role": "user", "content": "What is the weather in Oslo?"},
    {"role": "assistant", "content": CALL % "Oslo"},
    {"role": "user", "content": "What is the weather in Rome?"},
]
"""A conversation that so small a model continues with a tool call, because it copies the turns before."""
ITEMS = [
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": turn["content"]}]}
    if turn["role"] == "assistant"
    else turn
    for turn in WEATHER
]
"""The same for the Responses API."""
JINJA = """
{%- if tools %}{{ "<|im_start|>system\\nCall functions within <tool_call></tool_call> tags.\\n<tools>" }}
{%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}{{ "\\n</tools><|im_end|>\\n" }}{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" %}{{ "<|im_start|>assistant\\n" }}
{%- if message.reasoning_content %}{{ "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" }}{% endif %}
{{- message.content or "" }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- "}\\n</tool_call>" }}{% endfor %}{{ "<|im_end|>\\n" }}
{%- else %}{{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}"""
"""The chat template for llama.cpp, from which it learns how the model calls tools and thinks."""

GO = """{{ if .Tools }}<|im_start|>system
Answer with a function call.
<tools>{{ range .Tools }}
{{ . }}{{ end }}
</tools><|im_end|>
{{ end }}{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}{{ range .ToolCalls }}
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""The template for Ollama, from which it learns how the model calls tools."""


def exchanges(server: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield what to ask a server: a name, the dialect, the path and the body."""
    common = {"model": "smollm2", "temperature": 0}
    if server != "ollama":
        yield "chat", "chat", "/v1/chat/completions", {**common, "messages": GREETING, "max_tokens": 20}
        yield "messages", "messages", "/v1/messages", {**common, "messages": GREETING, "max_tokens": 20}
    if server == "llamacpp":
        tools: dict[str, Any] = {**common, "max_tokens": 80}
        yield "chat-tools", "chat", "/v1/chat/completions", {**tools, "messages": WEATHER, "tools": [TOOL]}
        named = [{"name": "weather", "description": FUNCTION["description"], "input_schema": SCHEMA}]
        yield "messages-tools", "messages", "/v1/messages", {**tools, "messages": WEATHER, "tools": named}
        output: dict[str, Any] = {**common, "max_output_tokens": 80}
        yield "responses", "responses", "/v1/responses", {**output, "input": GREETING}
        flat = [{"type": "function", **FUNCTION}]
        yield "responses-tools", "responses", "/v1/responses", {**output, "input": ITEMS, "tools": flat}
    if server == "ollama":
        call = {"type": "object", "properties": {"name": {"const": "weather"}, "arguments": SCHEMA}}
        call["required"] = ["name", "arguments"]
        asked = {"model": "smollm2-tools", "messages": WEATHER[-1:], "tools": [TOOL]}
        short = {"options": {"temperature": 0, "num_predict": 40, "repeat_penalty": 1.0}}
        yield "chat", "ollama", "/api/chat", {"model": "smollm2", **short, "messages": GREETING}
        yield "chat-tools", "ollama", "/api/chat", {**asked, **short, "format": call}
        schema = {"type": "json_schema", "json_schema": {"name": "call", "schema": call}}
        yield "compatible-tools", "chat", "/v1/chat/completions", {**common, **asked, "response_format": schema}


def record(server: str, address: str) -> None:
    """Ask a server everything, whole and as a stream, and write a file for each answer."""
    FOLDER.mkdir(exist_ok=True)
    for name, dialect, path, body in exchanges(server):
        for stream in (False, True):
            asked = {**body, "stream": stream}
            status, headers, answer = post(address + path, asked)
            found = {
                "provider": server,
                "dialect": dialect,
                "method": "POST",
                "url": path,
                "request_headers": {"content-type": "application/json"},
                "request_body": json.dumps(asked),
                "status": status,
                "response_headers": {key: headers[key] for key in headers if key in KEEP},
                "response_body": answer,
                "streaming": stream,
                "source": "tests/data/record.py",
                "licence": "MIT",
            }
            file = FOLDER / f"{server}-{name}{'-stream' if stream else ''}.json"
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            print(status, len(answer), file.name)  # noqa: T201  # the output of a script


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    """Return the status, the headers and the body of an answer."""
    headers = {"content-type": "application/json", "authorization": "Bearer k", "x-api-key": "k"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310  # the address is ours
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:  # noqa: S310  # the address is ours
            return answer.status, {key.lower(): value for key, value in answer.headers.items()}, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, {key.lower(): value for key, value in error.headers.items()}, error.read().decode()


@contextmanager
def llamacpp() -> Iterator[str]:
    """Run llama.cpp's server with the small model, and yield its address."""
    import xllamacpp

    from fluxibly.providers.local import model_path

    params = xllamacpp.CommonParams()
    params.model.path = str(model_path("smollm2"))
    params.model_alias = {"smollm2"}
    params.chat_template = JINJA
    params.n_ctx = 2048
    params.n_parallel = 1
    params.verbosity = -1
    params.offline = params.use_jinja = True
    params.ui = False
    params.port = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address


@contextmanager
def llm_katan() -> Iterator[str]:
    """Run llm-katan's server, which repeats the prompt, and yield its address."""
    command = "llm-katan --model smollm2 --backend echo --providers openai,anthropic --host 127.0.0.1 --port 18765"
    with subprocess.Popen(command.split()) as process:
        time.sleep(5)
        try:
            yield "http://127.0.0.1:18765"
        finally:
            process.terminate()


def main() -> None:
    server = sys.argv[1]
    if server == "ollama":
        address = sys.argv[2]
        post(f"{address}/api/create", {"model": "smollm2-tools", "from": "smollm2", "template": GO, "stream": False})
        record(server, address)
        return
    with llamacpp() if server == "llamacpp" else llm_katan() as address:
        record(server, address)


if __name__ == "__main__":
    main()
