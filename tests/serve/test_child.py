"""The pipe to the drawing process, with a process that sends back what it gets."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from fakes import SETTINGS

from FBCache_ms.serve.child import Child, Gone


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def with_child(work):
    """Runs ``work(child)``; the process is gone behind it."""

    async def run():
        child = await Child.launch(SETTINGS.for_painter(), {}, "echo")
        try:
            assert await child.receive() == SETTINGS.for_painter()
            await work(child)
        finally:
            await child.end()
        assert not psutil.pid_exists(child.process.pid)

    asyncio.run(run())


def test_messages_of_any_size_come_as_they_were_sent():
    async def work(child):
        pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
        for number in range(3):
            child.send(("drawn", number, pixels))
        for number in range(3):
            kind, got, same = await child.receive(60)
            assert (kind, got) == ("drawn", number) and np.array_equal(same, pixels)

    with_child(work)


def test_a_process_that_dies_is_gone():
    async def work(child):
        child.send("die")
        with pytest.raises(Gone, match="has died"):
            await child.receive(60)
        await child.gone()
        child.send("this goes nowhere")

    with_child(work)


def test_a_process_that_says_nothing_is_gone_and_a_stopped_one_can_be_ended():
    async def work(child):
        os.kill(child.process.pid, signal.SIGSTOP)
        child.send("anything")
        with pytest.raises(Gone, match="nothing for 0.2 s"):
            await child.receive(0.2)

    with_child(work)


def test_a_process_ends_when_nobody_is_at_the_other_end():
    async def work(child):
        child.writer.close()
        await child.gone()
        assert child.process.returncode == 0

    with_child(work)
