import ast
import re
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.9", "3.10", "3.11", "3.12")
DISTRIBUTIONS = {"PIL": "pillow", "_pytest": "pytest", "skimage": "scikit-image"}
"""By module, where the names differ."""


def named(*extras):
    """The requirements of the package, and of its extras, by name."""
    wanted = {}
    for each in map(Requirement, requires("FBCache_ms")):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            wanted[canonicalize_name(each.name)] = each
    return wanted


def imported(folders):
    """The modules of other projects that the files in these folders import."""
    names = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(each.name.partition(".")[0] for each in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    return {name for name in names if find_spec(name) is None or "site-packages" in (find_spec(name).origin or "")}


def pins(file, python):
    """The requirements of a file, and of those that it names, on a version of Python."""
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from pins(line[3:], python)
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                yield requirement


@pytest.mark.parametrize(
    "folders, extras",
    [(["FBCache_ms"], ["eval", "serve", "ray"]), (["tests", "benchmarks", "examples"], ["eval", "test"])],
)
def test_whatever_is_imported_is_named(folders, extras):
    modules = imported(folders)
    assert {"mindspore", "mindone", "PIL"} <= modules
    assert {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in modules} <= set(named(*extras))


@pytest.mark.parametrize(
    "file, python", [("requirements.txt", python) for python in PYTHONS] + [("requirements-newest.txt", "3.12")]
)
def test_a_python_gets_one_version_of_each_requirement_and_an_admitted_one(file, python):
    found = {}
    for pin in pins(file, python):
        assert canonicalize_name(pin.name) not in found
        (found[canonicalize_name(pin.name)],) = pin.specifier
    for name, requirement in named("eval", "serve").items():
        assert requirement.specifier.contains(found[name].version)


@pytest.mark.parametrize("python", ["3.8", "3.13", "3.14"])
def test_another_python_is_told_which_ones_there_are(python):
    assert next(pins("requirements.txt", python)).specifier == "==2.10.0+runs.on.Python.3.9.to.3.12"


def test_the_readme_shows_the_commands_that_ci_runs():
    commands = re.findall(r"^\w+='(.+/pytest.*)'$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(commands) == 2 and set(commands) <= {line.strip() for line in lines}
