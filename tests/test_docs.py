"""The pages that follow from declarations are as these are now, and what the README shows is there."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import commands
import pytest
import reference

from FBCache_ms.eval.fbcache import PROGRAMS
from FBCache_ms.eval.shared.arguments import Parser

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")))
OPTION = re.compile(r"(?<![\w-])--[a-z]\w+")


def test_every_field_and_preset_is_in_the_docs_as_it_is_declared():
    assert (ROOT / "docs" / "fields.md").read_text(encoding="utf-8") == reference.fields_page()


def sections():
    """{program: what docs/options.md has of it}."""
    parts = (ROOT / "docs" / "options.md").read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.partition("\n")[0]: part for part in parts}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_in_the_docs(program):
    """By its name: argparse lays help out otherwise in each Python."""
    assert set(OPTION.findall(sections()[program])) == set(OPTION.findall(reference.help_of(program)))


class Parsed(Exception):
    """Raised once a command line is parsed, before a program looks at files or does anything."""


PROGRAM = re.compile(
    r"(?:\.venv/bin/)?(?:fbcache (?=[a-z])|python -m FBCache_ms\.eval\.|python (?=benchmarks/|tools/docs/))(.+)"
)


def typed_on_pages():
    """(page, what follows fbcache, python or its -m) of every command line of a program of ours."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = [each.text for each in commands.commands_of(page, text) if each.language == "sh"]
        # With options, in a sentence: others are names of programs.
        lines += [line for line in re.findall(r"`([^`]+ --[^`]+)`", re.sub(r"\s+", " ", text)) if "--help" not in line]
        for line in dict.fromkeys(lines):
            found = PROGRAM.match(line)
            if found:
                yield page, found[1]


def module_of(program):
    """The module of a subcommand, or of a file."""
    if program in PROGRAMS:
        return import_module(f"FBCache_ms.eval.{PROGRAMS[program][0]}")
    return import_module(Path(program).stem if "/" in program else f"FBCache_ms.eval.{program}")


def test_a_command_on_a_page_is_one_that_its_program_takes(monkeypatch):
    parse_args, bad, found = Parser.parse_args, [], 0

    def parse_alone(self, *given):
        parse_args(self, *given)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_alone)
    monkeypatch.setattr(Parser, "error", lambda self, message: bad.append((page, typed, message)))
    for page, typed in typed_on_pages():
        found += 1
        program, *options = shlex.split(typed)
        with pytest.raises(Parsed):
            module_of(program).main(options)
    assert found > 40 and bad == []


def test_a_block_on_a_page_can_be_run_or_says_why_not():
    blocks = [each for each in commands.all_commands() if not each.inline]
    assert len(blocks) > 40 and sum(each.why_not is None for each in blocks) > 25
    # A block that names something of the reader's own cannot be run.
    named = [each for each in blocks if each.language == "sh" and commands.PLACEHOLDER.search(each.text)]
    assert named and [each for each in named if each.why_not is None] == []


def test_a_command_on_a_page_is_in_a_block_of_sh_and_a_mark_is_before_a_command():
    for page in commands.pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        found = list(commands.blocks(text))
        assert {language for language, _, _ in found} <= {None, "sh", "python"}
        marked = [(language, part) for language, part, mark in found if mark]
        assert text.count("<!-- not run") == len(marked)
        assert all(language or commands.INLINE.search(part) for language, part in marked)
        assert re.findall(r"\n\n    (?:\.venv/|fbcache |python|pip |msrun ).*", text) == []


def test_what_a_page_says_is_split_into_commands():
    text = (
        "Ask `.venv/bin/fbcache\ndoctor` or `.venv/bin/fbcache SUB --help`, and `.venv/bin/python`.\n\n"
        "<!-- not run here: why -->\n\n```sh\na \\\n    b\nc\n```\n\n```python\nd\n\ne\n```\n"
        "    .venv/bin/fbcache says\n"
    )
    found = [(each.language, each.text, each.why_not) for each in commands.commands_of("page", text)]
    assert found == [
        ("sh", ".venv/bin/fbcache doctor", None),
        ("sh", ".venv/bin/fbcache SUB --help", "SUB stands for something"),
        ("sh", "a b", "why"),
        ("sh", "c", "why"),
        ("python", "d\n\ne\n", None),
    ]


def test_the_readme_is_two_screens_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    files = {link.partition("#")[0] or "README.md" for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert len(files) > 10 and [file for file in files if not (ROOT / file).is_file()] == []


def test_commands_run_in_a_clone_and_a_page_begins_without_results(tmp_path, monkeypatch, capsys):
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "docs").mkdir(parents=True)
    (root / "mkdocs.yml").write_text("nav:\n  - Home: one.md\n")
    (root / "README.md").write_text(
        "```sh\npython3 -m venv .venv && false\nmkdir results\necho new > README.md\nfalse | true\nsleep 60\n```\n\n"
        "<!-- not run here: why -->\n\n```sh\nfalse\n```\n"
    )
    (root / "docs" / "one.md").write_text(
        "```sh\n! test -e results\ngit diff --exit-code\n```\n\n```python\nimport FBCache_ms.config\n```\n"
    )
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(commands, "ROOT", root)
    options = ["--python", sys.executable, "--timeout", "2", "--save_path", str(out)]
    assert commands.main([*options, "--list"]) == 0
    assert "| README.md | `false` | why |" in capsys.readouterr().out and not out.exists()
    assert commands.main(options) == 1
    said = capsys.readouterr().out
    ends = [line.split(" | ")[2:] for line in said.splitlines() if ".md |" in line]
    assert [status for status, _, _ in ends] == ["-", "0", "0", "1", "stopped", "-", "0", "0", "0"]
    assert [why[:-2] for _, _, why in ends if why != "- |"] == ["installs; --python gives the environment", "why"]
    assert "7 of 9 were run, and 2 of these failed." in said
    assert commands.main([*options, "--pages", "docs/one.md", "--match", "import"]) == 0
    assert "1 of 1 were run, and 0 of these failed." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.main([*options, "--pages", "docs/two.md"])
    assert "docs/two.md is none of README.md, docs/one.md" in capsys.readouterr().err
