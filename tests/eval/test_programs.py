"""What all programs share: how they are started, what their help says, and what they leave and where."""

import argparse
import importlib
import os
import pty
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from FBCache_ms.eval.shared import files, machine, tables
from FBCache_ms.eval.shared.arguments import Parser, add_into_option

ROOT = Path(__file__).parents[2]
EVAL = [f"FBCache_ms.eval.{path.stem}" for path in sorted((ROOT / "FBCache_ms" / "eval").glob("*.py"))]
PROGRAMS = [
    *(name for name in EVAL if "Parser(__name__" in (ROOT / f"{name.replace('.', '/')}.py").read_text()),
    *(path.stem for path in sorted((ROOT / "benchmarks").glob("*.py"))),
]


@pytest.fixture
def parser(request, monkeypatch):
    """The Parser of a program, as it is when it is asked to parse."""

    class Asked(Exception):
        pass

    def ask(parser, *args):
        raise Asked(parser)

    monkeypatch.setattr(Parser, "parse_known_args", ask)
    with pytest.raises(Asked) as asked:
        importlib.import_module(request.param).main([])
    return asked.value.args[0]


def of_every_program(test):
    return pytest.mark.parametrize("parser", PROGRAMS, indirect=True)(test)


@of_every_program
def test_every_option_says_its_default(parser, monkeypatch):
    formatter = parser._get_formatter()
    for action in parser._actions:
        # A flag that is not given is off; what must be given has no default.
        if action.required or action.nargs == 0:
            assert action.help, action.dest
            continue
        help = formatter._expand_help(action)
        assert help.count("default: ") == 1 and not help.startswith("("), (action.dest, help)
        told = help.split("default: ")[1]
        assert not any(word in told for word in ("None", "True", "False", "[", "object", "Path(")), help
        values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        if "(default: " not in (action.help or "") and "default: " not in (action.help or ""):
            assert told == f"{' '.join(map(str, values)) if action.default not in (None, []) else 'none'})", help


@of_every_program
def test_usage_is_one_line_with_all_that_is_required(parser):
    usage = parser.format_usage()
    assert usage.startswith(f"usage: {parser.prog} ") and usage.rstrip().endswith("[options]")
    assert len(usage.splitlines()) == 1
    for action in parser._actions:
        if action.required:
            assert (action.option_strings or [action.metavar])[0] in usage


@pytest.mark.parametrize("parser", ["FBCache_ms.eval.memory"], indirect=True)
def test_help_fits_a_narrow_terminal(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, parser.format_help().splitlines())) <= 60


@pytest.mark.parametrize(
    "command, shown",
    [
        (["-m", "FBCache_ms.eval.memory"], "-m FBCache_ms.eval.memory"),
        (["FBCache_ms/eval/memory.py"], "FBCache_ms/eval/memory.py"),
        (["-c", "from FBCache_ms.eval import memory; memory.main()"], None),
    ],
)
def test_usage_names_what_was_typed(command, shown):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, *command, "--help"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    name = f"{Path(sys.executable).name} {shown}" if shown else "memory"
    assert said.splitlines()[0] == f"usage: {name} [options]"


def test_a_mistyped_option_or_word_is_told_its_neighbour(capsys):
    parser = Parser("here", "here")
    parser.add_argument("--image_size")
    parser.add_argument("--cases", choices=("fbcache", "teacache", "rules"), nargs="+")
    for arguments, meant in (["--imagesize=3"], "--image_size"), (["--cases", "Teacach"], "teacache"):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        said = capsys.readouterr().err
        assert said.startswith("here: error: ") and said.endswith(f"; did you mean {meant}?\n")
    with pytest.raises(SystemExit):
        parser.parse_args(["--xyz"])
    assert capsys.readouterr().err == "here: error: unrecognized arguments: --xyz\n"
    assert parser.parse_args([]) == argparse.Namespace(image_size=None, cases=None)


ROWS = [
    {"Case": "one of many words and more of them", "`--cache`": "`F1B0_W0_R0.12,gate=teacache`", "Time (s)": "0.1"},
    {"Case": "a | b", "`--cache`": "`teacache`", "Time (s)": "12.34"},
]


