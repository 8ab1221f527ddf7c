"""Speed against nearness to the uncached pictures, over all that FBCache_ms offers: the Pareto front, and who leads.

    .venv/bin/python benchmarks/frontier.py

The prompts are drawn under every setting, and the uncached run is timed beside every fourth picture of each. Plain
First-Block Cache's speed-up as a function of PSNR is a line through its thresholds; a setting's lead is its own
speed-up over the line's at the same PSNR. The family that leads by --lead or more over the widest range of PSNR wins;
fewer steps without a cache are shown as the control, and are no candidate.

By operations a setting is held against the front of all other families, and against fewer steps, at the same PSNR.

A killed run goes on where it was. Each number of steps has a folder of its own, of which FBCache_ms.eval.report makes a
page with the front.
"""

import argparse
import json
import math
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

from FBCache_ms.config import FITTED, PRESETS, CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    add_into_option,
    branches_of,
    check_cache,
    check_model_and_size,
    check_range,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.cases import BASELINE, UNCACHED, Row, is_for
from FBCache_ms.eval.shared.drawing import Setting, draw_and_finish
from FBCache_ms.eval.shared.files import check_folder, check_into, put_into, say_written, write_text
from FBCache_ms.eval.shared.frontier_chart import add_costs, chart_page
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.measure import Judge, cell_of, clip_folder, write_sweep
from FBCache_ms.eval.shared.prompts import OWN_PROMPTS, choose_prompts, knows_captions_alone
from FBCache_ms.eval.shared.scenes import held_out_captions
from FBCache_ms.eval.shared.tables import KINDS, markdown, show, spread, write_tables
from FBCache_ms.eval.tune import FAMILIES, INTERVALS, THRESHOLDS
from FBCache_ms.rules.schedules import LEARNT

PLAIN, CONTROL = "FBCache", "fewer steps"

PLAIN_THRESHOLDS = (0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12, 0.13, 0.15, 0.17, 0.2, 0.25, 0.3, 0.4, 0.6)
"""Close together, since every other setting is held against the line through them."""

SHARES = (0.18, 0.22, 0.25, 0.29, 0.36, 0.5, 0.7)
"""Of the steps, for the control."""

STATIC = "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer,schedule_interval={:d},forecast=newton"

SPECA = "F0B0_W0MC8_T1O2_R0.12,gate={},speca_threshold={{:g}},speca_decay=1,speca_floor=0"
VERIFIED = (0.8, 0.4, 0.2, 0.1, 0.05, 0.03, 0.02)
"""SpeCa's thresholds, the same at every step."""

OTHERS = {
    "FBCache + Newton": ("F1B0_W0_T1O2_R{:g},forecast=newton", THRESHOLDS),
    "FBCache + HiCache": ("F1B0_W0_T1O2_R{:g},forecast=hicache", THRESHOLDS),
    "FBCache or TeaCache": ("F1B0_W0_R{:g},gate=fbcache_or_teacache,teacache_threshold=0.25", THRESHOLDS),
    "SpeCa": (SPECA.format("speca"), VERIFIED),
    "SpeCa, heard next": (SPECA.format("speca_next"), VERIFIED),
    "MeanCache": (
        "F0B0_W0_T1O3_R0.12,gate=static,schedule=meancache_{:d},forecast=meancache,meancache_steps=2",
        (10, 17, 25),
    ),
    "DiCache": ("F1B0_W6_T1O1_R{:g},gate=dicache,probe=hidden,forecast=dicache,end=0.95", THRESHOLDS),
    "Newton": (STATIC, INTERVALS),
    "Newton in sigma": (STATIC + ",forecast_coordinate=sigma", INTERVALS),
    "MagCache": ("F0B0_W0_R0.12,gate=static,schedule=magcache,magcache_threshold={:g}", (0.06, 0.12, 0.24, 0.48)),
    "learnt": ("{}", tuple(LEARNT)),
    "fitted": ("{}", tuple(FITTED)),
}
"""Tags with one number left open, and its values, as in FAMILIES."""

CHART = "frontier.html"

