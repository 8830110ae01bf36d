"""`Explanation`: a stack in words."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from fluxibly.config import LLMConfig
from fluxibly.errors import ConfigError
from fluxibly.explain.chain import Chain, Layer
from fluxibly.explain.drawing import flowchart
from fluxibly.explain.layers import Search
from fluxibly.explain.rules import Finding, findings
from fluxibly.explain.text import Cap, text_of
from fluxibly.explain.worst import WorstCase
from fluxibly.types import ProviderInfo


@attrs.frozen
class WorstCases:
    """The worst case of a whole answer, and that of a stream."""

    whole: WorstCase
    stream: WorstCase


@attrs.frozen(eq=False, repr=False)
class Explanation:
    """What a stack does, what a call may come to, and which of its orders hurt. Its `str` is the text, 80 columns wide.

    Attributes:
        title: what is explained.
        layers: the layers, outermost first.
        worst_case: the most that a call may come to: `worst_case.whole` and `worst_case.stream`.
        warnings: what hurts, each with its rule, its layers and a `str`.
        notes: what is good to know.
    """

    title: str
    layers: tuple[Layer, ...]
    worst_case: WorstCases
    caps: tuple[Cap, ...]
    """The budgets of a call."""
    warnings: list[Finding]
    notes: list[Finding]
    provider: str
    """The provider at the end, in words."""
    chain: Chain
    """The stack as the rules see it."""

    def __str__(self) -> str:
        return text_of(self, self.chain)

    def __repr__(self) -> str:
        return f"Explanation({self.title}: {len(self.layers)} layers, {len(self.warnings)} warnings, {len(self.notes)} notes)"

    def mermaid(self) -> str:
        """Return a flowchart of the stack in the language of Mermaid. What a warning is about is red."""
        return flowchart(self)

    def check(self) -> None:
        """Raise an error if there are warnings.

        Raises:
            ConfigError: it lists them all, each with its reason and its cure.
        """
        if self.warnings:
            raise ConfigError.of([str(warning) for warning in self.warnings])


def explain(
    middleware: Iterable[object],
    *,
    provider: object = None,
    config: LLMConfig | None = None,
    info: ProviderInfo | None = None,
) -> Explanation:
    """Explain a stack. Nothing is sent, and no provider is made.

    Args:
        middleware: the layers, outermost first.
        provider: the provider at the end, if there is one already. If it is a pipeline, its layers are explained, too.
        config: the configuration of the model, which has its limits.
        info: the description of the provider.
    """
    chain = Chain(middleware, provider=provider, config=config, info=info)
    found = [*findings(chain)]
    count = len(chain.layers)
    return Explanation(
        title=f"{chain.framework or 'a provider'}, {count} layer{'' if count == 1 else 's'}",
        layers=chain.layers,
        worst_case=WorstCases(*(Search(chain, streaming=streaming).run() for streaming in (False, True))),
        caps=tuple(
            Cap(str(layer), layer.layer.tokens, layer.layer.cost)
            for layer in chain.of("Budget")
            if layer.layer.scope == "call"
        ),
        warnings=[each for each in found if each.rule.level == "warning"],
        notes=[each for each in found if each.rule.level == "note"],
        provider=chain.provider_shown,
        chain=chain,
    )
