"""Many generations of random shapes and settings in one process, as behind a server: memory, compilations, results.

    .venv/bin/python benchmarks/long_run.py --into docs/results/long_run.md

Half of the generations go through FBCache_ms's FluxPipeline, half through mindone's with the cache on it; one in eight
is interrupted. A request that comes again has to give the same bits. Memory is the process's resident memory behind
each generation.
"""

import gc
import random
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from weakref import ref

import mindone.diffusers
import numpy as np
from tqdm.auto import tqdm

import mindspore as ms

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.runtime.checkpoint import TINY_FLUX, check_checkpoint

SHAPES = [(64, 64, 1), (64, 96, 1), (96, 64, 1), (64, 64, 2), (32, 32, 3)]
"""Height, width and images of a request."""

ORDERS = (0, 1)
PROMPTS = ("a big red circle in the center, blue background", "a small green square on the left, black background")
EVERY_INTERRUPTED = 8


@dataclass(frozen=True)
class Request:
    """What a user asks for; ``whole_loop`` tells the pipeline."""

    whole_loop: bool
    shape: tuple
    config: CacheConfig
    prompt: str
    steps: int
    true_cfg: bool
    seed: int

    @property
    def graph(self):
        """What it needs a graph of its own for; the cached step always has the buffers of both branches."""
        return self.whole_loop, self.shape, self.config.structure, self.whole_loop and self.true_cfg


def requests(rng, count):
    """Different requests, as many as asked."""
    found = {}
    while len(found) < count:
        shape = rng.choice(SHAPES)
        config = CacheConfig(
            rng.choice((0.05, 0.1, 0.2, 0.4)), rng.choice(ORDERS), max_cached_steps=rng.choice((-1, 3))
        )
        # True CFG at one shape alone, so that there are not too many graphs to compile.
        true_cfg = shape == SHAPES[0] and rng.random() < 0.5
        steps, seed = rng.randint(5, 12), rng.randint(0, 3)
        found[Request(rng.random() < 0.5, shape, config, rng.choice(PROMPTS), steps, true_cfg, seed)] = None
    return list(found)


def pipelines(checkpoint, kept_shapes):
    """Ours and mindone's, by whether the whole loop is one graph; both with the same components."""
    ours = FluxPipeline.from_pretrained(str(checkpoint))
    theirs = mindone.diffusers.FluxPipeline(**ours.components)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        apply_cache_on_pipe(pipe, CacheConfig(), kept_shapes)
    return {True: ours, False: theirs}


def answer(pipe, request, interrupted=False):
    """A checksum over the latents; None of an interrupted generation."""
    config, (height, width, images) = request.config, request.shape
    apply_cache_on_pipe(pipe, config, kept(pipe).most)
    settings = {"negative_prompt": PROMPTS[1], "true_cfg_scale": 2.0} if request.true_cfg else {}
    if interrupted:
        settings["callback_on_step_end"] = interrupt
    latents = pipe(
        request.prompt,
        height=height,
        width=width,
        num_images_per_prompt=images,
        num_inference_steps=request.steps,
        max_sequence_length=32,
        generator=np.random.default_rng(request.seed),
        output_type="latent",
        **settings,
    )[0].asnumpy()
    return None if interrupted else sha256(latents.tobytes()).hexdigest()


def interrupt(pipe, step, timestep, tensors):
    """Breaks a generation off after its second step."""
    pipe._interrupt = step == 1
    return {}


def kept(pipe):
    """The pipeline's KeptGraphs."""
    return pipe._loops if isinstance(pipe, FluxPipeline) else pipe.transformer.steps


def resident():
    """The process's resident memory, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS")


def run(checkpoint, generations, different, kept_shapes, seed=0):
    """The run, as a record of what is in the table and of the memory behind each generation."""
    ms.set_context(mode=ms.GRAPH_MODE)
    rng, pipes = random.Random(seed), pipelines(checkpoint, kept_shapes)
    pool = requests(rng, different)
    compiled, graphs, answers = {}, set(), {}
    record = {"generations": generations, "repeated": 0, "wrong": 0, "last_new": 0, "resident_MB": []}
    for number in tqdm(range(generations), unit="generation"):
        request = rng.choice(pool)
        interrupted = number % EVERY_INTERRUPTED == EVERY_INTERRUPTED - 1
        got = answer(pipes[request.whole_loop], request, interrupted)
        if request.graph not in graphs:
            graphs.add(request.graph)
            record["last_new"] = number
        compiled.update({ref(cell): len(cell.compile_cache) for pipe in pipes.values() for cell in kept(pipe)})
        if not interrupted:
            expected = answers.setdefault(request, got)
            record["repeated"] += expected is not got
            record["wrong"] += expected != got
        record["resident_MB"].append(resident())
    gc.collect()
    alive = sum(cell() is not None for cell in compiled)
    return {
        **record,
        "graphs": len(graphs),
        "requests": len(pool),
        "compilations": sum(compiled.values()),
        "alive": alive,
    }


def growth(record):
    """Resident memory's slope over the generations after the last new graph, in MB a hundred generations.

    Not a number where there are fewer than two.
    """
    memory = record["resident_MB"][record["last_new"] + 1 :]
    return 100 * np.polyfit(np.arange(len(memory)), memory, 1)[0] if len(memory) > 1 else np.nan


def rows_of(record):
    """The record as the table's one row."""
    memory = record["resident_MB"]
    return [
        {
            "Generations": record["generations"],
            "Different Requests": record["requests"],
            "Repeated": record["repeated"],
            "Other Bits": record["wrong"],
            "Shapes and Settings of Graphs": record["graphs"],
            "Compilations": record["compilations"],
            "Last New Graph": f"generation {record['last_new']}",
            "Memory Then (MB)": round(memory[record["last_new"]]),
            "At the End (MB)": round(memory[-1]),
            "Growth (MB per 100)": f"{growth(record):.2f}",
        }
    ]


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "long_run", description=__doc__)
    parser.add_argument("--ckpt", type=Path, default=TINY_FLUX, metavar="PATH", help="folder in diffusers layout")
    parser.add_argument("--generations", type=int, default=500, metavar="N", help="how many in all")
    parser.add_argument("--different", type=int, default=60, metavar="N", help="different requests")
    parser.add_argument("--kept_shapes", type=int, default=16, metavar="N", help="graphs that each pipeline keeps")
    add_save_path(parser.add_argument, "./results/long_run", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        for name in ("generations", "different", "kept_shapes"):
            check_range(name, getattr(args, name), 1)
        check_checkpoint(args.ckpt)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        record = run(args.ckpt, args.generations, args.different, args.kept_shapes)
        rows = rows_of(record)
        publish(args.save_path, "long_run", markdown(rows), rows, record, args.into)

    return exit_status("long_run", work)


if __name__ == "__main__":
    sys.exit(main())