EVERY = {PLAIN: 1, "learnt": 1, "fitted": 1}
"""Every so many-th value of a family is drawn; of others every third."""

LEARNT_FROM = 6
"""The learnt schedules have seen so many of the first captions of seed 0."""


def parse_arguments(argv=None):
    """The command line; ``args.runs`` has the arguments of each number of steps."""
    parser = Parser(__name__, "frontier", description=__doc__, conflict_handler="resolve")
    # Those that follow would end with the first frontier.
    add_drawing_options(parser, limit=50, save_path="./results/frontier", context_parallel=False)
    add = parser.add_argument
    add("--num_inference_steps", type=int, nargs="+", default=[28, 50], metavar="N", help="a frontier each")
    add("--cache", nargs="+", default=[], metavar="TAG|FILE", help="further settings, such as masks of learn_mask's")
    names = [*families(), CONTROL, "preset"]
    add("--families", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--lead", type=float, default=1.5, metavar="X", help="over plain First-Block Cache at equal PSNR")
    add_clip_option(parser)
    add_into_option(parser)
    # Other noise than that of the prompts which the masks were learnt from.
    parser.set_defaults(seed=1)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        check_range("lead", args.lead, 1)
        check_range("limit", args.limit, 1)
        for cache in args.cache:
            CacheConfig.named(cache)
        args.prompts = unseen_prompts(args)
        args.clip = clip_folder(args)
        args.runs = [run_of(args, steps) for steps in args.num_inference_steps]
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def families():
    """{family: (tag, values)} of all that is compared."""
    return {**FAMILIES, PLAIN: (FAMILIES[PLAIN][0], PLAIN_THRESHOLDS), **OTHERS}


def rows_of(args, steps):
    """The rows for a number of steps, the uncached one first; a mask for another number of steps is left out."""
    names = args.families or [*families(), CONTROL, "preset"]
    rows = [BASELINE]
    for family, (tag, values) in families().items():
        if family in names:
            chosen = [value for value in values[:: EVERY.get(family, 3)] if is_for(tag.format(value), steps)]
            rows += [Row(family, f"{family} {value}", tag.format(value)) for value in chosen]
    if CONTROL in names:
        rows += [Row(CONTROL, f"{share:.0%} of the steps", UNCACHED, share) for share in SHARES]
    if "preset" in names:
        drawn = {CacheConfig.named(row.cache) for row in rows}
        others = [name for name in PRESETS if CacheConfig.preset(name) not in drawn and is_for(name, steps)]
        rows += [Row(f"preset {name}", name, name) for name in others]
    for cache in args.cache:
        if is_for(cache, steps):
            rows.append(Row("--cache", Path(cache).stem if cache.endswith(".json") else cache, cache))
    return rows


def run_of(args, steps):
    """The arguments for one number of steps: its rows, and a folder of its own.

    Raises OSError or ValueError for what cannot be.
    """
    run = argparse.Namespace(**vars(args))
    run.num_inference_steps, run.save_path = steps, args.save_path / f"{steps}_steps"
    check_model_and_size(run)
    run.rows = rows_of(args, steps)
    for row in run.rows:
        check_cache(CacheConfig.named(row.cache), args.ckpt, row.steps_of(steps))
    check_folder(run.save_path)
    return run


def unseen_prompts(args):
    """The prompts without those that a mask was learnt from."""
    seen = set(held_out_captions(LEARNT_FROM))
    for cache in args.cache:
        if cache.endswith(".json"):
            preset = json.loads(Path(cache).read_text(encoding="utf-8"))
            seen.update(preset.get("search", {}).get("prompts", ()))
    wanted = args.limit + len(seen)
    if args.prompts is None and not knows_captions_alone(args.ckpt):
        wanted = max(min(wanted, len(OWN_PROMPTS)), args.limit)
    more = argparse.Namespace(**{**vars(args), "limit": wanted})
    prompts = [prompt for prompt in choose_prompts(more) if prompt not in seen]
    return prompts[: args.limit]


def line_of(cells):
    """Plain First-Block Cache's (PSNR, speed-up) in rising PSNR; thresholds that changed no picture are left out."""
    return sorted((cell["psnr"], cell["speedup"]) for cell in cells if cell["case"] == PLAIN and finite(cell))


def finite(cell):
    """Whether any picture differs from the uncached one."""
    return math.isfinite(cell["psnr"])


def lead(cell, line):
    """A speed-up over that of the line at the same PSNR; None beyond the line's ends."""
    if not line or not line[0][0] <= cell["psnr"] <= line[-1][0]:
        return None
    psnrs, speedups = zip(*line)
    return cell["speedup"] / float(np.interp(cell["psnr"], psnrs, speedups))


def front(cells):
    """Those of the cells that no other surpasses in both speed-up and PSNR, the fastest first."""
    best = []
    for cell in sorted(cells, key=lambda cell: (-cell["speedup"], -cell["psnr"])):
        if not best or cell["psnr"] > best[-1]["psnr"]:
            best.append(cell)
    return best


def operations_of_others(cell, others):
    """A cell's operations over those that others need for the same PSNR; None where they never come to it.

    Between two settings of the others' front their operations are read from a straight line in PSNR.
    """
    best = []
    for other in sorted(filter(finite, others), key=lambda other: (other["tflops"], -other["psnr"])):
        if not best or other["psnr"] > best[-1][0]:
            best.append((other["psnr"], other["tflops"]))
    if not best or not finite(cell) or not best[0][0] <= cell["psnr"] <= best[-1][0]:
        return None
    return cell["tflops"] / float(np.interp(cell["psnr"], *zip(*best)))


def longest_lead(cells, wanted):
    """Those of a family's cells, neighbours in PSNR, that lead by ``wanted`` over the widest range of it."""
    by_psnr = sorted(filter(finite, cells), key=lambda cell: cell["psnr"])
    groups = groupby(by_psnr, lambda cell: (cell["lead"] or 0) >= wanted)
    runs = [list(group) for leads, group in groups if leads]
    return max(runs, key=lambda run: run[-1]["psnr"] - run[0]["psnr"], default=[])


def leaders(cells, wanted):
    """{family: its cells of the longest lead}, the widest range of PSNR first; the control is no candidate."""
    names = dict.fromkeys(cell["case"] for cell in cells if cell["case"] not in (BASELINE.case, CONTROL))
    runs = {name: longest_lead([cell for cell in cells if cell["case"] == name], wanted) for name in names}
    found = {name: run for name, run in runs.items() if run}
    return dict(sorted(found.items(), key=lambda item: item[1][0]["psnr"] - item[1][-1]["psnr"]))


def add_leads(cells):
    """Writes into each cell its lead, whether it is on the front, and what it needs of others' operations."""
    line, best = line_of(cells), front(cells)
    uncached = next((cell["tflops"] for cell in cells if cell["case"] == BASELINE.case), None)
    control = [cell for cell in cells if cell["case"] == CONTROL]
    for cell in cells:
        others = [other for other in cells if other["case"] not in (BASELINE.case, CONTROL, cell["case"])]
        cell["operations"] = None if uncached is None else cell["tflops"] / uncached
        cell["of_others"] = operations_of_others(cell, others)
        cell["of_fewer_steps"] = operations_of_others(cell, control)
        cell["lead"] = lead(cell, line)
        cell["front"] = any(cell is other for other in best)


def share(value):
    """A share as text."""
    return "-" if value is None else f"{value:.0%}"


def table_of(cells):
    """The cells as rows of text, the fastest first."""
    return [
        {
            "Family": cell["case"],
            "Setting": cell["name"],
            "`--cache`": f"`{cell['cache']}`",
            "Computed": f"{cell['computed_steps']:.1f} of {cell['steps']}",
            "Uncached (s)": f"{cell['uncached_seconds']:.3f}",
            "Time (s)": spread([entry["seconds"] for entry in cell["pictures"]]),
            "Speedup": f"{cell['speedup']:.2f}x",
            "PSNR": f"{cell['psnr']:.1f}" if finite(cell) else "equal",
            "Prompt Score": share(cell["prompt_score"]),
            "CLIP Score": "-" if cell["clip_score"] is None else f"{cell['clip_score']:.3f}",
            "Operations": share(cell["operations"]),
            "Of others'": share(cell["of_others"]),
            "Of fewer steps'": share(cell["of_fewer_steps"]),
            "Lead": "-" if cell["lead"] is None else f"{cell['lead']:.2f}x",
            "Front": "yes" if cell["front"] else "",
        }
        for cell in sorted(cells, key=lambda cell: -cell["speedup"])
    ]


def leaders_table(found):
    """Who leads where, as rows of text."""
    return [
        {
            "Family": name,
            "PSNR": f"{run[0]['psnr']:.1f} to {run[-1]['psnr']:.1f}",
            "Speedup": f"{run[-1]['speedup']:.2f}x to {run[0]['speedup']:.2f}x",
            "Lead": f"{min(cell['lead'] for cell in run):.2f}x to {max(cell['lead'] for cell in run):.2f}x",
            "Settings": ", ".join(cell["name"] for cell in run),
        }
        for name, run in found.items()
    ]


def text_of(args, steps, cells, found, rows):
    """The text for one number of steps, with a table of some of the cells."""
    title = f"{steps} steps, {len(args.prompts)} prompts, {len(cells)} settings"
    if not found:
        return f"{title}: none leads by {args.lead:g}x\n\n{markdown(table_of(rows))}"
    return (
        f"{title}; who leads by {args.lead:g}x or more, the winner first:\n\n{markdown(leaders_table(found))}\n"
        f"{markdown(table_of(rows))}"
    )


def shown(cells, found, args):
    """What a page shows: of all families the front, the leaders and First-Block Cache; of chosen ones every cell."""
    if args.families:
        return cells
    leading = [cell for run in found.values() for cell in run]
    return [cell for cell in cells if cell["front"] or cell["case"] == PLAIN or any(cell is each for each in leading)]


def measure(run):
    """Draws what is missing for one number of steps; the cells with their leads, and what the pictures depend on.

    Of several ranks the first alone has cells.
    """
    steps, cells, common = run.num_inference_steps, [], {}
    settings = {row: Setting.named(row.cache, row.steps_of(steps)) for row in run.rows}

    def finish(painter, folders):
        common.update(painter.common)
        judge = Judge(run.prompts, folders[settings[BASELINE]], run.clip)
        cells.extend(cell_of(row, each, folders[each], run.save_path, judge) for row, each in settings.items())
        write_sweep(run.save_path, {**common, "steps": steps}, run.prompts, cells)

    draw_and_finish(run, run.prompts, dict.fromkeys(settings.values()), finish)
    add_leads(cells)
    return cells, common


def work(args):
    """All numbers of steps; writes frontier.md, .csv and .json, and puts what stands out into a page."""
    texts, summaries, table, data = [], [], [], {"machine": machine(), "prompts": args.prompts, "runs": []}
    for run in args.runs:
        steps = run.num_inference_steps
        cells, common = measure(run)
        if not cells:
            continue
        add_costs(cells, branches_of(run))
        title = f"{steps} steps, {len(args.prompts)} prompts: nearness to the uncached pictures over three costs"
        write_text(run.save_path / CHART, chart_page(title, cells))
        found = leaders(cells, args.lead)
        texts.append(text_of(args, steps, cells, found, cells))
        summaries.append(text_of(args, steps, cells, found, shown(cells, found, args)))
        table += table_of(cells)
        names = {family: [cell["name"] for cell in leading] for family, leading in found.items()}
        data["runs"].append({"settings": {**common, "steps": steps}, "leaders": names, "cells": cells})
    if not texts:
        return
    text = "\n".join(texts)
    write_tables(args.save_path, "frontier", text, table, data)
    put_into(args.into, "\n".join(summaries))
    show(text)
    sweeps = [f"{run.save_path.name}/{name}" for run in args.runs for name in ("sweep.json", CHART)]
    say_written(args.save_path, *(f"frontier.{kind}" for kind in KINDS), *sweeps)


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    return exit_status("frontier", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
