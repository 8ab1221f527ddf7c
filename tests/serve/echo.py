"""A process for test_child.py in place of the one that draws: it sends back what it gets, and dies where told."""

import os
import sys
import threading
import time
from multiprocessing.connection import Connection


def main(fd):
    """The process; without the other end of its socket it ends, as painter.py does."""
    connection, waiting = Connection(fd), []

    def listen():
        try:
            while True:
                waiting.append(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        if waiting and waiting[0] == "die":
            os._exit(1)
        if waiting:
            connection.send(waiting.pop(0))
        time.sleep(0.005)


if __name__ == "__main__":
    main(int(sys.argv[1]))
