"""A drawing process that draws at once, and does as prompts say; a server with it, in a thread."""

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from FBCache_ms.config import CacheConfig
from FBCache_ms.serve.child import Gone
from FBCache_ms.serve.program import listening, serve
from FBCache_ms.serve.settings import Settings

SETTINGS = Settings(
    model=SimpleNamespace(),
    name="tiny_flux",
    pipeline="FluxPipeline",
    guidance={"guidance_scale": 3.5, "true_cfg_scale": 1.0},
    blocks=(4, 8),
    sizes=((64, 64), (96, 64)),
    presets={"balanced": CacheConfig.preset("balanced"), "teacache": CacheConfig.preset("teacache")},
    queue=2,
    painter_timeout=5,
)


def pixels_of(drawing):
    """What a FakeChild draws: anything that follows from the Drawing."""
    words = [ord(letter) for letter in drawing.prompt + drawing.tag]
    size = drawing.height, drawing.width, 3
    return np.random.default_rng([drawing.seed, drawing.steps, *words]).integers(0, 256, size, np.uint8)


class FakeChild:
    """Stands for child.Child. A prompt that begins with

    - "slow" is drawn until somebody cancels it, step after step;
    - "die" kills the drawing process, "die once" the first one alone;
    - "hang" is never answered;
    - "refuse" and "fail" are answered so.

    Args:
        told: a list that gets every message.
        broken: whether it cannot load the model.
    """

    def __init__(self, told, broken=False):
        self.told, self.messages, self.dead = told, asyncio.Queue(), asyncio.Event()
        self.cancelled, self.tasks = set(), []
        if broken:
            self.messages.put_nowait(("failed", "the device is broken"))
            return
        self.messages.put_nowait(("compiled", 1, 1, 1))
        self.messages.put_nowait(("ready", {}))

    def send(self, message):
        self.told.append(message)
        if message[0] == "cancel":
            self.cancelled.add(message[1])
        else:
            self.tasks.append(asyncio.ensure_future(self.draw(*message[1:])))

    async def draw(self, number, drawings):
        drawing = drawings[0]
        first = len([each for each in self.told if each[0] == "draw" and each[2][0].prompt == drawing.prompt]) == 1
        if drawing.prompt.startswith("die") and (first or not drawing.prompt.startswith("die once")):
            self.dead.set()
            return
        if drawing.prompt.startswith("hang"):
            return
        for which, each in enumerate(drawings):
            if each.prompt.startswith("refuse"):
                self.messages.put_nowait(("refused", number, which, "it has to be another"))
                return
        if drawing.prompt.startswith("fail"):
            self.messages.put_nowait(("error", number, "it cannot be shown"))
            return
        step = 0
        while step < drawing.steps or drawing.prompt.startswith("slow"):
            step += 1
            if number in self.cancelled:
                self.messages.put_nowait(("cancelled", number))
                return
            if drawing.watched:
                facts = {"step": step, "preview": np.zeros((8, 8, 3), np.uint8) if step > 1 else None}
                facts.update(reused=[False] * min(step, drawing.steps), residual_diffs=[None] * min(step, 28))
                self.messages.put_nowait(("step", number, facts))
            await asyncio.sleep(0.005 if drawing.prompt.startswith("slow") else 0)
        seconds = dict.fromkeys(("encode", "denoise", "decode", "total"), 0.0)
        facts = {"computed_steps": list(range(drawing.steps)), "cached_steps": [], "skipped": 0.0}
        facts.update(residual_diffs=[None] * drawing.steps, seconds=seconds, compilations=1)
        self.messages.put_nowait(("drawn", number, [pixels_of(each) for each in drawings], facts))

    async def receive(self, seconds=None):
        coming = [asyncio.ensure_future(self.messages.get()), asyncio.ensure_future(self.dead.wait())]
        done, left = await asyncio.wait(coming, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for each in left:
            each.cancel()
        if coming[0] not in done:
            raise Gone("it has died")
        return coming[0].result()

    async def gone(self):
        await self.dead.wait()

    async def end(self):
        for task in self.tasks:
            task.cancel()


@contextmanager
def serving(broken=(), **changes):
    """A server with FakeChildren, in a thread: its address as ``url``, and what the children were told.

    Those of the places in ``broken`` cannot load the model.
    """
    told, ready = [], threading.Event()
    listener = listening("127.0.0.1", 0)
    found = SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}", told=told)

    async def start(settings, place):
        return FakeChild(told, place in broken)

    async def work():
        found.loop, found.task = asyncio.get_running_loop(), asyncio.current_task()
        ready.set()
        await serve(replace(SETTINGS, **changes), listener, start, signals=())

    def run():
        try:
            asyncio.run(work())
        except asyncio.CancelledError:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(found.task.cancel)
        thread.join(30)
        assert not thread.is_alive()