def terminal(monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")


def test_a_table_is_aligned_on_a_terminal_and_markdown_elsewhere(capsys, monkeypatch):
    text = f"before [red]\n\n{tables.markdown(ROWS)}\nbehind"
    tables.show(text)
    assert capsys.readouterr().out == text
    terminal(monkeypatch, 100)
    tables.show(text)
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert said[0] == "before [red]" and said[-1] == "behind"
    titles, _, first, second = said[1:-1]
    assert titles.split() == ["Case", "--cache", "Time", "(s)"]
    assert first.endswith("0.1") and second.endswith("12.34") and len(first) == len(second) == len(titles)
    assert titles.index("--cache") == first.index("F1B0_W0_R0.12,gate=teacache") == second.index("teacache")
    assert second.split("  ")[0].strip() == "a | b"


@pytest.mark.parametrize("columns", [20, 50])
def test_a_table_that_is_too_wide_folds_words_and_loses_nothing(columns, capsys, monkeypatch):
    terminal(monkeypatch, columns)
    tables.show(tables.markdown(ROWS))
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(lines)
    assert all(word in text for word in ("0.1", "12.34", "many", "words", "teacache"))
    cells = "".join(line[line.find("F1B0") :].split("  ")[0] for line in lines if "F1B0" in line)
    assert cells and max(map(len, lines)) <= max(columns, 50)


def test_without_rich_a_terminal_gets_markdown(capsys, monkeypatch):
    terminal(monkeypatch, 100)
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    tables.show(tables.markdown(ROWS))
    assert capsys.readouterr().out == tables.markdown(ROWS)


def test_a_program_puts_its_table_alone_on_stdout_and_says_where_it_wrote(tmp_path):
    command = [sys.executable, "-m", "FBCache_ms.eval.memory", "--sides", "64", "--save_path", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (tmp_path / "memory.md").read_text() and done.stdout.startswith("| Cache |")
    assert done.stderr == f"written to {tmp_path}: memory.md, memory.csv, memory.json\n"
    ours, theirs = pty.openpty()
    done = subprocess.run(command, env=environment, stdout=theirs, stderr=subprocess.PIPE, check=True)
    os.close(theirs)
    said = os.read(ours, 100_000).decode()
    assert "| Cache |" not in said and "--cache" in said and "F1B0_W0_T0O0_R0.12" in said


def test_into_writes_the_table_anew_with_how_it_was_made(tmp_path, monkeypatch):
    here = {"cores": 2, "processor": "A Chip", "mindspore": "2.7.0", "mindone": "0.5.0", "python": "3.11.7"}
    monkeypatch.setattr(machine, "machine", lambda: here)
    page, text = tmp_path / "page.md", "| é |\n"
    parser = Parser("here", "cost_model")
    add_into_option(parser)
    assert parser.parse_args([]).into is None
    files.put_into(parser.parse_args(["--into", str(page)]).into, text)
    assert page.read_text(encoding="utf-8") == (
        f"# Cost model\n\nMade by `cost_model --into {page}`, on {date.today().isoformat()}, on 2 cores of A Chip, "
        "MindSpore 2.7.0, mindone 0.5.0, Python 3.11.7.\n\n| é |\n"
    )
    page.write_text("# A heading\n\nold\n")
    files.put_into(parser.parse_args(["--into", str(page)]).into, text)
    assert page.read_text(encoding="utf-8").startswith(f"# A heading\n\nMade by `cost_model --into {page}`, on ")
    page.write_text("")
    files.put_into(parser.parse_args(["--into", str(page)]).into, text)
    assert page.read_text(encoding="utf-8").startswith("# Cost model\n\nMade by ")
    here["cores"] = 1
    assert machine.machine_text().startswith("1 core of A Chip, ")


@pytest.mark.parametrize(
    "command, typed",
    [
        (["-m", "FBCache_ms", "memory"], "python -m FBCache_ms memory"),
        ([str(ROOT / "FBCache_ms" / "eval" / "memory.py")], "python FBCache_ms/eval/memory.py"),
    ],
)
def test_into_says_what_was_typed(command, typed, tmp_path):
    options = ["--cache", "fora", "F1B0_W0_R0.1", "--sides", "64", "--save_path", str(tmp_path)]
    options += ["--into", str(tmp_path / "a page.md")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    subprocess.run([sys.executable, *command, *options], cwd=ROOT, env=environment, capture_output=True, check=True)
    made = (tmp_path / "a page.md").read_text().splitlines()[2]
    typed = typed.replace("python", Path(sys.executable).name)
    assert made.startswith(f"Made by `{typed} {shlex.join(options)}`, on ")


def test_a_folder_is_locked_while_a_run_is_at_work_and_no_lock_is_left(tmp_path):
    with files.locked(tmp_path):
        with pytest.raises(OSError, match="another run is at work"), files.locked(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == [tmp_path / ".lock.0"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), files.locked(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_run_took_away_meanwhile_is_none(tmp_path, monkeypatch):
    flock, opened = files.fcntl.flock, []

    def late(stream, how):
        # Between opening and locking the run that had the file ends, and another one begins.
        if not opened:
            opened.append(stream)
            (tmp_path / ".lock.0").unlink()
            other = open(tmp_path / ".lock.0", "w")
            flock(other, how)
            opened.append(other)
        flock(stream, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(OSError, match="another run is at work"), files.locked(tmp_path):
        pass
    opened[1].close()
    with files.locked(tmp_path):
        pass


def test_a_file_system_that_cannot_lock_is_told_and_left_clean(tmp_path, monkeypatch):
    def cannot(stream, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", cannot)
    with pytest.raises(OSError, match="cannot lock: Operation not supported"), files.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
