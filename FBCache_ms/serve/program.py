"""The server from its start to its end."""

import asyncio
import logging
import signal
import socket
from contextlib import contextmanager, suppress

import uvicorn

from .api import make_app
from .child import Child
from .jobs import Desk, Failed
from .metrics import Metrics

logger = logging.getLogger(__name__)

LAST_SECONDS = 10
"""So long open connections may take at the end, when everything is drawn."""


class Server(uvicorn.Server):
    """uvicorn's, which leaves signals alone: they end the drawing first."""

    @contextmanager
    def capture_signals(self):
        yield


def listening(host, port):
    """A socket that listens there. Raises OSError, naming both, where that cannot be."""
    # By its protocol's number asyncio knows that it may switch Nagle's algorithm off, which costs 40 ms an answer.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(100)
        return listener
    except OSError as error:
        listener.close()
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from None


async def serve(settings, listener, start=Child.start, signals=(signal.SIGTERM, signal.SIGINT)):
    """Serves until one of the signals comes: then what is being drawn is finished. A second one does not wait for it.

    Raises ValueError where the model cannot be served.

    Args:
        settings: the Settings.
        listener: a socket that listens.
        start: coroutine start(settings, place) that starts a Child.
        signals: that end it.
    """
    metrics = Metrics()
    desk = Desk(settings, metrics, start)
    config = uvicorn.Config(
        make_app(settings, desk, metrics),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    server, loop = Server(config), asyncio.get_running_loop()

    async def end():
        await desk.idle.wait()
        server.should_exit = True

    def asked_to_end():
        if ending:
            server.should_exit = server.force_exit = True
            return
        logger.info("ending")
        desk.drain()
        ending.append(loop.create_task(end()))

    ending = []
    for number in signals:
        loop.add_signal_handler(number, asked_to_end)
    serving, drawing = loop.create_task(server.serve(sockets=[listener])), loop.create_task(desk.run())
    try:
        await asyncio.wait([serving, drawing], return_when=asyncio.FIRST_COMPLETED)
        if drawing.done():
            drawing.result()
    except Failed as failed:
        raise ValueError(str(failed)) from None
    finally:
        server.should_exit = True
        await serving
        drawing.cancel()
        with suppress(asyncio.CancelledError, Failed):
            await drawing
