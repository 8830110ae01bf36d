"""An explanation as a flowchart in the language of Mermaid (https://mermaid.js.org/syntax/flowchart.html)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxibly.explain.chain import Chain
    from fluxibly.explain.rules import Finding

_LONGEST = 60
_MEANT = {"&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "#": "#35;", "`": "#96;", "\\": "#92;"}
"""The characters that mean something in a quoted label, and how they are written there."""


def flowchart(chain: Chain, warnings: Sequence[Finding]) -> str:
    """Return the chart: the layers from the top, and below them the providers that they may ask."""
    return "\n".join([*_lines(chain, warnings), ""])


def _lines(chain: Chain, warnings: Sequence[Finding]) -> Iterator[str]:
    layers = chain.layers
    yield "flowchart TD"
    yield f"    call([{_label('your call')}])"
    for layer in layers:
        yield f"    layer{layer.position}[{_label(f'{layer.position} {layer.name}')}]"
    yield f"    provider[({_label(chain.provider_shown or 'provider')})]"
    nodes = ["call", *(f"layer{layer.position}" for layer in layers), "provider"]
    for one, other in pairwise(nodes):
        yield f"    {one} --> {other}"
    innermost = nodes[-2]
    for layer in layers:
        for place, branch in enumerate(layer.branches):
            if branch.name != "first":
                node = f"target{layer.position}x{place}"
                yield f"    {node}[({_label(branch.what)})]"
                yield f"    {innermost} -. {_label(f'{layer.name}, {branch.name}')} .-> {node}"
    hurt = sorted({layer.position for warning in warnings for layer in warning.layers})
    if hurt:
        yield "    classDef hurts stroke:#c00,stroke-width:2px"
        yield f"    class {','.join(f'layer{position}' for position in hurt)} hurts"


def _label(text: str) -> str:
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return '"' + "".join([_MEANT.get(each, each) for each in text]) + '"'
