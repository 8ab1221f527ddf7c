"""The queue, and what becomes of a request: waiting, drawn, done; or cancelled, refused, too late."""

import asyncio
import logging
import secrets
import time
from collections import deque

from .child import Child, Gone
from .errors import ApiError

logger = logging.getLogger(__name__)

STARTING, READY, NO_PAINTER, DRAINING = "starting", "ready", "no_painter", "draining"
"""What a Desk may be; it takes requests where it is ready."""

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
"""What a Job may be."""

MOST_DEATHS = 2
"""A request under which the drawing process has died so often is not tried again."""

FIRST_TRIES = 3
"""A drawing process that has failed so often before it was ever ready gives little hope; where all do, the server ends.
"""

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the drawing process is started anew: they double with each failure in a row."""


class Failed(Exception):
    """The model cannot be served; the drawing process says why."""


class Job:
    """A request on its way.

    Args:
        order: the Order.
        owner: number of the API key that it came with; None where none is asked for.

    ``results`` holds the pixels and facts of each Drawing that is done, ``step`` the facts of the last step.
    """

    def __init__(self, order, owner=None):
        self.order, self.owner = order, owner
        self.id, self.created, self.finished_at = f"job-{secrets.token_urlsafe(12)}", time.time(), None
        self.state, self.error = QUEUED, None
        self.results, self.step, self.deaths, self.timer = [], None, 0, None
        self.changed, self.ended = asyncio.Event(), asyncio.Event()

    @property
    def left(self):
        """The Drawings that are not done."""
        return self.order.drawings[len(self.results) :]

    @property
    def finished(self):
        """Whether nothing more will happen to it."""
        return self.state in (SUCCEEDED, FAILED, CANCELLED)

    def tell(self):
        """Wakes those that wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def finish(self, state, error=None):
        """Ends it; ``error`` is the ApiError that its client gets."""
        if not self.finished:
            self.state, self.error, self.finished_at = state, error, time.time()
            if self.timer is not None:
                self.timer.cancel()
            self.ended.set()
            self.tell()

    async def news(self):
        """What happens, as it happens: ("step", facts) of the newest step, ("drawn", index), last ("ended", None).

        Who is slow misses steps, and nothing else.
        """
        seen, step = 0, None
        while True:
            changed = self.changed
            if self.step is not None and self.step is not step:
                step = self.step
                yield "step", step
            elif seen < len(self.results):
                seen += 1
                yield "drawn", seen - 1
            elif self.finished:
                yield "ended", None
                return
            else:
                await changed.wait()


