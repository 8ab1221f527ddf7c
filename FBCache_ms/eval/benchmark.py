"""Measures how fast Flux draws: operator by operator, as one graph, and with caches, every row in turn."""

import argparse
import os
import shutil
import statistics
import sys

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_drawing_options,
    add_into_option,
    check_cache,
    check_model_and_size,
    check_range,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.cases import ROWS, UNCACHED
from FBCache_ms.eval.shared.drawing import Setting, draw_and_finish, named_settings
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.prompts import choose_prompts
from FBCache_ms.eval.shared.tables import markdown, publish, spread

PYNATIVE, GRAPH = "Baseline (PyNative Mode)", "Baseline (Graph Mode)"


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "benchmark", description=__doc__)
    add_drawing_options(parser, limit=5, save_path="./results/benchmark", deterministic=False)
    add = parser.add_argument_group("rows").add_argument
    add("--cache", nargs="+", default=[], metavar="TAG|PRESET", help=f"rows beside the baselines and {', '.join(ROWS)}")
    add("--runs", type=int, default=5, metavar="N", help="timed runs of each row, after one to warm up")
    add(
        "--pynative",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to time the slow baseline, operator by operator",
    )
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        check_model_and_size(args)
        check_range("runs", args.runs, 1, 10_000)
        for tag in (*ROWS, *args.cache):
            check_cache(CacheConfig.named(tag), args.ckpt, args.num_inference_steps)
        prompts = choose_prompts(args)
        args.prompts = [prompts[run % len(prompts)] for run in range(args.runs)]
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def settings_of(args):
    """{name: Setting} of the rows, in their order."""
    rows = named_settings([*ROWS, *args.cache], args.num_inference_steps)
    if args.pynative:
        rows = {PYNATIVE: Setting.named(UNCACHED, args.num_inference_steps, graph=False), **rows}
    return rows


def figures_of(name, setting, folder, image_size, number):
    """A row's figures of ``number`` runs: seconds are medians, with the least and the greatest."""
    runs = folder.seconds(number)
    times = [run["denoise"] for run in runs]
    return {
        "configuration": name,
        "tag": str(setting.config),
        "image_size": "x".join(map(str, image_size)),
        "steps": setting.steps,
        "runs": len(times),
        "seconds_per_step": statistics.median(times) / setting.steps,
        "seconds": statistics.median(times),
        "least_seconds": min(times),
        "greatest_seconds": max(times),
        "compile_seconds": max(run["compile"] for run in runs),
        "computed_steps": statistics.mean(folder.record(run)["reused"].count(False) for run in range(len(runs))),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "cache_bytes": folder.record(0)["cache_bytes"] if setting.config.has_gate else 0,
        "times": times,
    }


def text_of(figures):
    """The table of the field, and one of what else was measured."""
    baseline = {row["configuration"]: row["seconds"] for row in figures if row["configuration"] in (PYNATIVE, GRAPH)}
    first, second = [], []
    for row in figures:
        over = {name: seconds / row["seconds"] for name, seconds in baseline.items()}
        row["speedup"] = over[GRAPH]
        row["speedup_over_pynative"] = over.get(PYNATIVE)
        speedup = f"{over[GRAPH]:.2f}x ({baseline[GRAPH]:.3f} / {row['seconds']:.3f})"
        if PYNATIVE in over:
            speedup += f", {over[PYNATIVE]:.1f}x over PyNative ({baseline[PYNATIVE]:.3f} / {row['seconds']:.3f})"
        first.append(
            {
                "Configuration": row["configuration"],
                "Image Size": row["image_size"],
                "Steps": row["steps"],
                "Time per Step (s)": f"{row['seconds_per_step']:.4f}",
                "Total Time (s)": f"{row['seconds']:.3f}",
                "Speedup": speedup,
            }
        )
        second.append(
            {
                "Configuration": row["configuration"],
                "Computed Steps": f"{row['computed_steps']:.1f}",
                f"Total Time, Median of {row['runs']} Runs (s)": spread(row["times"]),
                "Compilation (s)": f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "-",
                "Peak Memory (MB)": f"{row['peak_bytes'] / 1e6:.0f}",
                "Cache (MB)": f"{row['cache_bytes'] / 1e6:.2f}",
            }
        )
    return f"{markdown(first)}\n{markdown(second)}"


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    settings = settings_of(args)

    def finish(painter, folders):
        figures = [
            figures_of(name, each, folders[each], painter.image_size, args.runs) for name, each in settings.items()
        ]
        text = text_of(figures)
        rows = [{name: value for name, value in row.items() if name != "times"} for row in figures]
        publish(args.save_path, "benchmark", text, rows, {"settings": painter.common, "rows": figures}, args.into)
        # The next benchmark measures anew; a name of its own, so that none goes on with what is half removed.
        done = args.save_path / f".done.{os.getpid()}"
        os.rename(args.save_path / "unfinished", done)
        shutil.rmtree(done)

    return exit_status(
        "benchmark",
        lambda: draw_and_finish(args, args.prompts, settings.values(), finish, in_turn=True, name="unfinished"),
    )


if __name__ == "__main__":
    sys.exit(main())
