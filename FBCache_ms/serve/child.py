"""The drawing process as the web process sees it: started, talked to, ended."""

import asyncio
import os
import pickle
import signal
import socket
import struct
import sys
from contextlib import suppress

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
"""CANN's environment variable with the NPUs that a process has."""


class Gone(Exception):
    """The drawing process has died, or does not answer."""


class Child:
    """A process that draws. Messages are those that painter.py tells of, in the form of multiprocessing's Connection.

    Args:
        process: asyncio's.
        reader, writer: of the socket to it.
    """

    def __init__(self, process, reader, writer):
        self.process, self.reader, self.writer = process, reader, writer

    @classmethod
    async def start(cls, settings, place):
        """Starts the one of a place, from 0 on, and tells it what to serve."""
        return await cls.launch(settings.for_painter(), device_of(place) if settings.replicas > 1 else {})

    @classmethod
    async def launch(cls, told, environment, module="FBCache_ms.serve.painter"):
        """Starts a process with these variables beside this one's, and sends it a first message."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = sys.executable, "-m", module, str(theirs.fileno())
            # In a session of its own, a terminal's Ctrl-C reaches the web process alone.
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **environment},
            )
        child = cls(process, *await asyncio.open_unix_connection(sock=ours))
        child.send(told)
        return child

    def send(self, message):
        """Sends a message, without waiting. One to a process that is gone is lost; ``receive`` tells of that."""
        data = pickle.dumps(message)
        self.writer.write(struct.pack("!i", len(data)) + data)

    async def receive(self, seconds=None):
        """The next message. Raises Gone where the process has died, or says nothing for so many seconds."""
        try:
            return await asyncio.wait_for(self._receive(), seconds)
        except asyncio.TimeoutError:
            raise Gone(f"the drawing process has said nothing for {seconds:g} s") from None
        except (EOFError, OSError):
            raise Gone("the drawing process has died") from None

    async def _receive(self):
        (size,) = struct.unpack("!i", await self.reader.readexactly(4))
        return pickle.loads(await self.reader.readexactly(size))

    async def gone(self):
        """Returns once it has died."""
        await self.process.wait()

    async def end(self):
        """Ends it, whatever it is doing."""
        if self.process.returncode is None:
            # Not process.kill(), which may reap the process before asyncio does.
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        self.writer.close()


def device_of(place):
    """The environment in which a process has one NPU: of all, or of those that this process has, that of its place."""
    own = os.environ.get(VISIBLE)
    return {VISIBLE: str(place) if own is None else own.split(",")[place]}
