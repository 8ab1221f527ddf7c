"""Runs the commands and the Python of README.md and docs/ in a fresh clone, and says how each of them ended.

    .venv/bin/python tools/docs/commands.py --list
    .venv/bin/python tools/docs/commands.py
    .venv/bin/python tools/docs/commands.py --python .venv/bin/python --pages README.md docs/memory.md

A block of ```sh holds commands, a block of ```python a script, and `.venv/bin/...` in a sentence is a command too. What
cannot be run on any CPU has its reason in a line of its own, before its block, paragraph, list or table:

    <!-- not run here: needs an NPU -->

The clone is of what is committed. A page begins without results of another one, but with its environment, which the
first command of README.md makes.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from FBCache_ms.eval.shared.arguments import Parser, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, write_text
from FBCache_ms.eval.shared.tables import markdown, publish

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- not run here: (.+) -->")
INLINE = re.compile(r"`(\.venv/bin/[^\s`]+ [^`]+)`")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|path/to/\S+|\.\.\.(?!\")")
"""A word that stands for something of the reader's own."""
INSTALLS = re.compile(r"(?:^|\.venv/bin/)pip install\b|-m venv \.venv\b")
"""What changes the environment in .venv."""


@dataclass(frozen=True)
class Command:
    """A command of a page, or a script.

    Args:
        page: its path from the repository's root.
        language: "sh" or "python".
        text: a command is one line.
        inline: whether it stands in a sentence.
        why_not: the reason that it is not run; None where it is.
    """

    page: str
    language: str
    text: str
    inline: bool = False
    why_not: Optional[str] = None

    @property
    def line(self):
        """What tells it in a table."""
        return f"`{self.text if self.language == 'sh' else self.text.strip().splitlines()[-1]}`"


def blocks(text):
    """(language, text, mark) of every fenced block of a page, and of the paragraphs between, whose language is None."""
    mark, lines = None, iter([*text.splitlines(), ""])
    part = []
    for line in lines:
        fence = re.match(r"```(\w*)$", line)
        if line.strip() and not fence:
            part.append(line)
            continue
        if part and MARK.fullmatch(part[-1]):
            *part, last = part
            yield from [(None, "\n".join(part), mark)] if part else []
            mark, part = MARK.fullmatch(last)[1], []
        elif part:
            yield None, "\n".join(part), mark
            mark, part = None, []
        if fence:
            inside = iter(lambda: next(lines), "```")
            yield fence[1], "".join(f"{line}\n" for line in inside), mark
            mark = None


def commands_of(page, text):
    """The Commands of a page."""
    found = []
    for language, part, mark in blocks(text):
        if language == "python":
            found.append(Command(page, language, part, why_not=mark))
        elif language == "sh":
            lines = re.sub(r"\\\n *", "", part).splitlines()
            found += [Command(page, language, line, why_not=mark) for line in lines]
        elif language is None and not part.startswith("    "):
            for line in INLINE.findall(re.sub(r"\s+", " ", part)):
                word = PLACEHOLDER.search(line)
                why_not = mark or (f"{word[0]} stands for something" if word else None)
                found.append(Command(page, "sh", line, True, why_not))
    return found


def pages():
    """The pages, from the repository's root: README.md, then the site's in its order, without docs/results/."""
    nav = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    return ["README.md", *(f"docs/{page}" for page in nav)]


def all_commands(chosen=None):
    """The Commands of some pages, or of all."""
    found = []
    for page in chosen or pages():
        found += commands_of(page, (ROOT / page).read_text(encoding="utf-8"))
    return found


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "commands", description=__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="say what would be run, and what not and why")
    add("--pages", nargs="+", metavar="PAGE", help="these alone, from the repository's root (default: all)")
    add("--match", metavar="TEXT", help="those alone that have this text in them (default: all)")
    add("--python", type=Path, metavar="PATH", help="of an environment to reuse; nothing is then installed")
    add("--timeout", type=int, default=1800, metavar="SECONDS", help="that a command may take")
    add_save_path(add, "./results/commands", "the table and what each command said")
    args = parser.parse_args(argv)
    try:
        check_range("timeout", args.timeout, 1)
        for page in args.pages or []:
            if page not in pages():
                raise ValueError(f"--pages {page} is none of {', '.join(pages())}")
        if args.python is not None and not args.python.is_file():
            raise ValueError(f"--python: there is no {args.python}")
        if not args.list:
            check_folder(args.save_path)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def why_not(command, args):
    """The reason that a command is not run; None where it is."""
    if command.why_not is None and args.python is not None and INSTALLS.search(command.text):
        return "installs; --python gives the environment"
    return command.why_not


