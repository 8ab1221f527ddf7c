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


def processor():
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
