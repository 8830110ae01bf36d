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
from fluxibly.explain.text import text_of
from fluxibly.explain.worst import CallBudget, WorstCases
from fluxibly.types import ProviderInfo


@attrs.frozen(eq=False, repr=False)
class Explanation:
    """The description of a stack: its layers, the worst case of a call, and orders that hurt. Its `str` is the text, 80 columns wide.

    Attributes:
        chain: the stack as the rules see it.
        worst_case: the most that a call may come to: `worst_case.whole` and `worst_case.stream`.
        warnings: what hurts, each with its rule, its layers and a `str`.
        notes: what is good to know.
    """

    chain: Chain
    worst_case: WorstCases
    warnings: list[Finding]
    notes: list[Finding]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, outermost first."""
        return self.chain.layers

    def __str__(self) -> str:
        return text_of(self.chain, self.worst_case, self.warnings, self.notes)

    def __repr__(self) -> str:
        return f"Explanation({self.chain.title}: {len(self.warnings)} warnings, {len(self.notes)} notes)"

    def mermaid(self) -> str:
        """Return a flowchart of the stack in the language of Mermaid. The layers of a warning are red."""
        return flowchart(self.chain, self.warnings)

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
    budgets = [
        CallBudget(str(layer), layer.layer.tokens, layer.layer.cost)
        for layer in chain.of("Budget")
        if layer.layer.scope == "call"
    ]
    return Explanation(
        chain,
        WorstCases(
            whole=Search(chain, streaming=False).run(), stream=Search(chain, streaming=True).run(), budgets=budgets
        ),
        warnings=[each for each in found if each.rule.level == "warning"],
        notes=[each for each in found if each.rule.level == "note"],
    )
