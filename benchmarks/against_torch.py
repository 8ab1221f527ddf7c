"""Times FBCache_ms against torch: diffusers, ParaAttention and cache-dit, each also with torch.compile, on a CPU.

    .venv/bin/python benchmarks/against_torch.py --para_attention /tmp/peer/bin/python \
        --cache_dit /tmp/cache_dit/bin/python

tools/peers/worker.py says how the two environments are made. All draw with the embedded checkpoint, from the same
latents and with the same steps, each in a process of its own and with the same two processors. They are asked in turn,
after three drawings each to warm up, so that only one computes at a time. "Denoise" is the denoise loop alone, "Text to
PNG" all from the prompt to the bytes of the picture; the ratios are those of the medians.

Ends with status 1 if a peer decides otherwise than FBCache_ms in any run, or draws a picture less than 40 dB near ours.
"""

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Tuple

import numpy as np

from FBCache_ms.config import FEW_STEPS, CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.metrics import psnr, read_picture
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.rules.schedules import MAX_STEPS
from FBCache_ms.runtime.checkpoint import TINY_FLUX

PEERS = Path(__file__).parents[1] / "tools" / "peers"
THREADS = 2
SIZE, TEXT_TOKENS, LATENTS = 64, 32, (1, 64, 16)
WARM_UPS = 3
"""One does not do: with a cache, torch.compile compiles again in the second drawing."""

NEAR = 40.0
"""The least PSNR, in dB, of a picture that is taken for the same."""

COLUMNS = (
    "System",
    "Computed Steps",
    "Denoise (s)",
    "Ours / Theirs, Denoise",
    "Text to PNG (s)",
    "Ours / Theirs, Text to PNG",
    "Decisions",
    "PSNR to Ours (dB)",
)
REASON = 120
"""How many letters of an error the table shows."""


@dataclass(frozen=True)
class System:
    """What is timed, and how its worker is started.

    Args:
        command: the worker's command line.
        cached: whether a cache is on.
        ours: whether it is FBCache_ms.
        may_lack: whether the machine may not have what it needs, which torch.compile's C++ compiler is.
    """

    command: Tuple[str, ...]
    cached: bool
    ours: bool = False
    may_lack: bool = False


def systems_of(args):
    """The systems to time, the peers' first."""
    shared = (str(TINY_FLUX), "--threads", str(THREADS))
    found = []
    for cache in ("para_attention", "cache_dit"):
        python = getattr(args, cache)
        if python is None:
            continue
        for name in ("none", cache):
            command = (python, str(PEERS / "worker.py"), *shared, "--cache", name, "--threshold", str(args.threshold))
            found.append(System(command, cached=name != "none"))
            found.append(System((*command, "--compile"), cached=name != "none", may_lack=True))
    for tag in (UNCACHED, str(CacheConfig(args.threshold))):
        command = (sys.executable, str(PEERS / "our_worker.py"), *shared, "--cache", tag)
        found.append(System(command, cached=tag != UNCACHED, ours=True))
    return found


