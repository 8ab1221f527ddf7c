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


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_in_the_docs(program):
    """By its name: argparse lays help out otherwise in each Python."""
    section = (ROOT / "docs" / "options.md").read_text(encoding="utf-8").split(f"\n## {program}\n")[1].split("\n## ")[0]
    assert set(OPTION.findall(section)) == set(OPTION.findall(reference.help_of(program)))


def test_the_readme_is_two_screens_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    files = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert len(files) > 10 and [file for file in files if not (ROOT / file).is_file()] == []
