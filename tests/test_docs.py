"""The pages that follow from declarations are as these are now, and what the README shows is there."""

import re
from pathlib import Path

import pytest
import reference

from FBCache_ms.eval.fbcache import PROGRAMS

ROOT = Path(__file__).parents[1]
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


def test_a_command_on_a_page_has_options_that_its_program_has():
    options, unknown, found = {name: set(OPTION.findall(text)) for name, text in sections().items()}, [], 0
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for program, rest in re.findall(r"bin/fbcache ([a-z]+)([^`\n]*)", text):
            found += 1
            unknown += [(page.name, program, name) for name in set(OPTION.findall(rest)) - options[program]]
    assert found > 20 and unknown == []


def test_the_readme_is_two_screens_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    files = {link.partition("#")[0] or "README.md" for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert len(files) > 10 and [file for file in files if not (ROOT / file).is_file()] == []