class Desk:
    """Takes requests in, and has each drawn by the first of its drawing processes that is free.

    Args:
        settings: the Settings.
        metrics: the Metrics.
        start: coroutine start(settings, number) that starts a Child.
    """

    def __init__(self, settings, metrics, start=Child.start):
        self.settings, self.metrics, self.start = settings, metrics, start
        self.queue, self.seats = deque(), [Seat(self, number) for number in range(settings.replicas)]
        self.came, self.idle, self.draining = asyncio.Event(), asyncio.Event(), False
        self.idle.set()
        self.seconds = 10.0

    @property
    def state(self):
        """One of STARTING, READY, NO_PAINTER and DRAINING: it is ready where one drawing process is."""
        if self.draining:
            return DRAINING
        if any(seat.ready for seat in self.seats):
            return READY
        return NO_PAINTER if any(seat.was_ready for seat in self.seats) else STARTING

    def submit(self, job):
        """Puts a Job into the queue. Raises ApiError where it is full, or nothing is drawn at the moment."""
        self.check_ready()
        if len(self.queue) >= self.settings.queue:
            wait = self.seconds * (len(self.queue) + 1) / len(self.seats)
            raise ApiError(429, f"{len(self.queue)} requests are waiting, which is the most", retry_after=wait)
        self.queue.append(job)
        self.told()
        job.timer = asyncio.get_running_loop().call_later(self.settings.timeout, self.expire, job)

    def check_ready(self):
        """Raises ApiError unless requests are taken."""
        state = self.state
        if state == STARTING:
            done, graphs = max(seat.progress for seat in self.seats)
            raise ApiError(503, f"starting: {done} of {graphs} graphs are compiled", code=STARTING, retry_after=5)
        if state == NO_PAINTER:
            raise ApiError(503, "the drawing process is being started anew", code=NO_PAINTER, retry_after=5)
        if state == DRAINING:
            raise ApiError(503, "the server is about to end", code=DRAINING)

    def cancel(self, job, error=None):
        """Stops a Job, wherever it is; its client gets the error, if there is still one."""
        if job in self.queue:
            self.queue.remove(job)
        job.finish(CANCELLED, error or ApiError(499, "cancelled"))
        for seat in self.seats:
            if job in seat.jobs and all(each.finished for each in seat.jobs):
                seat.stop()
        self.told()

    def expire(self, job):
        """Gives a Job up that has taken too long."""
        if not job.finished:
            self.cancel(job, ApiError(504, f"not done within {self.settings.timeout:g} s"))

    def drain(self):
        """Takes no more requests, sends those that wait away, and lets the others finish; then it is ``idle``."""
        self.draining = True
        while self.queue:
            self.queue.popleft().finish(FAILED, ApiError(503, "the server is about to end", code=DRAINING))
        self.told()

    def told(self):
        """What follows whenever the queue or a running job are others."""
        self.metrics.waiting.set(len(self.queue))
        self.metrics.ready.set(sum(seat.ready for seat in self.seats))
        self.came.set()
        if not self.queue and not any(seat.jobs for seat in self.seats):
            self.idle.set()
        else:
            self.idle.clear()

    async def run(self):
        """Keeps the drawing processes at work. Raises Failed if there can be none."""
        tasks = [asyncio.ensure_future(seat.run()) for seat in self.seats]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def next_job(self, child):
        """The next Job. Raises Gone where the Child that is to draw it has died."""
        while not self.queue:
            self.came.clear()
            waiting, gone = asyncio.ensure_future(self.came.wait()), asyncio.ensure_future(child.gone())
            try:
                await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise Gone("the drawing process has died")
            finally:
                waiting.cancel()
                gone.cancel()
        return self.queue.popleft()

    async def companions(self, job):
        """Those Jobs of the queue that are drawn together with this one, up to the largest batch."""
        most = max(self.settings.batch_sizes)
        if job.order.batch is None or most == 1:
            return []
        if len(job.order.drawings) + sum(len(each.order.drawings) for each in self.alike(job)) < most:
            await asyncio.sleep(self.settings.batch_wait)
        found, pictures = [], len(job.order.drawings)
        for each in self.alike(job):
            if pictures < most:
                self.queue.remove(each)
                found.append(each)
                pictures += len(each.order.drawings)
        return found

    def alike(self, job):
        """The Jobs of the queue whose pictures may be drawn together with this one's."""
        return [each for each in self.queue if each.order.batch == job.order.batch]


