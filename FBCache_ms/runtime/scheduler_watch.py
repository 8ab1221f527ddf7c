"""Ends msrun's scheduler once all of its processes on this host are gone.

It would go on waiting for them: half a minute, and ten minutes for one that was killed before it had joined. The
scheduler starts this file as a process of its own, with its process number.
"""

import os
import signal
import sys
import time
from pathlib import Path

GRACE = 20
"""Seconds that the scheduler has to end by itself."""

JOB = "MS_SCHED_HOST", "MS_SCHED_PORT"
"""What all processes of one msrun have in common in their environment."""


def environment(process):
    """A process's, {name: value}; empty for one that is gone."""
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def workers(job):
    """The numbers of a job's working processes on this host."""
    found = {process: environment(process) for process in filter(str.isdigit, os.listdir("/proc"))}
    return [
        process
        for process, each in found.items()
        if each.get("MS_ROLE") == "MS_WORKER" and [each.get(name) for name in JOB] == job
    ]


def by_msrun(process):
    """Whether msrun has started a process: then there are workers on its host, from the beginning."""
    with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as stat:
        parent = stat.read().rpartition(")")[2].split()[1]
    return b"msrun" in Path(f"/proc/{parent}/cmdline").read_bytes()


def watch(scheduler, grace=GRACE, pause=1):
    """Waits until the scheduler, this process's parent, has ended; kills it ``grace`` seconds after the last worker.

    One that was started by hand, and whose workers are all on other hosts, is left alone.
    """
    job, seen, left = [os.environ.get(name) for name in JOB], by_msrun(scheduler), time.monotonic()
    while os.getppid() == scheduler:
        there = bool(workers(job))
        seen, left = seen or there, time.monotonic() if there else left
        if seen and time.monotonic() - left > grace:
            print("all processes of this host are gone: the scheduler is ended", file=sys.stderr)
            os.kill(scheduler, signal.SIGKILL)
            return
        time.sleep(pause)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
