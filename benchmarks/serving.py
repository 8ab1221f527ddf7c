"""The server under load and under faults, with the embedded checkpoint: answers, bytes, seconds, memory.

    .venv/bin/python benchmarks/serving.py --into docs/results/serving.md

It starts ``fbcache serve`` with an empty compile cache, and asks over loopback. Another process draws the same pictures
without a server, in turn with it. A picture that is asked for again has to be the same bytes.
"""

import asyncio
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import httpx
import numpy as np
import psutil

from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, quiet
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.runtime.checkpoint import TINY_FLUX

GENERATIONS = "/v1/images/generations"
SIZES = ("64x64", "96x64")
CACHES = ("balanced", "none", "conservative", "aggressive", "fast")
PROMPT = "a big red circle in the center, blue background"
QUEUE = 8
PAINTER_TIMEOUT = 5
START_TIMEOUT = 60
MEANT = {200, 429, 503, "painter_died"}
"""Answers that a client of a busy or restarting server may get; the last one where two faults hit the same request."""


@contextmanager
def started(folder):
    """The server's process, and its address, while it still compiles. Raises ValueError where it cannot start."""
    command = [sys.executable, "-m", "FBCache_ms.serve", "--port", "0", "--sizes", *SIZES, "--queue", str(QUEUE)]
    command += ["--compile_cache", folder, "--painter_timeout", str(PAINTER_TIMEOUT)]
    command += ["--start_timeout", str(START_TIMEOUT)]
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        address = re.search(r"http://\S+", process.stdout.readline())
        if address is None:
            errors.seek(0)
            raise ValueError(f"the server has not started: {errors.read().strip()[-500:]}")
        yield process, address[0]
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def client_of(url):
    """A client that waits for as long as it takes."""
    return httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=200))


async def until_ready(client):
    """Waits until the server takes requests."""
    while (await client.get("/ready")).status_code != 200:
        await asyncio.sleep(0.1)


async def compilations(client):
    """How many graphs were compiled so far."""
    text = (await client.get("/metrics")).text
    return int(float(re.search(r"^graph_compilations_total (\S+)", text, re.MULTILINE)[1]))


@contextmanager
def watched_live(url, seconds):
    """Fills a list with how long /live takes, asked again and again by a thread that has nothing else to do."""
    ended = threading.Event()

    def ask():
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.wait(0.02):
                begin = time.perf_counter()
                client.get("/live")
                seconds.append(time.perf_counter() - begin)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join()


def percentile(seconds, share):
    """The value that so large a share of them does not exceed."""
    return float(np.percentile(seconds, 100 * share))


class Answers:
    """What came, by status, and whether what was asked for again was the same."""

    def __init__(self):
        self.statuses, self.checksums, self.repeated, self.wrong = {}, {}, 0, 0

    def take(self, fields, answer):
        """Counts an answer; returns whether it is a picture."""
        status = answer.status_code
        if status == 500:
            status = answer.json()["error"]["code"]
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if answer.status_code != 200:
            return False
        checksum = sha256(answer.json()["data"][0]["b64_json"].encode()).hexdigest()
        expected = self.checksums.setdefault(tuple(sorted(fields.items())), checksum)
        self.repeated += expected is not checksum
        self.wrong += expected != checksum
        return True

    @property
    def unmeant(self):
        """How many answers were of a status that nobody meant."""
        return sum(number for status, number in self.statuses.items() if status not in MEANT)


def some_fields(rng, steps=None):
    """Settings of a request."""
    return {
        "prompt": PROMPT,
        "size": rng.choice(SIZES),
        "cache": rng.choice(CACHES),
        "seed": rng.randrange(4),
        "num_inference_steps": steps or rng.randint(5, 12),
    }


async def ask_until_drawn(client, answers, fields, wait=0.5):
    """Asks for a picture again and again until it is there."""
    while not answers.take(fields, await client.post(GENERATIONS, json=fields)):
        await asyncio.sleep(wait)


async def crowd(client, answers, clients, rounds, rng):
    """So many clients at once, each of which asks for so many pictures."""

    async def one(wanted):
        for fields in wanted:
            await ask_until_drawn(client, answers, fields)

    await asyncio.gather(*(one([some_fields(rng) for _ in range(rounds)]) for _ in range(clients)))


