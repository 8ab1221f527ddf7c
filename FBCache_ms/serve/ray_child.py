"""Drawing processes on the hosts of a Ray cluster: Ray finds each a place with an NPU, the web process does the rest.

An actor of Ray's is on the drawing process's host, and hands messages on. It is no deployment of Ray Serve's, which
takes a request from one process to another once it has begun: a client that leaves could not stop it.
"""

import asyncio
import os
from contextlib import suppress

import ray
from ray.exceptions import RayError

from .child import VISIBLE, Child, Gone

THREADS = "OMP_NUM_THREADS"
OWN_THREADS = os.environ.get(THREADS)
"""Ray sets it to 1 where it is not set, here as on its hosts."""

END_SECONDS = 5
"""So long a host may take to end a drawing process; if it is gone, so is that."""


def join(address, settings):
    """Joins a cluster. Raises ValueError where none is, or where it has too few NPUs."""
    try:
        ray.init(address)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise ValueError(f"--ray {address}: {error}") from None
    npus = int(ray.cluster_resources().get("NPU", 0))
    if settings.model.device != "CPU" and npus < settings.replicas:
        raise ValueError(f"--replicas {settings.replicas}: the Ray cluster at {address} has {npus} NPUs")


class Messenger:
    """Ray's actor: a Child on another host."""

    async def launch(self, told, threads):
        """Starts the drawing process, on the NPU that Ray has set aside for this actor."""
        os.environ.pop(THREADS, None)
        npus = ray.get_runtime_context().get_accelerator_ids().get("NPU", [])
        environment = {VISIBLE: ",".join(npus)} if npus else {}
        self.child = await Child.launch(told, {**environment, **({} if threads is None else {THREADS: threads})})

    async def send(self, message):
        """Child.send."""
        self.child.send(message)

    async def receive(self):
        """Child.receive."""
        return await self.child.receive()

    async def gone(self):
        """Child.gone."""
        await self.child.gone()

    async def end(self):
        """Child.end."""
        await self.child.end()


class RayChild:
    """A drawing process somewhere in the cluster, as child.Child.

    Args:
        actor: a Messenger's handle.
    """

    def __init__(self, actor):
        self.actor, self.watch = actor, None

    @classmethod
    async def start(cls, settings, place):
        """Starts it where Ray finds room, and tells it what to serve."""
        room = {"num_cpus": 1} if settings.model.device == "CPU" else {"num_cpus": 0, "resources": {"NPU": 1}}
        child = cls(ray.remote(Messenger).options(**room).remote())
        try:
            launched = child.actor.launch.remote(settings.for_painter(), OWN_THREADS)
            await asyncio.wait_for(launched, settings.start_timeout)
        except asyncio.TimeoutError:
            await child.end()
            raise Gone(f"Ray has found no room for a drawing process in {settings.start_timeout:g} s") from None
        except RayError:
            raise Gone("the drawing process has not started") from None
        return child

    def send(self, message):
        """Sends a message, without waiting. One to a process that is gone is lost; ``receive`` tells of that."""
        self.actor.send.remote(message)

    async def receive(self, seconds=None):
        """The next message. Raises Gone where the process or its host has died, or says nothing for so many seconds."""
        try:
            return await asyncio.wait_for(self.actor.receive.remote(), seconds)
        except asyncio.TimeoutError:
            raise Gone(f"the drawing process has said nothing for {seconds:g} s") from None
        except (RayError, Gone):
            raise Gone("the drawing process has died") from None

    async def gone(self):
        """Returns once it has died."""
        # An actor goes on with a call that nobody awaits any more, and has room for 1000.
        if self.watch is None:
            self.watch = asyncio.ensure_future(self._gone())
        await asyncio.shield(self.watch)

    async def _gone(self):
        with suppress(RayError):
            await self.actor.gone.remote()

    async def end(self):
        """Ends it, whatever it is doing; gives its place back."""
        with suppress(RayError, asyncio.TimeoutError):
            await asyncio.wait_for(self.actor.end.remote(), END_SECONDS)
        ray.kill(self.actor)
