"""Tables as the programs write them: Markdown for people, CSV and JSON for programs."""

import csv
import io
import re
import shutil
import sys
from importlib.util import find_spec

from FBCache_ms.eval.shared.files import json_bytes, put_into, say_written, write_file, write_text

KINDS = ("md", "csv", "json")
"""How a table's files end."""

FOLDED = 12
"""The least width, in letters, of a column of words on a terminal."""


def markdown(rows):
    """A Markdown table of a list of {column: text}, all with the same columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def write_tables(folder, name, text, rows, data):
    """Writes name.md with a text, name.csv with a list of {column: value} and name.json with data, into a folder."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.csv", table.getvalue())
    write_file(folder / f"{name}.json", lambda stream: stream.write(json_bytes(data)))


def publish(folder, name, text, rows, data, into=None, more=()):
    """Writes the tables, puts the text where --into says, shows it, and says where all lies, ``more`` files too."""
    write_tables(folder, name, text, rows, data)
    put_into(into, text)
    show(text)
    say_written(folder, *(f"{name}.{kind}" for kind in KINDS), *more)


def show(text):
    """Prints a text; on a terminal, where rich is installed, the columns of its Markdown tables are aligned."""
    if not sys.stdout.isatty() or find_spec("rich") is None:
        print(text, end="")
        return
    for part in re.split(r"((?:^\|.*\n)+)", text, flags=re.MULTILINE):
        if part.startswith("|"):
            print_aligned(*(line[2:-2].split(" | ") for line in part.splitlines()))
        else:
            print(part, end="")


def print_aligned(titles, rule, *rows):
    """Prints a table on the terminal; where it is too wide, columns of words are folded, and numbers never."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = [[cell.replace("\\|", "|").strip("`") for cell in row] for row in rows]
    least = 2
    for title, cells in zip(titles, zip(*rows)):
        words = any(cell and cell[0] not in "+-0123456789" and cell != "equal" for cell in cells)
        width = max(map(len, (*cells, *title.split())))
        width = min(width, FOLDED) if words else width
        side = "left" if words else "right"
        table.add_column(Text(title.strip("`")), justify=side, overflow="fold", min_width=width)
        least += width + 2
    for row in rows:
        table.add_row(*map(Text, row))
    # A narrower terminal breaks the lines itself; rich would leave columns out.
    size = shutil.get_terminal_size()
    Console(width=max(size.columns, least), height=size.lines).print(table)


def spread(values, digits=3):
    """The median of numbers, and the least and the greatest: "0.612 (0.601 to 0.640)"."""
    import statistics

    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
