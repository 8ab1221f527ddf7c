"""The families of transformers that the cache is for; base.py says what they owe to it.

A family is one file, and beside it one that counts, so that programs predict without MindSpore.
"""

from importlib import import_module

_FILES = {
    "FluxTransformer2DModel": ("transformer_flux_withFBCache", "flux_costs"),
    "Flux2Transformer2DModel": ("flux2", "flux2_costs"),
    "QwenImageTransformer2DModel": ("qwenimage", "qwenimage_costs"),
}
"""Where each of mindone's transformers has its file, and what counts its operations."""


def family(transformer):
    """The module of a transformer's family; None for one that the cache does not know."""
    kinds = [kind.__name__ for kind in type(transformer).__mro__ if kind.__module__.startswith("mindone.")]
    return next((import_module(f"{__name__}.{_FILES[kind][0]}") for kind in kinds if kind in _FILES), None)


def costs_of(config):
    """The module that counts what a transformer of this config asks for. Raises ValueError for an unknown family."""
    if config._class_name not in _FILES:
        raise ValueError(f"Unsupported model {config._class_name}; the cache is for mindone's {', '.join(_FILES)}")
    return import_module(f"{__name__}.{_FILES[config._class_name][1]}")


def foreign_transformer(transformer):
    """Why the cached step cannot take a transformer's place, in words; None where it can."""
    from .mindones import HOOKS, replaced

    name, file = type(transformer).__name__, family(transformer)
    if file is None:
        return f"Unsupported model {name}; the cache is for mindone's {', '.join(_FILES)}"
    method = replaced(transformer, file.KIND, ("construct", "__call__"))
    if method:
        return f"transformer {name} has a {method} of its own"
    if any(vars(transformer).get(hooks) for hooks in HOOKS):
        return f"transformer {name} has forward hooks"
    return file.why_foreign(transformer)
