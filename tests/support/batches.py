"""Batches for tests: a model in this process that counts what it is asked, and the files of a batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anyio
import attrs

from fluxibly import AsyncLLM, LLMConfig, Response, Usage, register_llm_framework
from fluxibly.batch import Batch
from fluxibly.middleware import Retry
from fluxibly.types import ProviderInfo, Request, Text

FRAMEWORK = "counted"


@attrs.define
class CountedModel:
    """A model that counts each prompt, and answers it with "re: " and the prompt, or as `reply` says.

    It claims to be at a service unless `in_process`, so a batch adds to its stack what a service needs.
    """

    reply: Callable[[str], str | BaseException] = lambda prompt: f"re: {prompt}"
    delay: float = 0.0
    in_process: bool = True
    asked: Counter[str] = attrs.Factory(Counter)
    requests: list[Request] = attrs.Factory(list)
    at_once: int = 0
    most_at_once: int = 0
    usage: Usage = attrs.Factory(lambda: Usage(input_tokens=10, output_tokens=5))

    @property
    def info(self) -> ProviderInfo:
        return ProviderInfo(
            name="CountedModel", framework=FRAMEWORK, telemetry_name=FRAMEWORK, in_process=self.in_process
        )

    async def complete(self, request: Request) -> Response:
        part = request.messages[-1].content[0]
        assert isinstance(part, Text)
        self.asked[part.text] += 1
        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await anyio.sleep(self.delay)
            found = self.reply(part.text)
        finally:
            self.at_once -= 1
        if isinstance(found, BaseException):
            raise found
        return Response(found, finish_reason="stop", usage=self.usage, model="m")

    @property
    def calls(self) -> int:
        return sum(self.asked.values())

    def llm(self, middleware: Iterable[Any] | None = None, **settings: Any) -> AsyncLLM:
        """Return an `AsyncLLM` of this model; copies of it share the model."""
        register_llm_framework(FRAMEWORK, lambda config: self, replace=True)
        layers = [Retry(base_delay=0.001)] if middleware is None else list(middleware)
        return AsyncLLM(LLMConfig(framework=FRAMEWORK, model="m", **settings), layers)


@attrs.define
class Files:
    """The files of a batch in a folder."""

    folder: Path

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def answers(self) -> Path:
        return self.folder / "answers.jsonl"

    def write(self, prompts: Iterable[str | dict[str, Any]]) -> None:
        rows = [{"prompt": each} if isinstance(each, str) else each for each in prompts]
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the output, in the order of the rows. There has to be exactly one for each row that has any."""
        found = [json.loads(line) for line in self.answers.read_bytes().splitlines()]
        found.sort(key=lambda line: line["row"])
        assert len({line["row"] for line in found}) == len(found)
        return found

    def rows(self) -> list[int]:
        return [line["row"] for line in self.lines()]

    def batch(self, llm: Any, **settings: Any) -> Batch:
        return Batch(llm, self.prompts, self.answers, **{"concurrency": 10, **settings})
