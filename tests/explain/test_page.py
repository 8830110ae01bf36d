"""The page about explanations: its table has the rules as they are."""

from __future__ import annotations

import re

from support.readme import ROOT, blocks

from fluxibly import LLM, LLMConfig
from fluxibly.explain import all_rules
from fluxibly.middleware import Deadline, Fallback, RateLimit, Retry

PAGE = ROOT / "docs" / "explain.md"


def test_the_table_of_rules():
    """Each row of the page is a rule with its level, reason and cure, in the order in which they are applied."""
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(rule.name, rule.level, rule.reason, rule.cure) for rule in all_rules().values()]


def test_the_tree():
    """The page shows the text."""
    config = LLMConfig(framework="openai", model="gpt-4o", api_key="sk-test", max_tokens=500, timeout=20)
    stack = [Deadline(60), Fallback(to=["gpt-4o-mini"]), Retry(max_retries=2), RateLimit(requests=600)]
    with LLM(config, stack) as llm:
        text = str(llm.explain())
    (shown,) = blocks("text", PAGE)
    assert shown == f"{text}\n"
