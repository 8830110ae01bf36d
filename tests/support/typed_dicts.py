"""The keys of the TypedDicts of keywords, which exist for type checkers only."""

from __future__ import annotations

import ast
import inspect

from fluxibly import _parameters, config


def keys_of(name: str) -> set[str]:
    """Return the keys of a TypedDict by its name, with those of its bases."""
    classes = {
        node.name: node
        for module in (_parameters, config)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ClassDef)
    }
    found = classes[name]
    own = {
        node.target.id for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    bases = [base.id for base in found.bases if isinstance(base, ast.Name) and base.id in classes]
    return own.union(*[keys_of(base) for base in bases])