async def aborts(client, number, rng, longest=0.3, prompt=PROMPT):
    """So many requests whose clients leave at any moment; returns how many had no answer yet."""
    left = 0
    for _ in range(number):
        fields = {**some_fields(rng, 28), "prompt": prompt}
        try:
            await client.post(GENERATIONS, json=fields, timeout=rng.uniform(0.01, longest))
        except httpx.TimeoutException:
            left += 1
    return left


async def requests(client, answers, number, rng):
    """So many requests, one after the other."""
    for _ in range(number):
        await ask_until_drawn(client, answers, some_fields(rng, 4))


def resident(process):
    """Resident memory of a process and its children in MB."""
    own = psutil.Process(process.pid)
    return sum(each.memory_info().rss for each in (own, *own.children(recursive=True))) / 2**20


async def faults(client, answers, process, number, rng):
    """Kills or stops the drawing process so many times, at any moment, while two clients ask; returns the seconds that
    it takes until the server is ready again."""
    ended, seconds = asyncio.Event(), []

    async def one(rng):
        while not ended.is_set():
            await ask_until_drawn(client, answers, some_fields(rng))

    asking = [asyncio.ensure_future(one(random.Random(seed))) for seed in range(2)]
    for turn in range(number):
        await until_ready(client)
        await asyncio.sleep(rng.uniform(0, 1))
        (painter,) = psutil.Process(process.pid).children()
        begin = time.perf_counter()
        painter.send_signal(signal.SIGSTOP if turn % 2 else signal.SIGKILL)
        # Until it is another one: for a moment the server may not know.
        while psutil.Process(process.pid).children() in ([], [painter]):
            await asyncio.sleep(0.02)
        await until_ready(client)
        seconds.append(time.perf_counter() - begin)
    ended.set()
    await asyncio.gather(*asking)
    return seconds


def direct(folder, number):
    """Seconds that so many pictures take without a server, one after the other."""
    from FBCache_ms import CacheConfig, FluxPipeline, choose_device

    quiet()
    pipe = FluxPipeline.from_pretrained(str(TINY_FLUX), device=choose_device(compile_cache=folder))
    pipe.set_progress_bar_config(disable=True)
    config = CacheConfig.preset("balanced")

    def draw(seed):
        generator = np.random.default_rng(seed)
        pipe(PROMPT, generator=generator, output_type="np", num_inference_steps=28, cache_config=config)

    draw(0)
    begin = time.perf_counter()
    for seed in range(number):
        draw(seed)
    return time.perf_counter() - begin


