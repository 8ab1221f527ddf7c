"""Sweeps: how long many settings take in one process, against the sum of their denoise times.

    .venv/bin/python benchmarks/sweep_time.py

The embedded checkpoint draws one prompt under 50 settings, thresholds by limits and warm-ups, of one structure or more,
each from the noise of the same seed, in three ways: FluxPipeline that is given the text each time; FluxPipeline that is
given its embeddings; and the sweep program's way, which writes the pictures and times the uncached loop beside them.
The clock runs from the loaded model to the last picture as bytes. Each way has a pipeline of its own, whose first sweep
compiles; that one is told apart from the others, which take turns.
"""

import statistics
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval import sweep
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.drawing import Painter, Setting, draw_missing
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.rules.schedules import MAX_STEPS

THRESHOLDS = (0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.5)
LIMITS = (
    {},
    {"warmup_steps": 4},
    {"warmup_steps": 8},
    {"max_consecutive_cache_hits": 2},
    {"max_consecutive_cache_hits": 4},
)
PARTS = ("compile", "text", "denoise", "decode")


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "sweep_time", description=__doc__)
    parser.add_argument("--steps", type=int, default=28, metavar="N", help="of a generation")
    parser.add_argument("--settings", type=int, default=50, metavar="N", help="at most 50")
    parser.add_argument(
        "--structures", type=int, default=1, metavar="N", help="structures, an order of the forecast each"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="sweeps after the first")
    add_save_path(parser.add_argument, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("steps", args.steps, 5, MAX_STEPS)
        check_range("settings", args.settings, 1, len(THRESHOLDS) * len(LIMITS))
        check_range("structures", args.structures, 1, args.settings)
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def configs(settings, structures):
    """So many CacheConfigs, the orders 0 to structures - 1 in turn."""
    chosen = enumerate(islice(product(LIMITS, THRESHOLDS), settings))
    return [CacheConfig(threshold, number % structures, **limits) for number, (limits, threshold) in chosen]


class Stopwatch:
    """A function that sums up the seconds of its calls."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        begin = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - begin
        return result


class TimedPainter(Painter):
    """A Painter that keeps the seconds of each call of its pipeline."""

    def __init__(self, args, pipe):
        super().__init__(args)
        self._pipe, self.calls = pipe, []

    def _draw(self, *asked):
        result = super()._draw(*asked)
        self.calls.append(dict(self.pipe.seconds))
        return result


def load(args):
    """A pipeline whose encode_prompt is a Stopwatch."""
    pipe = Painter(args).pipe
    pipe.encode_prompt = Stopwatch(pipe.encode_prompt)
    return pipe


def by_text(pipe, args, chosen):
    """Draws with FluxPipeline, which encodes the prompt each time."""
    return by_pipeline(pipe, args, chosen, {"prompt": args.prompts[0]})


def by_embeddings(pipe, args, chosen):
    """Draws with FluxPipeline, the prompt encoded once."""
    embeds, pooled = pipe.encode_prompt(args.prompts[0], max_sequence_length=pipe.tokenizer_2.model_max_length)[:2]
    return by_pipeline(pipe, args, chosen, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


def by_pipeline(pipe, args, chosen, prompt):
    """A picture a CacheConfig: the seconds of each call, and those of the denoise loops that count."""
    import numpy as np

    calls = []
    for config in chosen:
        picture = pipe(
            **prompt,
            num_inference_steps=args.num_inference_steps,
            generator=np.random.default_rng(args.seed),
            output_type="np",
            cache_config=config,
        )[0][0]
        (picture * 255).round().astype(np.uint8)
        calls.append(dict(pipe.seconds))
    return calls, [call["denoise"] for call in calls]


def by_program(pipe, args, chosen):
    """Draws as the sweep program does, in a new folder."""
    painter = TimedPainter(args, pipe)
    settings = [Setting(config, args.num_inference_steps) for config in chosen]
    with tempfile.TemporaryDirectory() as folder:
        folders = {setting: painter.folder(Path(folder), setting) for setting in settings}
        draw_missing(painter, folders, args.prompts)
        return painter.calls, [each.seconds(1)[0]["denoise"] for each in folders.values()]


WAYS = {
    "FluxPipeline, text": by_text,
    "FluxPipeline, embeddings": by_embeddings,
    "FBCache_ms.eval.sweep": by_program,
}


def timed(way, pipe, args, chosen):
    """What a sweep takes, a record."""
    text, begin = pipe.encode_prompt.seconds, time.perf_counter()
    calls, kept = way(pipe, args, chosen)
    return record(time.perf_counter() - begin, calls, pipe.encode_prompt.seconds - text, kept)


def record(wall, calls, text, kept):
    """What a sweep took, in seconds; "rest" is all that is none of PARTS."""
    parts = {name: sum(call.get(name, 0.0) for call in calls) for name in PARTS}
    parts["text"] = text
    return {
        "wall": wall,
        "kept": sum(kept),
        "ratio": wall / sum(kept),
        "calls": len(calls),
        **parts,
        "rest": wall - sum(parts.values()),
    }


def rows_of(name, records):
    """Two rows: a way's first sweep, and the medians of its others."""

    def row(label, chosen):
        def seconds(part):
            return f"{statistics.median(each[part] for each in chosen):.2f}"

        return {
            "Way": name,
            "Sweep": label,
            "Wall (s)": seconds("wall"),
            "Denoise (s)": seconds("kept"),
            "Ratio": spread([each["ratio"] for each in chosen]),
            "Calls": chosen[0]["calls"],
            "All Denoise (s)": seconds("denoise"),
            "Compilation (s)": seconds("compile"),
            "Text (s)": seconds("text"),
            "Decode (s)": seconds("decode"),
            "Rest (s)": seconds("rest"),
        }

    return [row("first", records[:1]), row(f"median of {len(records) - 1}", records[1:])]


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        from tqdm import tqdm

        options = ["--num_inference_steps", str(args.steps), "--limit", "1", "--save_path", str(args.save_path)]
        program_args = sweep.parse_arguments(options)
        chosen = configs(args.settings, args.structures)
        pipes = {name: load(program_args) for name in WAYS}
        records = {name: [] for name in WAYS}
        for _ in tqdm(range(args.runs + 1), desc="sweeps of each way"):
            for name, way in WAYS.items():
                records[name].append(timed(way, pipes[name], program_args, chosen))
        rows = [row for name, each in records.items() for row in rows_of(name, each)]
        settings = {**machine(), "steps": args.steps, "structures": args.structures, "settings": len(chosen)}
        text = markdown(rows)
        publish(args.save_path, "sweep_time", text, rows, {"settings": settings, "sweeps": records}, args.into)

    return exit_status("sweep_time", work)


if __name__ == "__main__":
    sys.exit(main())
