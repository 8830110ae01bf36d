"""A stack that explains itself: its layers as a tree, the worst case of a call, and warnings of orders that hurt.

`chain.py` has what is explained, `layers.py` what each built-in layer does and adds, `worst.py` how that adds up, `rules.py` the
table of what hurts, and `text.py` and `drawing.py` how it is told. Nothing here does I/O, and no call comes through here.

Imports: `registry`, `target`, `flow`, `config`, data and its helpers; never a middleware, which it knows by the names of their
classes. Imported by: `pipeline` and `llm`, when somebody asks.
"""

from fluxibly.explain.chain import Chain, Layer
from fluxibly.explain.explanation import Explanation, explain
from fluxibly.explain.rules import Finding, Match, Rule, all_rules, inside, outside, register_rule
from fluxibly.explain.worst import WorstCase, WorstCases

__all__ = [
    "Chain",
    "Explanation",
    "Finding",
    "Layer",
    "Match",
    "Rule",
    "WorstCase",
    "WorstCases",
    "all_rules",
    "explain",
    "inside",
    "outside",
    "register_rule",
]