def in_a_process(work, *arguments):
    """What a function returns in a process of its own, which is gone then: MindSpore's threads take time when idle."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


async def saturated(client, answers, number):
    """Seconds that so many pictures take with a queue that is never empty, and those of them that are drawing."""
    seeds, drawing = count(), []

    async def one():
        for seed in seeds:
            if seed >= number:
                return
            fields = {"prompt": PROMPT, "seed": seed}
            answer = await client.post(GENERATIONS, json={**fields, "fbcache": {"stats": True}})
            if answers.take(fields, answer):
                drawing.append(answer.json()["data"][0]["fbcache"]["stats"]["seconds"]["total"])

    begin = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(4)))
    return time.perf_counter() - begin, sum(drawing)


async def overhead(client, number):
    """Seconds that a request takes longer than its drawing, for so many requests."""
    found = []
    for seed in range(number):
        begin = time.perf_counter()
        fields = {"prompt": PROMPT, "seed": seed, "fbcache": {"stats": True}}
        answer = (await client.post(GENERATIONS, json=fields)).json()
        found.append(time.perf_counter() - begin - answer["data"][0]["fbcache"]["stats"]["seconds"]["total"])
    return found


def row(what, found, wanted):
    """A row of the table."""
    return {"What": what, "Found": found, "Wanted": wanted}


async def measure(args, process, url, folder):
    """The table's rows."""
    rng, answers, live, rows = random.Random(args.seed), Answers(), [], []
    async with client_of(url) as client:
        with watched_live(url, live):
            await until_ready(client)
        rows.append(row("/live while compiling, p99", f"{1000 * percentile(live, 0.99):.0f} ms", "100 ms"))
        compiled = await compilations(client)
        live.clear()
        with watched_live(url, live):
            await crowd(client, answers, args.clients, args.rounds, rng)
        rows.append(row("/live while drawing, p99", f"{1000 * percentile(live, 0.99):.0f} ms", "100 ms"))
        told = ", ".join(f"{number} x {status}" for status, number in answers.statuses.items())
        rows.append(row(f"{args.clients} clients at a queue of {QUEUE}", told, "200 and 429 alone"))
        memory = [resident(process)]
        await aborts(client, args.aborts, rng)
        memory.append(resident(process))
        for _ in range(2):
            await requests(client, answers, args.requests // 2, rng)
            memory.append(resident(process))
        what = f"memory over {args.aborts} aborts, then {args.requests} requests"
        found = f"{memory[-1] - memory[0]:+.1f} MB, in the last {args.requests // 2} {memory[-1] - memory[-2]:+.1f} MB"
        rows.append(row(what, found, "20 MB, and flat"))
        rows.append(row("graphs compiled behind ready", str(await compilations(client) - compiled), "0"))
        extra = await overhead(client, args.pictures)
        rows.append(row("a request beside its drawing, median", f"{1000 * statistics.median(extra):.1f} ms", "20 ms"))
        times = []
        for _ in range(args.runs):
            alone = await asyncio.to_thread(in_a_process, direct, folder, args.pictures)
            times.append((alone, await saturated(client, answers, args.pictures)))
        share = min(alone for alone, _ in times) / min(served for _, (served, _) in times)
        rows.append(row("saturated, pictures a second by those of back-to-back calls", f"{100 * share:.1f} %", "97 %"))
        share = statistics.median(drawing / served for _, (served, drawing) in times)
        rows.append(row("saturated, share of the time that is drawing", f"{100 * share:.1f} %", "97 %"))
        seconds = await faults(client, answers, process, args.faults, rng)
        if seconds:
            found = f"ready again after {min(seconds):.1f} to {max(seconds):.1f} s"
            rows.append(row(f"{args.faults} kills and stops of the drawing process", found, "ready again"))
        rows.append(row("answers that nobody meant", str(answers.unmeant), "0"))
        rows.append(row(f"other bytes, of {answers.repeated} that were asked for again", str(answers.wrong), "0"))
    process.send_signal(signal.SIGTERM)
    rows.append(row("exit status after SIGTERM", str(process.wait(60)), "0"))
    return rows


def parse_arguments(argv=None):
    """The command line; exits with 2 and one line if it is off."""
    parser = Parser(__name__, "serving", description=__doc__.partition("\n\n    ")[0])
    add = parser.add_argument
    add("--clients", type=int, default=64, metavar="N", help="that ask at once")
    add("--rounds", type=int, default=2, metavar="N", help="pictures that each of them asks for")
    add("--aborts", type=int, default=500, metavar="N", help="requests whose clients leave")
    add("--requests", type=int, default=500, metavar="N", help="requests behind them")
    add("--pictures", type=int, default=20, metavar="N", help="pictures that are timed, with and without a server")
    add("--runs", type=int, default=3, metavar="N", help="so often each is timed, in turn")
    add("--faults", type=int, default=10, metavar="N", help="kills and stops of the drawing process, in turn")
    add("--seed", type=int, default=0, metavar="N", help="of what is random")
    add_save_path(add, "./results/serving")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        for name in ("clients", "rounds", "pictures", "runs"):
            check_range(name, getattr(args, name), 1)
        for name in ("aborts", "faults", "seed"):
            check_range(name, getattr(args, name), 0)
        check_range("requests", args.requests, 2)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        with tempfile.TemporaryDirectory() as folder, started(folder) as (process, url):
            rows = asyncio.run(measure(args, process, url, Path(folder)))
        publish(args.save_path, "serving", markdown(rows), rows, rows, args.into)

    return exit_status("serving", work)


if __name__ == "__main__":
    sys.exit(main())
