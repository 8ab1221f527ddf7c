"""Times FBCache_ms against torch as the model grows: Flux of four widths, in float32 and in bfloat16, on a CPU.

    .venv/bin/python benchmarks/growth_against_torch.py --para_attention /tmp/peer/bin/python \
        --cache_dit /tmp/cache_dit/bin/python

tools/peers/worker.py says how the two environments are made. The embedded checkpoint lends its text encoders and its
autoencoder; the transformers are randomly initialised. Each is drawn uncached and with First-Block Cache at the
threshold, of THRESHOLDS, that reuses nearest to a third of the steps and is not near any score. All draw from the same
latents, in turn, each in a process of its own with the same two processors, after three drawings to warm up. Seconds
are those of the denoise loop alone, ratios those of the medians.

"The limit" is what the plain matrix products of the linear layers take in torch, in one of these turns: all of a step's
for each computed step, and the first block's for a reused one.
"""

import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from against_torch import PEERS, THREADS, System, Worker

from FBCache_ms.config import FEW_STEPS, CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, quiet
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.rules.schedules import MAX_STEPS
from FBCache_ms.runtime.checkpoint import TINY_FLUX

DTYPES = "float32", "bfloat16"
TEXT, PROMPT = 32, "a big red circle in the center, blue background"
THRESHOLDS = tuple(0.002 * 1.15**power for power in range(45))
REUSED = 1 / 3
NEAR = 3
"""So many thresholds on either side of the first that reuses as much are tried too."""


@dataclass(frozen=True)
class Model:
    """A transformer: double and single blocks, the width of a head, and how many image tokens a side it is given."""

    doubles: int
    singles: int
    head: int
    side: int


MODELS = {128: Model(4, 8, 32, 8), 512: Model(4, 8, 64, 16), 1536: Model(2, 4, 128, 16), 3072: Model(1, 2, 128, 16)}
"""By width."""

