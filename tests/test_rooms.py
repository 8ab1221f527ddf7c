"""The package's rooms import one another one way, from the programs down to the rules."""

import ast
from pathlib import Path

import pytest

import FBCache_ms

PACKAGE = Path(FBCache_ms.__file__).parent
FLOORS = (
    ("rules",),
    ("config",),
    ("cache",),
    ("runtime", "predict", "models"),
    ("pipelines",),
    ("eval", "comfyui", "serve"),
)
"""From the ground up; rooms of one floor may import each other."""

NAMES_ONLY = {"utils": "cache", "memory": "predict", "pipeline_flux": "pipelines", "__init__": None, "__main__": "eval"}
"""Modules that hand on what another room has, by its published name."""

LATE = {("runtime", "cpu"): "on Ascend nothing of it is imported"}
"""Rooms that others import in functions alone."""


def floor_of(room):
    """Which floor a room is on."""
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported(source, module):
    """(names of the package's modules that a module imports, whether that is within a function), each as parts."""
    tree, found = ast.parse(source), []
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [each.name.split(".") for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["FBCache_ms", *module[: len(module) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, each.name] for each in node.names]
        found += [(tuple(name[1:]), id(node) in late) for name in names if name[0] == "FBCache_ms" and len(name) > 1]
    return found


def upward(source, module):
    """What a module imports from a floor above its own, or too early."""
    here, found = floor_of(module[0]), []
    for name, late in imported(source, module):
        # A name that the package itself hands on is of the floor of pipelines, at most.
        room = name[0] if (PACKAGE / name[0]).is_dir() or name[0] == "config" else NAMES_ONLY.get(name[0], "pipelines")
        if room and floor_of(room) > here or name[:2] in LATE and module[:2] != name[:2] and not late:
            found.append(".".join(name))
    return found


FILES = [path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))]
MODULES = [path for path in FILES if path.parts[0] not in NAMES_ONLY]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_room_imports_nothing_from_above(path):
    source = (PACKAGE / path).with_suffix(".py").read_text(encoding="utf-8")
    assert upward(source, path.parts) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("rules/when", "from ..config import CacheConfig"),
        ("cache/step", "from ..models.base import Model"),
        ("cache/step", "def f():\n    from FBCache_ms.models import family"),
        ("runtime/device", "from FBCache_ms import FluxPipeline"),
        ("predict/flops", "import FBCache_ms.pipelines.flux"),
        ("pipelines/flux", "from FBCache_ms.eval.shared import tables"),
        ("models/base", "from ..runtime.cpu import stand_ins"),
    ],
)
def test_an_import_from_above_is_found(module, source):
    assert len(upward(source, tuple(module.split("/")))) == 1


def test_a_published_name_is_handed_on():
    from FBCache_ms.memory import cache_bytes
    from FBCache_ms.pipeline_flux import FluxPipeline, apply_cache_on_pipe, remove_cache_from_pipe
    from FBCache_ms.utils import CacheContext

    assert CacheContext is FBCache_ms.CacheContext and FluxPipeline is FBCache_ms.FluxPipeline
    assert apply_cache_on_pipe is FBCache_ms.apply_cache_on_pipe
    assert remove_cache_from_pipe is FBCache_ms.remove_cache_from_pipe
    assert cache_bytes.__module__ == "FBCache_ms.predict.memory"
