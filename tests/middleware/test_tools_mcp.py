"""The recipe for the tools of an MCP server (docs/tools.md), with a real server in another process."""

from __future__ import annotations

import sys

import anyio
import pytest
from support.calling import REQUEST
from support.readme import ROOT, blocks

from fluxibly import AsyncPipeline, tool
from fluxibly.middleware import Tools
from fluxibly.testing import AsyncScriptedProvider
from fluxibly.types import Response, ToolCall

mcp = pytest.importorskip("mcp")

SERVER = """
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("tides")

@server.tool()
def tide(place: str, day: int = 0) -> str:
    "Return when high tide is."
    if place == "Ulm":
        raise ToolError("Ulm is not by the sea")
    return f"{place} {day}: noon"

server.run("stdio")
"""


def recipe():
    """Return the function of the page that makes tools of a server's."""
    (code,) = [code for code in blocks("python", ROOT / "docs" / "tools.md") if "def tools_of" in code]
    begin, end = code.index("async def tools_of"), code.index("server = MCPServer")
    names = {"tool": tool}
    exec(code[begin:end], names)  # noqa: S102  # the page's own code
    return names["tools_of"]


def test_a_server_in_another_process(anyio_backend):
    """Its tools run, and its errors, and arguments that its schema does not have, are told to the model."""
    calls = [{"place": "Brest"}, {"place": "Ulm"}, {}, {"place": "Brest", "day": 2}]
    answer = Response("", tool_calls=[ToolCall(f"c{n}", "tide", given) for n, given in enumerate(calls)])

    async def main():
        command = mcp.StdioServerParameters(command=sys.executable, args=["-c", SERVER])
        async with mcp.Client(command) as client:
            functions = await recipe()(client)
            pipeline = AsyncPipeline(AsyncScriptedProvider(answer, "Noon."), [Tools(functions)])
            return functions, await pipeline.complete(REQUEST)

    (made,), response = anyio.run(main, backend=anyio_backend)
    assert (made.name, made.description) == ("tide", "Return when high tide is.")
    assert made.parameters["required"] == ["place"]
    results = [message.text for message in response.added[1:]]
    assert results[0] == "Brest 0: noon"
    assert results[1].startswith("tide raised RuntimeError: ")
    assert "Ulm is not by the sea" in results[1]
    assert results[2] == "the arguments of tide are wrong: place is required, and missing"
    assert results[3] == "Brest 2: noon"
    assert [message.is_error for message in response.added[1:]] == [False, True, True, False]