class Clone:
    """A fresh clone in which commands run.

    Args:
        folder: an empty one, for the clone and what belongs to it.
        python: of an environment to reuse, or None.
    """

    def __init__(self, folder, python=None):
        self.folder, self.root = folder, folder / "FBCache_ms"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.root)], check=True)
        # As in a shell in which the environment is active.
        path = f"{self.root / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(folder / "cache")}
        for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"):
            self.environment.pop(name, None)
        if python is not None:
            (self.root / ".venv").symlink_to(Path(os.path.abspath(python)).parents[1])
            self.environment["PYTHONPATH"] = str(self.root)

    def begin_page(self):
        """Takes away what another page's commands have written; the environment stays."""
        subprocess.run(["git", "checkout", "-q", "."], cwd=self.root, check=True)
        shutil.rmtree(self.root / "results", ignore_errors=True)

    def run(self, command, timeout):
        """(status, seconds, what it said); the status is None for one that was stopped after so many seconds."""
        started = ["bash", "-euo", "pipefail", "-c", command.text]
        if command.language == "python":
            # Python looks for modules beside a script first, and the clone is no module.
            script = self.folder / "script" / "script.py"
            script.parent.mkdir(exist_ok=True)
            script.write_text(command.text, encoding="utf-8")
            started = [".venv/bin/python", str(script)]
        begin = time.monotonic()
        # A session of its own, so that what it has started can be stopped with it.
        process = subprocess.Popen(
            started,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            said, status = process.communicate(timeout=timeout)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, status = process.communicate()[0], None
        return status, time.monotonic() - begin, said.decode(errors="replace")


def run_all(commands, args):
    """Runs the commands, and returns a row for each."""
    rows, page = [], None
    with tempfile.TemporaryDirectory(prefix="FBCache_ms_commands_") as folder:
        clone = Clone(Path(folder), args.python)
        for number, command in enumerate(commands):
            if command.page != page:
                clone.begin_page()
                page = command.page
            row = {"Page": page, "Command": command.line, "Status": "-", "Seconds": "-", "Why Not": "-"}
            rows.append(row)
            why = why_not(command, args)
            if why is not None:
                row["Why Not"] = why
                continue
            status, seconds, said = clone.run(command, args.timeout)
            row.update(Status="stopped" if status is None else str(status), Seconds=f"{seconds:.0f}")
            write_text(args.save_path / f"{number}.txt", f"{command.text}\n\n{said}")
            print(f"{row['Status']:>7} {row['Seconds']:>5} s  {page}: {command.line}", file=sys.stderr, flush=True)
            if status != 0:
                print("".join(f"    {line}\n" for line in said.splitlines()[-20:]), file=sys.stderr, flush=True)
    return rows


def chosen_commands(args):
    """What the command line asks for; without an environment to reuse it begins with what makes one."""
    commands = [each for each in all_commands(args.pages) if args.match is None or args.match in each.text]
    begin = all_commands()[0]
    return commands if args.python is not None or begin in commands else [begin, *commands]


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    commands, failed = chosen_commands(args), []

    def work():
        if args.list:
            rows = [(command, why_not(command, args)) for command in commands]
            print(markdown([{"Page": each.page, "Command": each.line, "Why Not": why or "-"} for each, why in rows]))
            return
        rows = run_all(commands, args)
        failed.extend(row for row in rows if row["Status"] not in ("0", "-"))
        ran = sum(row["Status"] != "-" for row in rows)
        text = f"{markdown(rows)}\n{ran} of {len(rows)} were run, and {len(failed)} of these failed.\n"
        publish(args.save_path, "commands", text, rows, rows)

    return exit_status("commands", work) or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
