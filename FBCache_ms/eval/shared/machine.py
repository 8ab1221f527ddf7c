"""What a program ran on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine():
    """The processor, how many of its cores this process may use, and the versions, as a dictionary."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mindspore", "mindone", "numpy", "FBCache_ms")},
    }


def machine_text():
    """The same in words: "2 cores of NAME, MindSpore 2.7.0, mindone 0.5.0, Python 3.11.7"."""
    here = machine()
    cores = f"{here['cores']} core{'s' * (here['cores'] != 1)}"
    return (
        f"{cores} of {here['processor']}, MindSpore {here['mindspore']}, mindone {here['mindone']}, "
        f"Python {here['python']}"
    )


def processor():
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
