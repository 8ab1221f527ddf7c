"""Files that are there whole or not at all, in folders that one run at a time writes to."""

import fcntl
import json
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from FBCache_ms.eval.shared.machine import machine_text


def check_folder(path, option="save_path"):
    """Makes an option's folder. Raises OSError, naming both, if that cannot be, or nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f"--{option} {path} cannot be written: {error.strerror}") from None


LEFT_OVER = 3600
"""Seconds after which an unfinished file belongs to no process any more."""


@contextmanager
def locked(path, rank=0):
    """Keeps this rank of other runs out of a folder; the system lets go of it however the process ends.

    Raises OSError if another run is at work there, or the folder's file system cannot tell.
    """
    lock = path / f".lock.{rank}"
    with _held(lock, path):
        try:
            clear(path)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _held(lock, path):
    """The open file of a lock that this process holds; its own name still leads to it."""
    # Not filelock's: it leaves its file behind, and takes a file system that cannot lock for another run.
    while True:
        stream = open(lock, "w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.close()
            if isinstance(error, BlockingIOError):
                raise OSError(f"--save_path {path}: another run is at work in this folder") from None
            lock.unlink(missing_ok=True)
            raise OSError(f"--save_path {path} is on a file system that cannot lock: {error.strerror}") from None
        # A run that ends takes its file away. Whoever opened that before holds a lock that no other run sees.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), os.stat(lock)):
                return stream
        stream.close()


def clear(folder):
    """Removes what killed processes left unfinished in a folder."""
    for part in folder.glob(".*.*.part"):
        with suppress(FileNotFoundError):  # Another rank has finished it.
            if time.time() - part.stat().st_mtime > LEFT_OVER:
                part.unlink()


def write_file(path, write_to):
    """Writes a file through ``write_to(stream)``, under its name only once it is whole and on the disk.

    A process that is killed leaves at most a hidden ``.part`` file, which a later run clears away.
    """
    with (
        naming(path),
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as stream,
    ):
        try:
            write_to(stream)
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, path)
        except BaseException:
            os.unlink(stream.name)
            raise


@contextmanager
def naming(path):
    """Gives the file's name to an error of the system that lacks it, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def write_text(path, text):
    """Writes a text, whole or not at all."""
    write_file(path, lambda stream: stream.write(text.encode()))


def json_bytes(value):
    """A value as JSON; numbers that JSON does not have, as the PSNR of equal pictures, become null."""
    return (json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n").encode()


def finite(value):
    """The same with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_written(folder, *names):
    """Says on stderr where a program's files lie, so that a table that is redirected stays a table."""
    print(f"written to {folder}: {', '.join(names)}", file=sys.stderr)


@dataclass(frozen=True)
class Into:
    """Where --into puts a program's table.

    Args:
        file: is written anew.
        title: the heading of a new one; another's heading stays.
        command: what was typed.
    """

    file: Path
    title: str
    command: str


def check_into(into):
    """Raises ValueError if an Into's file is a folder, or there is no folder for it; None is right."""
    if into is not None and into.file.is_dir():
        raise ValueError(f"--into: {into.file} is a folder, not a file")
    if into is not None and not into.file.parent.is_dir():
        raise ValueError(f"--into {into.file}: there is no folder {into.file.parent}")


def put_into(into, text):
    """Writes a text into an Into's file, below how, when and on what it was made; None is nowhere."""
    if into is not None:
        made = f"Made by `{into.command}`, on {date.today()}, on {machine_text()}."
        heading = f"# {into.title}"
        if into.file.is_file():
            first = into.file.read_text(encoding="utf-8").partition("\n")[0]
            heading = first if first.startswith("# ") else heading
        write_text(into.file, f"{heading}\n\n{made}\n\n{text}")
