"""Imports that take less time, for programs, which wait for them at each start."""

import ast
import gc
import importlib
import importlib.util
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = "mindone"
LAZY = ("mindone.transformers", "mindone.transformers.models")
"""Packages that import some two hundred models, of which a pipeline needs two or three."""


@contextmanager
def quick_imports():
    """Within it, imports go without garbage collection, and import of mindone's text models those that are used."""
    collects = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module(ROOT)
        for name in LAZY:
            if name not in sys.modules:
                install(name)
        yield
    finally:
        # What they have made is to stay, and need not be gone through again and again.
        gc.freeze()
        if collects:
            gc.enable()


def install(name):
    """Puts a LazyPackage in the place of a package, unless its __init__.py does more than import and name constants."""
    spec, places, constants = importlib.util.find_spec(name), {}, {}
    for node in statements(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            places.update(imported(node, name))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants.update({target.id: node.value.value for target in node.targets})
        elif not isinstance(node, ast.Import):
            return
    parent, _, child = name.rpartition(".")
    package = sys.modules[name] = LazyPackage(spec, places, constants)
    setattr(sys.modules[parent], child, package)


def statements(tree):
    """A module's statements, those within an if included, without docstrings."""
    for node in tree.body:
        if isinstance(node, ast.If):
            yield from (*statements(node), *statements(ast.Module(node.orelse, [])))
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield node


def imported(node, package):
    """What an import statement of a package brings, {name: (module, what it is called there, None for the module)}."""
    module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    if node.names[0].name == "*":
        return public(module)
    own = {each.asname or each.name: each.name for each in node.names}
    if node.module is None:
        return {name: (f"{module}.{each}", None) for name, each in own.items()}
    return {name: (module, each) for name, each in own.items()}


def public(module):
    """What a star brings of a module: its __all__, or where it has none what it imports itself."""
    folder = Path(sys.modules[ROOT].__path__[0]).joinpath(*module.split(".")[1:])
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text, found = file.read_text(encoding="utf-8"), {}
    listed = re.search(r"^__all__ = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    if listed:
        return {name: (module, name) for name in ast.literal_eval(listed[1])}
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found.update(imported(node, module))
    return found


class LazyPackage(ModuleType):
    """Stands for a package, and has each name from where its __init__.py would import it, once it is asked for.

    Args:
        spec: the package's.
        places: {name: (module, what it is called there)}, the latter None for the module itself.
        constants: {name: value}.
    """

    def __init__(self, spec, places, constants):
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__file__ = spec, spec.loader, spec.origin
        self.__package__, self.__path__ = spec.name, spec.submodule_search_locations
        self.__all__, self._places = [*places, *constants], places
        vars(self).update(constants)

    def __getattr__(self, name):
        if name not in vars(self).get("_places", {}):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        place, own_name = self._places[name]
        module = importlib.import_module(place)
        vars(self)[name] = found = module if own_name is None else getattr(module, own_name)
        return found
