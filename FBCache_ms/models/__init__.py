"""The families of transformers that the cache is for, a file each; base.py says what they owe to it."""

from importlib import import_module

from .mindones import HOOKS, replaced

_FILES = {"FluxTransformer2DModel": "transformer_flux_withFBCache"}
"""Where each of mindone's transformers has its file."""


def family(transformer):
    """The module of a transformer's family; None for one that the cache does not know."""
    kinds = [kind.__name__ for kind in type(transformer).__mro__ if kind.__module__.startswith("mindone.")]
    return next((import_module(f"{__name__}.{_FILES[kind]}") for kind in kinds if kind in _FILES), None)


def foreign_transformer(transformer):
    """Why the cached step cannot take a transformer's place, in words; None where it can."""
    name, file = type(transformer).__name__, family(transformer)
    if file is None:
        return f"Unsupported model {name}; the cache is for mindone's {', '.join(_FILES)}"
    method = replaced(transformer, file.KIND, ("construct", "__call__"))
    if method:
        return f"transformer {name} has a {method} of its own"
    if any(vars(transformer).get(hooks) for hooks in HOOKS):
        return f"transformer {name} has forward hooks"
    return file.why_foreign(transformer)
