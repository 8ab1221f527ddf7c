"""The command fbcache: what its help says, and what it hands to which program."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from FBCache_ms.eval import environment, fbcache, memory
from FBCache_ms.eval.environment import Part

ROOT = Path(__file__).parents[2]
CONSOLE = "import sys; sys.argv[0] = 'fbcache'; from FBCache_ms.eval.fbcache import main; sys.exit(main())"


def run(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def said_at_exit(capsys, *argv):
    """(status, stdout, stderr) of a command that ends by itself."""
    with pytest.raises(SystemExit) as ended:
        fbcache.main(list(argv))
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_help_is_one_screen_with_every_subcommand(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, said, errors = said_at_exit(capsys, *argv)
    lines = said.splitlines()
    assert (status, errors) == (0, "") and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert lines[0] == "usage: fbcache [--version] SUBCOMMAND [options]"
    listed = [line.split()[0] for line in lines if re.match("  [a-z]", line)]
    assert listed == [*fbcache.PROGRAMS, "fbcache", "fbcache", "fbcache"]


def test_the_examples_are_of_subcommands():
    programs = [line.split()[:2] for line in fbcache.EXAMPLES.splitlines()]
    assert [name for name, _ in programs] == ["fbcache"] * 3 and {sub for _, sub in programs} <= set(fbcache.PROGRAMS)


def test_the_version_is_the_packages(capsys):
    assert said_at_exit(capsys, "--version") == (0, f"fbcache {version('FBCache_ms')}\n", "")


def test_an_unknown_subcommand_is_told_its_neighbour(capsys):
    status, said, errors = said_at_exit(capsys, "swep", "--limit", "3")
    assert (status, said) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("fbcache: error: ") and errors.endswith("; did you mean sweep?\n")


@pytest.mark.parametrize("file", sorted((ROOT / "FBCache_ms").rglob("__main__.py")), ids=lambda file: file.parent.name)
def test_a_file_that_is_started_imports_by_whole_names(file):
    """MindSpore follows the imports of the file that was started, and knows no relative ones there."""
    assert all(not node.level for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom))


@pytest.mark.parametrize("name", fbcache.PROGRAMS)
def test_a_subcommand_gets_what_follows_it_and_gives_its_status(name, monkeypatch):
    asked = []
    program = SimpleNamespace(main=lambda argv: asked.append(argv) or 7)
    monkeypatch.setattr(fbcache, "import_module", lambda module: asked.append(module) or program)
    assert fbcache.main([name, "--help", "draw"]) == 7
    module = f"FBCache_ms.eval.{fbcache.PROGRAMS[name][0]}"
    assert asked == [module, ["--help", "draw"]] and (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_errors_keep_the_programs_name_and_what_was_typed_is_forgotten_behind_it(capsys):
    assert said_at_exit(capsys, "memory", "--text_len", "0")[::2] == (
        2,
        "memory: error: --text_len must be 1 or more, not 0\n",
    )
    assert said_at_exit(capsys, "memory", "--help")[1].startswith("usage: fbcache memory [options]\n")
    with pytest.raises(SystemExit):
        memory.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: memory [options]\n")


@pytest.mark.parametrize(
    "command, typed",
    [
        (["-c", CONSOLE], "fbcache"),
        (["-m", "FBCache_ms"], f"{Path(sys.executable).name} -m FBCache_ms"),
        (["FBCache_ms/eval/fbcache.py"], f"{Path(sys.executable).name} FBCache_ms/eval/fbcache.py"),
        ([str(ROOT / "FBCache_ms/eval/fbcache.py")], f"{Path(sys.executable).name} FBCache_ms/eval/fbcache.py"),
    ],
)
def test_however_it_is_started_usage_names_what_was_typed(command, typed):
    assert run(*command, "draw", "--help").stdout.startswith(f"usage: {typed} draw [--prompt TEXT] ")


def test_one_program_is_imported_and_nothing_of_mindspore():
    script = (
        "import sys; from FBCache_ms.eval import fbcache\n"
        "try: fbcache.main(['memory', '--help'])\n"
        "except SystemExit: print([name for name in sys.modules if name.startswith('mindspore')])\n"
        "print([name for name in sys.modules if name.startswith('FBCache_ms.eval.') and name.count('.') == 2])"
    )
    assert run("-c", script).stdout.splitlines()[-2:] == [
        "[]",
        "['FBCache_ms.eval.shared', 'FBCache_ms.eval.fbcache', 'FBCache_ms.eval.memory']",
    ]


def test_the_scripts_of_the_package_are_there():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^(\S+) = "FBCache_ms\.eval\.(\w+):main"$', text, re.MULTILINE) == [
        ("fbcache", "fbcache"),
        ("fbcache-flux", fbcache.PROGRAMS["draw"][0]),
    ]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_doctor_fails_if_a_part_is_wrong(wrong, capsys, monkeypatch):
    part = Part("mindspore", "1.0", ">=2.7.0", "1.0 is not supported" * wrong, wrong)
    monkeypatch.setattr(environment, "python_parts", lambda: [part])
    monkeypatch.setattr(environment, "is_ascend_machine", lambda: False)
    assert fbcache.main(["doctor"]) == int(wrong)
    said = capsys.readouterr().out.splitlines()
    assert said[2] == f"| mindspore | 1.0 | >=2.7.0 | {part.advice or 'ok'} |" and "CPU" in said[-1]
