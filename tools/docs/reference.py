"""Writes the pages of docs/ that follow from declarations: every field and preset, and every program's options.

.venv/bin/python tools/docs/reference.py
"""

import os
import subprocess
import sys
from pathlib import Path

from FBCache_ms.config import FITTED, OPTIONS, PRESETS
from FBCache_ms.eval.fbcache import PROGRAMS
from FBCache_ms.eval.shared.arguments import GROUPS
from FBCache_ms.eval.shared.tables import markdown
from FBCache_ms.rules.options import value_text

ROOT = Path(__file__).parents[2]
COLUMNS = "100"
"""Of a program's help."""


def code(words):
    """Words as code, with commas between them."""
    return ", ".join(f"`{word}`" for word in words)


def field(name, option):
    """A field's row."""
    text = option.text.replace("|", "&#124;").replace("*", "\\*")
    if option.used_with:
        other, values = option.used_with
        text += f" (takes effect with `{other}` {code(values)})"
    return {
        "Field": f"`{name}`",
        "Range": code(option.allowed) if option.kind is str else option.range,
        "Default": "none" if option.default is None else f"`{value_text(option.default)}`",
        "What it does": text,
    }


def fields_page():
    """docs/fields.md."""
    tags = {name: f"`{tag}`" for name, tag in PRESETS.items()}
    # A table of weights is no reading.
    tags.update({name: f"in `FBCache_ms/presets/{name}.json`" for name in FITTED})
    presets = [{"Preset": f"`{name}`", "Tag": tag} for name, tag in tags.items()]
    parts = [
        "# Every field and preset\n\nWritten from the declarations by `tools/docs/reference.py`. "
        "[Settings](settings.md#words) defines the words.\n",
        f"## Presets\n\n{markdown(presets)}",
    ]
    for group, title in GROUPS.items():
        rows = [field(name, option) for name, option in OPTIONS.items() if option.group == group]
        parts.append(f"## {title.capitalize()}\n\n{markdown(rows)}")
    return "\n".join(parts)


def help_of(program):
    """What ``fbcache PROGRAM --help`` prints."""
    command = [sys.executable, "-m", "FBCache_ms", program, "--help"]
    environment = {**os.environ, "COLUMNS": COLUMNS}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return text.replace("python -m FBCache_ms", "fbcache").replace(f"{ROOT}/", "")


def options_page():
    """docs/options.md."""
    parts = ["# Every option\n\nWritten by `tools/docs/reference.py`: what `fbcache SUB --help` prints.\n"]
    for program in PROGRAMS:
        lines = help_of(program).rstrip().splitlines()
        parts.append(f"## {program}\n\n" + "".join(f"    {line}".rstrip() + "\n" for line in lines))
    return "\n".join(parts)


def main():
    """Writes them."""
    for name, page in {"fields.md": fields_page, "options.md": options_page}.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
