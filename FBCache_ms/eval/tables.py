"""Tables as the programs write them: Markdown for people, CSV and JSON for programs."""

import csv
import io

from FBCache_ms.eval.files import json_bytes, write_file, write_text


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


def spread(values, digits=3):
    """The median of numbers, and the least and the greatest: "0.612 (0.601 to 0.640)"."""
    import statistics

    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