AXES = {32: (8, 12, 12), 64: (8, 28, 28), 128: (16, 56, 56)}


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "growth_against_torch", description=__doc__)
    add = parser.add_argument
    add("--para_attention", metavar="PYTHON", help="of an environment with ParaAttention")
    add("--cache_dit", metavar="PYTHON", help="of an environment with cache-dit, whose torch is the plain one too")
    add("--widths", nargs="+", type=int, default=list(MODELS), choices=MODELS, metavar="D", help="which")
    add("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, metavar="DTYPE", help="which")
    add("--runs", type=int, default=5, metavar="N", help="turns")
    add("--steps", type=int, default=10, metavar="N", help="of a generation")
    add_save_path(add, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        if args.cache_dit is None:
            raise ValueError("there is nothing to compare with; give --cache_dit")
        check_range("runs", args.runs, 1)
        check_range("steps", args.steps, FEW_STEPS + 1, MAX_STEPS)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def request_of(width, steps, folder):
    """What every system is asked to draw, as tools/peers/protocol.py has it."""
    side = MODELS[width].side
    latents = folder / f"{width}.npy"
    np.save(latents, np.random.default_rng(0).standard_normal((1, side**2, 16)).astype(np.float32))
    arguments = {
        "prompt": PROMPT,
        "height": 8 * side,
        "width": 8 * side,
        "num_inference_steps": steps,
        "guidance_scale": 3.5,
        "max_sequence_length": TEXT,
    }
    return {"latents": str(latents), "arguments": arguments}


def make_checkpoint(width, steps, folder):
    """Writes the checkpoint into a new folder, and finds its threshold; returns that."""
    quiet()
    from mindone.diffusers import FluxTransformer2DModel

    import mindspore as ms

    from FBCache_ms import FluxPipeline
    from FBCache_ms.runtime.device import choose_device

    device, model = choose_device("CPU"), MODELS[width]
    folder.mkdir()
    for part in TINY_FLUX.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    config = json.loads((TINY_FLUX / "transformer" / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    config.update(num_layers=model.doubles, num_single_layers=model.singles, axes_dims_rope=AXES[model.head])
    config.update(attention_head_dim=model.head, num_attention_heads=width // model.head)
    ms.set_seed(0)
    FluxTransformer2DModel(**config).save_pretrained(folder / "transformer")
    pipe = FluxPipeline.from_pretrained(str(folder), device=device)
    pipe.set_progress_bar_config(disable=True)
    request = request_of(width, steps, folder.parent)
    latents = ms.Tensor(np.load(request["latents"]))
    found = {}

    def share(place):
        """How much is reused at a threshold."""
        pipe(
            latents=latents,
            output_type="latent",
            cache_config=CacheConfig(THRESHOLDS[place]),
            **request["arguments"],
        )
        stats = pipe.cache_stats
        found[place] = THRESHOLDS[place], np.mean(stats.reused), np.asarray(stats.residual_diffs, float)
        return found[place][1]

    low, high = 0, len(THRESHOLDS) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if share(middle) < REUSED else (low, middle)
    for place in range(low - NEAR, low + NEAR + 1):
        if place not in found and place in range(len(THRESHOLDS)):
            share(place)
    return best_of(list(found.values()))


def best_of(found):
    """Of [(threshold, share of reused steps, scores)], the threshold whose share is nearest to REUSED, clearly."""

    def margin(threshold, scores):
        return np.nanmin(np.abs(scores / threshold - 1))

    # In twentieths of the steps, so that of two that are about as near the clearer one is taken.
    return min(found, key=lambda each: (round(20 * abs(each[1] - REUSED)), -margin(each[0], each[2])))[0]


def systems_of(args, folder, dtype, threshold):
    """The systems of a dtype, the peers' first."""
    shared = (str(folder), "--threads", str(THREADS), "--dtype", dtype)
    worker, found = str(PEERS / "worker.py"), []
    for cache in ("none", "para_attention", "cache_dit"):
        python = args.cache_dit if cache == "none" else getattr(args, cache)
        if python is None:
            continue
        command = (python, worker, *shared, "--cache", cache, "--threshold", str(threshold))
        found.append(System(command, cached=cache != "none"))
        found.append(System((*command, "--compile"), cached=cache != "none", may_lack=True))
    for tag in (UNCACHED, str(CacheConfig(threshold))):
        command = (sys.executable, str(PEERS / "our_worker.py"), *shared, "--cache", tag)
        found.append(System(command, cached=tag != UNCACHED, ours=True))
    return found


def layers_of(width, blocks):
    """The products [rows, inputs, outputs] of so many blocks' linear layers, doubles first; modulation has one row."""
    model, found = MODELS[width], []
    image = model.side**2
    for index in range(blocks):
        double = index < model.doubles
        for rows in (image, TEXT) if double else (image + TEXT,):
            found += (
                [[1, width, (6 if double else 3) * width]] + [[rows, width, width]] * 3 + [[rows, width, 4 * width]]
            )
            found += [[rows, width, width], [rows, 4 * width, width]] if double else [[rows, 5 * width, width]]
    return found


def measure(args, width, dtype, threshold, folder):
    """Starts the systems and has them draw in turn: their records, and the seconds of the plain products."""
    from tqdm import tqdm

    request, model = request_of(width, args.steps, folder), MODELS[width]
    steps = [layers_of(width, 1), layers_of(width, model.doubles + model.singles)]
    products = System((args.cache_dit, str(PEERS / "products_worker.py")), cached=False)
    about = f"{width} wide, {dtype}"
    with ExitStack() as stack:

        def started(system, number):
            worker = Worker(system, folder, number)
            stack.enter_context(worker.process)
            return worker

        workers = []
        systems = systems_of(args, folder / str(width), dtype, threshold)
        for number, system in enumerate(tqdm(systems, desc=f"{about}: warm-up")):
            workers.append(started(system, number))
            workers[-1].warm_up(request)
        limits = [started(products, len(workers) + number) for number in range(2)]
        settings = {"dtype": dtype, "threads": THREADS}
        asked = [{**request, "arguments": {"layers": layers, **settings}} for layers in steps]
        for limit, each in zip(limits, asked):
            limit.warm_up(each)
        for _ in tqdm(range(args.runs), desc=f"{about}: runs"):
            for worker in workers:
                if not worker.lack:
                    worker.draw(request)
            for limit, each in zip(limits, asked):
                limit.draw(each)
        records = [record_of(worker, width, dtype) for worker in workers]
        reused, computed = ([run["denoise"] for run in limit.runs] for limit in limits)
    return records, {"width": width, "dtype": dtype, "threshold": threshold, "reused": reused, "computed": computed}


def record_of(worker, width, dtype):
    """What a worker did."""
    system = worker.system
    record = {"name": worker.name, "ours": system.ours, "cached": system.cached, "versions": worker.versions}
    record.update(width=width, dtype=dtype)
    if worker.lack:
        return {**record, "lack": worker.lack}
    return {**record, "denoise": [run["denoise"] for run in worker.runs], "reused": worker.runs[0]["reused"]}


def rows_of(records, limits):
    """The rows of a width and a dtype."""
    ours = {record["cached"]: record for record in records if record["ours"]}
    computed, reused = (statistics.median(limits[kind]) for kind in ("computed", "reused"))
    rows = []
    for record in records:
        row = {"Width": record["width"], "Dtype": record["dtype"], "System": record["name"]}
        row.update(
            dict.fromkeys(("Computed Steps", "Denoise (s)", "Ours / Theirs", "Over the Limit", "Decisions"), "-")
        )
        rows.append(row)
        if "lack" in record:
            row["System"] += f", not to be had here: {' '.join(record['lack'].split())[:120]}"
            continue
        mine, seconds = ours[record["cached"]], statistics.median(record["denoise"])
        steps, again = record["reused"].count(False), record["reused"].count(True)
        row["Computed Steps"], row["Denoise (s)"] = steps, spread(record["denoise"])
        row["Over the Limit"] = f"{seconds / (steps * computed + again * reused):.2f}"
        if not record["ours"]:
            row["Ours / Theirs"] = f"{statistics.median(mine['denoise']) / seconds:.2f}"
            row["Decisions"] = "the same" if record["reused"] == mine["reused"] else "other"
    return rows


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        rows, records, limits = [], [], []
        with TemporaryDirectory() as folder:
            folder = Path(folder)
            for width in args.widths:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    threshold = process.submit(make_checkpoint, width, args.steps, folder / str(width)).result()
                for dtype in args.dtypes:
                    found, limit = measure(args, width, dtype, threshold, folder)
                    rows += rows_of(found, limit)
                    records += found
                    limits.append(limit)
        settings = {"runs": args.runs, "steps": args.steps, "threads": THREADS, "text_tokens": TEXT, **machine()}
        data = {"settings": settings, "systems": records, "limits": limits}
        publish(args.save_path, "growth_against_torch", markdown(rows), rows, data, args.into)

    # Whatever a framework takes its number of threads from, none has more processors than this.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    return exit_status("growth_against_torch", work)


if __name__ == "__main__":
    sys.exit(main())