class Worker:
    """A system in a process of its own, which draws when it is asked to.

    Args:
        system: the System.
        folder: where its pictures and what it prints go.
        number: a number that no other worker there has.

    Raises ValueError if it does not start.
    """

    def __init__(self, system, folder, number):
        self.system, self.picture, self.log = system, folder / f"{number}.png", folder / f"{number}.txt"
        self.name, self.lack = Path(system.command[1]).name, None
        self.warm_ups, self.runs = [], []
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                system.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        about = self._listen()
        self.name, self.versions = about["name"], about["versions"]

    def warm_up(self, request):
        """Draws WARM_UPS times, off the record; ``lack`` then says why, if the system cannot be had here."""
        while len(self.warm_ups) < WARM_UPS and not self.lack:
            answer = self._ask(request)
            self.lack = answer.get("error")
            self.warm_ups.append(answer)
        if self.lack and not self.system.may_lack:
            raise ValueError(f"{self.name}: {self.lack}")

    def draw(self, request):
        """Draws, and keeps the seconds and the decisions in ``runs``. Raises ValueError if that fails."""
        answer = self._ask(request)
        if "error" in answer:
            raise ValueError(f"{self.name}: {answer['error']}")
        self.runs.append(answer)

    def _ask(self, request):
        try:
            print(json.dumps({**request, "picture": str(self.picture)}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # It is gone; the log says why.
        return self._listen()

    def _listen(self):
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").split("\n")
            raise ValueError(f"{self.name} ended: {' '.join(said[-4:])}")
        return json.loads(line)


def judge(workers):
    """What each worker did, as a list of records; a peer's are compared with ours of the same kind."""
    ours = {worker.system.cached: worker for worker in workers if worker.system.ours}
    decisions = {cached: worker.runs[0]["reused"] for cached, worker in ours.items()}
    pictures = {cached: read_picture(worker.picture) for cached, worker in ours.items()}
    records = []
    for worker in workers:
        system = worker.system
        record = {"name": worker.name, "ours": system.ours, "cached": system.cached, "versions": worker.versions}
        if worker.lack:
            record["lack"] = worker.lack
        else:
            record.update(
                warm_up=[run["pipeline"] for run in worker.warm_ups],
                denoise=[run["denoise"] for run in worker.runs],
                pipeline=[run["pipeline"] for run in worker.runs],
                reused=worker.runs[0]["reused"],
                same_decisions=all(run["reused"] == decisions[system.cached] for run in worker.runs),
                psnr=psnr(pictures[system.cached], read_picture(worker.picture)),
            )
        records.append(record)
    return records


def agrees(record):
    """Whether a record has our decisions and our picture; what could not be had does not disagree."""
    return "lack" in record or record["same_decisions"] and record["psnr"] >= NEAR


def rows_of(records):
    """The records as the rows of a table."""
    ours = {record["cached"]: record for record in records if record["ours"]}
    return [row_of(record, ours[record["cached"]]) for record in records]


def row_of(record, ours):
    """A record as a row, beside ours of the same kind; what could not be had has its reason for a name."""
    if "lack" in record:
        reason = " ".join(record["lack"].split())[:REASON]
        return {**dict.fromkeys(COLUMNS, "-"), "System": f"{record['name']}, not to be had here: {reason}"}

    def ratio(kind):
        if record["ours"]:
            return "-"
        mine, theirs = (statistics.median(each[kind]) for each in (ours, record))
        return f"{mine / theirs:.2f} ({mine:.3f} / {theirs:.3f})"

    cells = (
        record["name"],
        record["reused"].count(False),
        spread(record["denoise"]),
        ratio("denoise"),
        spread(record["pipeline"]),
        ratio("pipeline"),
        "-" if record["ours"] else "the same" if record["same_decisions"] else "other",
        "-" if record["ours"] else f"{record['psnr']:.1f}",
    )
    return dict(zip(COLUMNS, cells))


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "against_torch", description=__doc__)
    add = parser.add_argument
    add("--para_attention", metavar="PYTHON", help="of an environment with ParaAttention")
    add("--cache_dit", metavar="PYTHON", help="of an environment with cache-dit")
    add("--runs", type=int, default=7, metavar="N", help="turns")
    add("--steps", type=int, default=28, metavar="N", help="of a generation")
    add("--threshold", type=float, default=0.12, metavar="R", help="of every cache, in (0, 1)")
    add("--prompt", default="a big red circle in the center, blue background", metavar="TEXT", help="what is drawn")
    add("--seed", type=int, default=0, metavar="N", help="of the latents")
    add_save_path(add, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        if args.para_attention is None and args.cache_dit is None:
            raise ValueError("there is nothing to compare with; give --para_attention, --cache_dit or both")
        check_range("runs", args.runs, 1)
        # With fewer steps our cache stays off, and the peers' do not.
        check_range("steps", args.steps, FEW_STEPS + 1, MAX_STEPS)
        check_range("seed", args.seed, 0)
        if not 0 < args.threshold < 1:
            raise ValueError(f"--threshold must be between 0 and 1, not {args.threshold}")
        if find_spec("skimage") is None:
            raise ValueError("PSNR needs scikit-image; install FBCache_ms[eval]")
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def measure(args, folder):
    """Starts the workers, has them draw in turn, and returns their records."""
    from tqdm import tqdm

    latents = np.random.default_rng(args.seed).standard_normal(LATENTS).astype(np.float32)
    np.save(folder / "latents.npy", latents)
    arguments = {
        "prompt": args.prompt,
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": args.steps,
        "guidance_scale": 3.5,
        "max_sequence_length": TEXT_TOKENS,
    }
    request = {"latents": str(folder / "latents.npy"), "arguments": arguments}
    with ExitStack() as stack:
        workers = []
        for number, system in enumerate(tqdm(systems_of(args), desc="warm-up")):
            workers.append(Worker(system, folder, number))
            stack.enter_context(workers[-1].process)
            workers[-1].warm_up(request)
        for _ in tqdm(range(args.runs), desc="runs"):
            for worker in workers:
                if not worker.lack:
                    worker.draw(request)
        return judge(workers)


def main(argv=None):
    """The program; returns its exit status, 1 if a peer's decisions or picture are not ours."""
    args = parse_arguments(argv)
    # Whatever a framework takes its number of threads from, none has more processors than this.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    records = []

    def work():
        with TemporaryDirectory() as folder:
            records.extend(measure(args, Path(folder)))
        rows = rows_of(records)
        settings = {name: getattr(args, name) for name in ("runs", "steps", "threshold", "prompt", "seed")}
        data = {"settings": {**settings, "threads": THREADS, **machine()}, "systems": records}
        text = markdown(rows)
        publish(args.save_path, "against_torch", text, rows, data, args.into)
        for record in records:
            if not agrees(record):
                print(f"against_torch: {record['name']} does not draw what FBCache_ms does", file=sys.stderr)

    return exit_status("against_torch", work) or int(not all(map(agrees, records)))


if __name__ == "__main__":
    sys.exit(main())