class Seat:
    """The place of one drawing process: keeps one there, and hands it one Job after the other.

    Args:
        desk: the Desk.
        number: of the place, from 0 on.
    """

    def __init__(self, desk, number):
        self.desk, self.settings, self.metrics, self.place = desk, desk.settings, desk.metrics, number
        self.child, self.jobs, self.number, self.compilations = None, [], 0, 0
        self.ready, self.was_ready, self.hopeless, self.progress = False, False, False, (0, desk.settings.graphs)

    async def run(self):
        """Keeps a drawing process at work. Raises Failed if no place can have one."""
        failures = 0
        while True:
            try:
                self.child = await self.desk.start(self.settings, self.place)
                await self.get_ready()
                self.ready = self.was_ready = True
                self.hopeless = False
                self.desk.told()
                while True:
                    await self.draw_next()
                    failures = 0
            except (Gone, Failed) as error:
                self.check_hope(error, failures + 1)
                logger.warning("%s; it is started anew", error)
                self.ready = False
                self.metrics.restarts.inc()
                self.give_back()
            finally:
                if self.child is not None:
                    await self.child.end()
                    self.child = None
            await asyncio.sleep(min(FIRST_WAIT * 2**failures, LONGEST_WAIT))
            failures += 1

    def check_hope(self, error, failures):
        """Raises Failed where no place was ever ready, and each has failed for good or FIRST_TRIES times."""
        self.hopeless = not self.was_ready and (isinstance(error, Failed) or failures >= FIRST_TRIES)
        if all(seat.hopeless for seat in self.desk.seats):
            if isinstance(error, Failed):
                raise error
            raise Failed(f"{error}, {failures} times before it had compiled everything") from None

    async def get_ready(self):
        """Waits until everything is compiled. Raises Failed where the model cannot be served."""
        self.compilations = 0
        while True:
            kind, *rest = await self.child.receive(self.settings.start_timeout)
            if kind == "failed":
                raise Failed(rest[0])
            if kind == "compiled":
                *progress, compilations = rest
                self.progress = tuple(progress)
                self.count_compilations(compilations)
                logger.info("%d of %d graphs are compiled", *self.progress)
            elif kind == "ready":
                return

    async def draw_next(self):
        """Has the next Job drawn, and those that are drawn together with it."""
        first = await self.desk.next_job(self.child)
        self.jobs = [first]
        self.jobs += await self.desk.companions(first)
        for job in self.jobs:
            if not job.finished:
                job.state = RUNNING
        self.desk.told()
        begin = time.perf_counter()
        while True:
            left = [(job, each) for job in self.jobs if not job.finished for each in job.left]
            if not left:
                break
            together = self.settings.batch_of(len(left)) if first.order.batch else 1
            await self.draw(*zip(*left[:together]))
            for job in self.jobs:
                if not job.finished and not job.left:
                    seconds = time.perf_counter() - begin
                    self.desk.seconds += (seconds - self.desk.seconds) / 4
                    job.finish(SUCCEEDED)
                    logger.info("%s: %d pictures in %.2f s", job.id, len(job.results), seconds)
        self.jobs = []
        self.desk.told()

    async def draw(self, jobs, drawings):
        """Has Drawings drawn at once, each of its Job."""
        self.number += 1
        self.child.send(("draw", self.number, drawings))
        while True:
            kind, number, *rest = await self.child.receive(self.settings.painter_timeout)
            if kind == "alive":
                continue
            if kind == "step":
                job, drawing = jobs[0], drawings[0]
                job.step = {"index": len(job.results), "steps": drawing.steps, **rest[0]}
                job.tell()
                continue
            if kind == "drawn":
                pictures, facts = rest
                self.count_compilations(facts["compilations"])
                for job, pixels in zip(jobs, pictures):
                    self.metrics.drawn(facts)
                    if not job.finished:
                        job.results.append((pixels, facts))
                        job.tell()
            elif kind == "refused":
                which, text = rest
                jobs[which].finish(FAILED, ApiError(400, text))
            elif kind == "error":
                for job in jobs:
                    job.finish(FAILED, ApiError(500, rest[0]))
            return

    def stop(self):
        """Has the drawing stopped."""
        if self.child is not None:
            self.child.send(("cancel", self.number))

    def give_back(self):
        """Puts Jobs whose drawing process has died back to the front of the queue, unless it has died too often."""
        jobs, self.jobs = self.jobs, []
        for job in reversed(jobs):
            if job.finished:
                continue
            job.deaths += 1
            if job.deaths >= MOST_DEATHS:
                message = "the drawing process has died twice under this request, which is not tried again"
                job.finish(FAILED, ApiError(500, message, code="painter_died"))
            else:
                job.state = QUEUED
                self.desk.queue.appendleft(job)
        self.desk.told()

    def count_compilations(self, compilations):
        """Adds those that are new to the metric."""
        self.metrics.compilations.inc(compilations - self.compilations)
        self.compilations = compilations
