"""What watching costs: the denoise loop with a progress bar, in pieces, against the loop in one piece.

    .venv/bin/python benchmarks/watching.py

The embedded checkpoint's transformer under plain First-Block Cache, and one of FLUX.1's 57 blocks, randomly
initialised, 256 wide and on 256 image tokens, whose steps take a good part of a second, without a cache. The two loops
run in turn; every turn gives a ratio of its own. Ends with status 1 if one's median is above 1.03.
"""

import io
import statistics
import sys

from overhead import FLUX, PROMPT, denoise, ratios, transformer_of, with_transformer

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread

LONGEST = 1.03
LARGE = {**FLUX, "num_attention_heads": 8}
SIDE = 64
"""Pixels of the large transformer's picture."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "watching", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 100], metavar="N", help="of the embedded one")
    parser.add_argument("--large_steps", type=int, default=10, metavar="N", help="of the large one")
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="turns")
    add_save_path(parser.add_argument, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        for steps in (*args.steps, args.large_steps):
            check_range("steps", steps, 5)
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def measure(pipe, prompt, config, steps, runs):
    """The seconds of the loop unwatched and watched, in turn, after a first time of each."""
    seconds = {False: [], True: []}
    for run in range(runs + 1):
        for watched in seconds:
            pipe.set_progress_bar_config(disable=not watched, file=io.StringIO())
            taken, _ = denoise(pipe, prompt, config, steps)
            if run > 0:
                seconds[watched].append(taken)
    return seconds


def figures_of(args):
    """What was measured of each transformer and number of steps."""
    from FBCache_ms import FluxPipeline
    from FBCache_ms.runtime.checkpoint import TINY_FLUX

    pipe = FluxPipeline.from_pretrained(str(TINY_FLUX))
    prompt = pipe.encode_prompt(PROMPT, max_sequence_length=pipe.tokenizer_2.model_max_length)[:2]
    large = with_transformer(pipe, transformer_of(pipe.transformer.config, **LARGE))
    large.default_sample_size = SIDE // large.vae_scale_factor
    cases = [("embedded", pipe, CacheConfig(), steps) for steps in args.steps]
    cases.append(("large", large, CacheConfig.named(UNCACHED), args.large_steps))
    figures = []
    for name, each, config, steps in cases:
        seconds = measure(each, prompt, config, steps, args.runs)
        figures.append({"transformer": name, "steps": steps, "unwatched": seconds[False], "watched": seconds[True]})
        figures[-1]["ratios"] = ratios(seconds[True], seconds[False])
    return figures


def row(figures):
    """A row of the table."""
    return {
        "Transformer": figures["transformer"],
        "Steps": figures["steps"],
        "A Step (ms)": f"{1000 * statistics.median(figures['unwatched']) / figures['steps']:.1f}",
        "Unwatched (s)": spread(figures["unwatched"]),
        "Watched (s)": spread(figures["watched"]),
        "Ratio": spread(figures["ratios"]),
    }


def main(argv=None):
    """The program; returns its exit status, 1 where watching costs too much."""
    args, over = parse_arguments(argv), []

    def work():
        figures = figures_of(args)
        rows = list(map(row, figures))
        data = {"settings": {**machine(), "runs": args.runs}, "loops": figures}
        publish(args.save_path, "watching", markdown(rows), rows, data, args.into)
        over.extend(each for each in figures if statistics.median(each["ratios"]) > LONGEST)

    return exit_status("watching", work) or int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
