"""Several processes, one a device, that draw one set of pictures: each its share, and the first one merges."""

import os
import sys
import time
from functools import lru_cache

PATIENCE = 30 * 60
"""Seconds without a new picture after which the first rank gives the others up."""


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


def wait_until_empty(missing, poll=0.5, patience=PATIENCE):
    """Waits until ``missing()``, a list of what the other ranks have yet to deliver, is empty.

    Raises OSError if it does not get shorter for ``patience`` seconds.
    """
    number, since = None, time.monotonic()
    while True:
        left = missing()
        if not left:
            return
        if len(left) != number:
            number, since = len(left), time.monotonic()
        elif time.monotonic() - since > patience:
            raise OSError(
                f"no new picture for {patience:g} s, and {len(left)} are missing, the first of them {left[0]}: "
                "a rank is gone; start again, and it goes on"
            )
        time.sleep(poll)
