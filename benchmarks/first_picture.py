"""What it takes to a first picture: fbcache-flux from the start of its process to its end, cold and warm.

    .venv/bin/python benchmarks/first_picture.py --into docs/results/first_picture.md

Cold is without a compile cache, warm is the next process, with the one that the cold one left; both draw the same
picture. "Other" is the next again, with another prompt, seed and guidance. Two checkpoints: the embedded one, and one
of FLUX.1's 19 double and 38 single blocks, made of the embedded one's by repeating them. The rest is Python's start,
the command line's checks, writing and the process's end. A second table tells where the imports' time goes, in the
order of importing. Ends with status 1 if the pictures differ, a later start of the embedded checkpoint takes more
than 0.35 of its cold one, or the deep one's loop more than 20 s to compile.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.runtime.checkpoint import TINY_FLUX

PROGRAM = "FBCache_ms.eval.run_flux_withFBCache_pipeline"
PARTS = ("imports", "load", "encode", "compile", "denoise", "decode")
MODULES = ("mindone", "mindone.diffusers", "FBCache_ms.pipelines.flux")
"""The first brings MindSpore and transformers along."""
DOUBLES, SINGLES = 19, 38
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LONGEST_WARM, LONGEST_SECONDS = 0.35, 20
STARTS = COLD, WARM, OTHER = "cold", "warm", "other"
OTHERS = ("--prompt", "two small yellow squares, black background", "--seed", "1", "--guidance_scale", "2")
"""What another generation may differ in without another graph."""


def embedded(folder):
    """The embedded checkpoint."""
    return TINY_FLUX


def deep(folder):
    """A checkpoint of FLUX.1's blocks, written into a folder."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(TINY_FLUX, folder)
    config = folder / "transformer" / "config.json"
    layers = json.loads(config.read_text())
    stacks = {
        "transformer_blocks": (layers["num_layers"], DOUBLES),
        "single_transformer_blocks": (layers["num_single_layers"], SINGLES),
    }
    config.write_text(json.dumps({**layers, "num_layers": DOUBLES, "num_single_layers": SINGLES}))
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        stack, _, rest = name.partition(".")
        if stack not in stacks:
            tensors[name] = tensor
            continue
        index, _, layer = rest.partition(".")
        has, wanted = stacks[stack]
        tensors.update({f"{stack}.{copy}.{layer}": tensor for copy in range(int(index), wanted, has)})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "np"})
    return folder


CHECKPOINTS = {"embedded": embedded, "deep": deep}


def draw(checkpoint, graphs, results, *options):
    """The seconds of a process that draws: of each part, of the rest and of all; and the picture's bytes.

    Raises ValueError if it fails.
    """
    command = [sys.executable, "-m", PROGRAM, "--ckpt", checkpoint, "--compile_cache", graphs, "--save_path", results]
    begin = time.perf_counter()
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    whole = time.perf_counter() - begin
    if done.returncode:
        raise ValueError(f"fbcache-flux fails: {done.stderr[-2000:]}")
    seconds = json.loads((results / "run.json").read_text())["seconds"]
    parts = {name: seconds[name] for name in PARTS}
    return {**parts, "rest": whole - sum(parts.values()), "whole": whole}, (results / "output_0.png").read_bytes()


def in_turn(checkpoint, folder):
    """One of each of STARTS: {start: seconds}, and whether the first two drew the same."""
    graphs, results = folder / "graphs", folder / "results"
    shutil.rmtree(graphs, ignore_errors=True)
    cold, picture = draw(checkpoint, graphs, results)
    warm, same = draw(checkpoint, graphs, results)
    other, _ = draw(checkpoint, graphs, results, *OTHERS)
    return {COLD: cold, WARM: warm, OTHER: other}, picture == same


IMPORT = """
import importlib, json, sys, time
from FBCache_ms.runtime.imports import quick_imports

seconds = {}
for name in sys.argv[1:]:
    begin = time.perf_counter()
    with quick_imports():
        importlib.import_module(name)
    seconds[name] = time.perf_counter() - begin
print(json.dumps(seconds))
"""


def imports():
    """The seconds that each of MODULES takes to import behind those before it, as programs do; a process of its own."""
    done = subprocess.run([sys.executable, "-c", IMPORT, *MODULES], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def start_rows(starts):
    """A row for each checkpoint and start, from {checkpoint: [{start: seconds}]}."""
    rows = []
    for name, turns in starts.items():
        for start in STARTS:
            seconds = {part: [turn[start][part] for turn in turns] for part in (*PARTS, "rest", "whole")}
            rows.append(
                {
                    "Checkpoint": name,
                    "Start": start,
                    **{part.capitalize(): f"{statistics.median(seconds[part]):.1f}" for part in (*PARTS, "rest")},
                    "Whole (s)": spread(seconds["whole"], 1),
                    "Cold (s)": spread([turn["cold"]["whole"] for turn in turns], 1),
                    "Over Cold": f"{over_cold(turns, start):.2f}x",
                }
            )
    return rows


def over_cold(turns, start):
    """A start's time over the cold one's, the median of all turns."""
    return statistics.median(turn[start]["whole"] / turn["cold"]["whole"] for turn in turns)


def import_rows(runs):
    """A row for each module."""
    return [{"Import": name, "Seconds": spread([seconds[name] for seconds in runs], 2)} for name in MODULES]


def failures(starts, same):
    """What is not as it has to be, in words."""
    found = [] if same else ["a cold and a warm start drew different pictures"]
    for start in (WARM, OTHER) if "embedded" in starts else ():
        if over_cold(starts["embedded"], start) > LONGEST_WARM:
            found.append(f"a start that is {start} takes more than {LONGEST_WARM} of a cold one")
    if "deep" in starts and statistics.median(turn["cold"]["compile"] for turn in starts["deep"]) > LONGEST_SECONDS:
        found.append(f"{DOUBLES} + {SINGLES} blocks take more than {LONGEST_SECONDS} s to compile")
    return found


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "first_picture", description=__doc__)
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        default=list(CHECKPOINTS),
        choices=CHECKPOINTS,
        metavar="NAME",
        help="which",
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="turns")
    add_save_path(parser.add_argument, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def main(argv=None):
    """The program; returns its exit status."""
    args, found = parse_arguments(argv), []

    def work():
        from tqdm import tqdm

        starts, same, imported = {name: [] for name in args.checkpoints}, True, []
        with tempfile.TemporaryDirectory() as folder, tqdm(total=args.runs * len(starts)) as bar:
            folders = {name: Path(folder) / name for name in starts}
            checkpoints = {name: CHECKPOINTS[name](folders[name] / "checkpoint") for name in starts}
            for _ in range(args.runs):
                imported.append(imports())
                for name, turns in starts.items():
                    seconds, equal = in_turn(checkpoints[name], folders[name])
                    turns.append(seconds)
                    same = same and equal
                    bar.update()
        rows = start_rows(starts)
        text = f"{markdown(rows)}\n{markdown(import_rows(imported))}"
        data = {"settings": {"runs": args.runs, **machine()}, "starts": starts, "imports": imported}
        publish(args.save_path, "first_picture", text, rows, data, args.into)
        found.extend(failures(starts, same))
        for each in found:
            print(each, file=sys.stderr)

    return exit_status("first_picture", work) or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
