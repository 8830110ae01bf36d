"""One choice of a chat completion: what it looks like, and the state of one that is streamed."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from fluxibly.providers.inline_thinking import InlineThinking
from fluxibly.providers.openai_parts import Details, content_of, finish_reason_of, tool_call_deltas, word_of
from fluxibly.types import Reasoning


class Delta(msgspec.Struct):
    """What a choice says. `Any` stands where services send more than one type; other fields are not even read."""

    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None
    refusal: Any = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    delta: Delta | None = None
    message: Delta | None = None
    text: Any = None
    """Where a server answers as the older completions API does."""
    index: Any = None
    finish_reason: Any = None
    usage: Any = None
    error: Any = None


_NOTHING: Final = Delta()


class ChoiceState:
    """What is remembered of one choice of a stream."""

    __slots__ = ("begun", "details", "finished", "inline", "refused", "spoke", "thought", "tools")

    def __init__(self) -> None:
        self.begun = False
        self.spoke = False
        self.tools = False
        self.refused = False
        self.finished = False
        self.thought: list[str] = []
        self.details: Details | None = None
        self.inline = InlineThinking()

    def take(self, choice: Choice, fields: dict[str, Any]) -> str:
        """The text of an event's choice; what else it has goes into `fields`, which become a chunk's."""
        self.begun = True
        delta = choice.delta
        if delta is None:
            # Perplexity repeats the whole message beside each delta; it counts only where nothing else was said
            delta = choice.message if choice.message is not None and not self.spoke else _NOTHING
        text, reasoning = delta.content, delta.reasoning or delta.reasoning_content
        if type(text) is not str:
            text, thought = content_of(choice.text if text is None else text)
            reasoning = reasoning or thought
        if reasoning or delta.reasoning_details or delta.tool_calls or delta.refusal:
            text += self._take_more(delta, reasoning, fields)
        if text:
            self.spoke = True
            if not self.inline.over:
                text = _with_thought(self.inline.split(text), fields)
        if choice.finish_reason:
            self._finish(word_of(choice.finish_reason) or "unknown", fields)
        return text

    def _take_more(self, delta: Delta, reasoning: object, fields: dict[str, Any]) -> str:
        """Take what a delta has beside its content; the text of a refusal, which is an answer as well."""
        if delta.tool_calls:
            calls = tool_call_deltas(delta.tool_calls)
            if calls:
                self.tools = self.spoke = True
                fields["tool_calls"] = calls
        if delta.reasoning_details:
            if self.details is None:
                self.details = Details()
            said = self.details.add(delta.reasoning_details)
            reasoning = reasoning or said
        if reasoning and isinstance(reasoning, str):
            fields["reasoning"] = reasoning
            self.thought.append(reasoning)
        if delta.refusal and isinstance(delta.refusal, str):
            self.refused = True
            return delta.refusal
        return ""

    def rest(self, fields: dict[str, Any]) -> str:
        """What is left to say at the end."""
        parts = self.parts()
        if parts:
            fields["reasoning_parts"] = parts
        return _with_thought(self.inline.rest(), fields)

    def _finish(self, reason: str, fields: dict[str, Any]) -> None:
        self.finished = True
        finish = finish_reason_of(reason)
        if finish == "stop" and (self.refused or self.tools):
            finish = "content_filter" if self.refused else "tool_call"
        fields["finish_reason"] = finish
        fields["raw_finish_reason"] = reason

    def parts(self) -> tuple[Reasoning, ...]:
        """The reasoning that has to go back to the service."""
        if self.details is not None:
            return self.details.parts()
        if self.thought and self.tools:
            text = "".join(self.thought)
            return (Reasoning(text=text, raw={"reasoning_content": text}),)
        return ()


def _with_thought(parted: tuple[str, str], fields: dict[str, Any]) -> str:
    """The text of what `InlineThinking` parted; the reasoning goes into `fields`."""
    text, thought = parted
    if thought:
        fields["reasoning"] = fields.get("reasoning", "") + thought
    return text
