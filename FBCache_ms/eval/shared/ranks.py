"""Several processes, one a device, that draw one set of pictures: each its share, and the first one merges.

Where several processes share a picture, each such group draws its share, and its first process stands for it.
"""

import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import lru_cache

PATIENCE = 30 * 60
"""Seconds without a new picture after which the first rank gives the others up."""

BEAT, SILENCE = 10, 100
"""Seconds between two signs of life of a rank, and those after which one that gave none is dead."""

BEATING = """
import os, sys, time
while os.getppid() == int(sys.argv[2]):
    os.utime(sys.argv[1])
    time.sleep(float(sys.argv[3]))
"""
"""A process of its own, since one that compiles may run nothing else for minutes; it ends with the rank."""

_watched = []


def group_and_groups(shared):
    """The number of this process's group, of ``shared`` processes that share a picture, and how many groups there are.

    Raises ValueError if msrun has not started such groups, and as rank_and_world does.
    """
    if shared == 1:
        return rank_and_world()
    world = int(os.environ.get("MS_WORKER_NUM", 1))
    if world % shared:
        raise ValueError(f"--context_parallel {shared}: msrun has to start a multiple of that, not {world} processes")
    return int(os.environ.get("MS_NODE_ID", 0)) // shared, world // shared


def is_follower(shared):
    """Whether another process stands for this one, of those that share a picture."""
    return shared > 1 and int(os.environ.get("MS_NODE_ID", 0)) % shared > 0


@lru_cache(maxsize=None)
def rank_and_world():
    """This process's rank and how many there are: (0, 1) unless MindSpore's launcher msrun started it.

    The ranks share a folder and nothing else, so none of them joins msrun's cluster: a rank that dies is seen by msrun
    at once, and its scheduler process ends here.

    Raises ValueError if msrun was started on several hosts without --node_rank.
    """
    role = os.environ.get("MS_ROLE")
    if role == "MS_SCHED":
        sys.exit(0)
    if role != "MS_WORKER":
        return 0, 1
    if "MS_NODE_ID" not in os.environ:
        raise ValueError("msrun was not told which host this is: give it --node_rank on each host")
    rank, world = int(os.environ["MS_NODE_ID"]), int(os.environ["MS_WORKER_NUM"])
    for name in ("MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT"):
        os.environ.pop(name, None)
    return rank, world


@contextmanager
def signs_of_life(folder, ranks):
    """Shows the other ranks of a folder that this one lives; while it lasts, wait_until_empty tells of one that died.

    A rank that has not begun, or has ended as it should, has no file there.
    """
    (rank, world), files = ranks, [folder / f".alive.{number}" for number in range(ranks[1])]
    if world == 1:
        yield
        return
    files[rank].touch()
    for number in silent(files, rank):
        # Of a run that was killed before.
        with suppress(FileNotFoundError):
            files[number].unlink()
    beating = subprocess.Popen([sys.executable, "-SEc", BEATING, files[rank], str(os.getpid()), str(BEAT)])
    _watched.append((files, rank))
    try:
        yield
    finally:
        _watched.pop()
        beating.kill()
        beating.wait()
        files[rank].unlink(missing_ok=True)


def silent(files, rank):
    """The ranks whose last sign of life is too long before this one's; both are told by the clock of the folder."""
    ages = {}
    for number, file in enumerate(files):
        with suppress(FileNotFoundError):
            ages[number] = file.stat().st_mtime
    return [number for number, when in ages.items() if ages.get(rank, when) - when > SILENCE]


def wait_until_empty(missing, poll=0.5, patience=PATIENCE):
    """Waits until ``missing()``, a list of what the other ranks have yet to deliver, is empty.

    Raises OSError if a rank has died, or if the list does not get shorter for ``patience`` seconds.
    """
    number, since = None, time.monotonic()
    while True:
        left = missing()
        if not left:
            return
        dead = [rank for watched in _watched for rank in silent(*watched)]
        if dead:
            raise OSError(
                f"rank {dead[0]} has given no sign of life for {SILENCE} s, and {len(left)} files are missing, the "
                f"first of them {left[0]}; start again, and it goes on"
            )
        if len(left) != number:
            number, since = len(left), time.monotonic()
        elif time.monotonic() - since > patience:
            raise OSError(
                f"no new picture for {patience:g} s, and {len(left)} are missing, the first of them {left[0]}: "
                "a rank is gone; start again, and it goes on"
            )
        time.sleep(poll)
