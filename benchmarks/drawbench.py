"""The field's table of FLUX.1-dev on DrawBench, row by row, beside what the same methods do here.

    .venv/bin/python benchmarks/drawbench.py

Published figures are of FLUX.1-dev at 1024 x 1024 and 50 steps. Operations are counted anew for that model. Speed-up
and scores are the embedded checkpoint's, which is another model: they rank methods, and compare with nothing published.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import FBCache_ms
from FBCache_ms.config import CacheConfig
from FBCache_ms.eval import sweep
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into, write_text
from FBCache_ms.eval.shared.frontier_chart import tflops
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.scenes import held_out_captions
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.predict.flops import step_costs
from FBCache_ms.runtime.checkpoint import FLUX_DEV

STEPS, IMAGE_TOKENS, TEXT_TOKENS = 50, 4096, 512

SEED, LEARNT_FROM = 1, 6
"""Of noise and captions; and of so many captions with the seed 0 the learnt masks were learnt."""

PRESET_FILES = sorted((Path(FBCache_ms.__file__).parent / "presets").glob("*.json"))


@dataclass(frozen=True)
class Row:
    """A row of cache-dit's table (bench/README.md at 06c47df), most of it from FoCa, arXiv 2508.16211.

    Args:
        method: as published.
        tflops, image_reward, clip: as published; None for a row of our own.
        cache: the tag or the preset that does the same here, None where nothing does.
        steps: how many of the 50 steps are taken.
    """

    method: str
    tflops: Optional[float]
    image_reward: Optional[float]
    clip: Optional[float]
    cache: Optional[str] = None
    steps: int = STEPS


def static(schedule, interval, order=0, more="", gate="static"):
    """The tag of a schedule that computes every so many-th step."""
    taylor = f"T1O{order}" if order else "T0O0"
    return f"F0B0_W0_{taylor}_R0.12,gate={gate},schedule={schedule},schedule_interval={interval}{more}"


def refreshing(schedule, interval):
    """The tag of one that refreshes chosen tokens at others."""
    return static(schedule, interval, gate="refresh")


def teacache(threshold):
    """TeaCache's tag."""
    return f"F0B0_W0_R0.12,gate=teacache,teacache_threshold={threshold}"


FOCA = ",forecast=newton"
"""FoCa's predictor and corrector with the slopes of the parabola through the last three values are that parabola."""

ROWS = (
    Row("50 steps", 3726.87, 0.9898, 32.404, UNCACHED),
    Row("60 % of the steps", 2231.70, 0.9663, 32.312, UNCACHED, 30),
    Row("Δ-DiT N=2", 2480.01, 0.9444, 32.273, static("fora", 2, more=",span=single")),
    Row("Δ-DiT N=3", 1686.76, 0.8721, 32.102, static("fora", 3, more=",span=single")),
    Row("Chipmunk", 1505.87, 0.9936, 32.776),
    Row("DBCache F4 B0 W4 MC4", 1400.08, 1.0065, 32.838, "F4B0_W4MC4_R0.12"),
    Row("FORA N=3", 1320.07, 0.9776, 32.266, static("fora", 3)),
    Row("34 % of the steps", 1264.63, 0.9453, 32.114, UNCACHED, 17),
    Row("DBCache F1 B0 + TaylorSeer O1", 1153.05, 1.0221, 32.819, "F1B0_W4MC4_T1O1_R0.24"),
    Row("TaylorSeer N=4 O2", 1042.27, 0.9857, 32.413, static("taylorseer", 4, 2)),
    Row("DuCa N=5", 978.76, 0.9955, 32.241, refreshing("duca", 5)),
    Row("FORA N=4", 967.91, 0.9730, 32.142, static("fora", 4)),
    Row("DBCache F1 B0 W4 MC6", 944.75, 0.9997, 32.849, "F1B0_W4MC6_R0.24"),
    Row("DBCache F1 B0 W4 MC6 + TaylorSeer O1", 944.75, 1.0107, 32.865, "F1B0_W4MC6_T1O1_R0.24"),
    Row("FoCa N=5", 893.54, 1.0029, 32.948, static("taylorseer", 5, 2, FOCA)),
    Row("TaylorSeer N=5 O2", 893.54, 0.9768, 32.467, static("taylorseer", 5, 2)),
    Row("TeaCache 0.8", 892.35, 0.8683, 31.704, teacache(0.8)),
    Row("22 % of the steps", 818.29, 0.8183, 31.772, UNCACHED, 11),
    Row("DBCache F4 B0 W4 MC10", 816.65, 0.8245, 32.191, "F4B0_W4MC10_R0.8"),
    Row("ToCa N=8", 784.54, 0.9451, 31.993, refreshing("toca", 8)),
    Row("DuCa N=7", 760.14, 0.9757, 32.066, refreshing("duca", 7)),
    Row("FoCa N=7", 670.44, 0.9891, 32.920, static("taylorseer", 7, 2, FOCA)),
    Row("TaylorSeer N=7 O2", 670.44, 0.9128, 32.128, static("taylorseer", 7, 2)),
    Row("FORA N=7", 670.14, 0.7418, 31.519, static("fora", 7)),
    Row("TeaCache 1.2", 669.27, 0.7394, 31.704, teacache(1.2)),
    Row("DBCache F1 B0 W4 MC10", 651.90, 0.8796, 32.318, "F1B0_W4MC10_R0.8"),
    Row("ToCa N=12", 644.70, 0.7155, 31.808, refreshing("toca", 12)),
    Row("DuCa N=10", 606.91, 0.8382, 31.759, refreshing("duca", 10)),
    Row("FoCa N=8", 596.07, 0.9502, 32.706, static("taylorseer", 8, 2, FOCA)),
    Row("*Spectrum, 14 steps*", None, None, None, "spectrum"),
    Row("*MeanCache, 10 steps*", None, None, None, "meancache"),
    Row("*fitted here, 10 steps*", None, None, None, "fitted_10_of_50"),
    Row("*fitted here, 8 steps*", None, None, None, "fitted_8_of_50"),
    Row("*fitted here, 6 steps*", None, None, None, "fitted_6_of_50"),
)


def counted_tflops(row, cell, config=FLUX_DEV):
    """A row's operations on FLUX.1-dev in 10^12, from the steps that ``cell`` computed; None where nothing is known."""
    if cell is None:
        return None
    costs = step_costs(config, 1, IMAGE_TOKENS, TEXT_TOKENS)
    return tflops(CacheConfig.named(row.cache), row.steps, cell["computed_steps"], costs)


def columns_of(row, cell):
    """A row of the table."""

    def text(value, form):
        return "-" if value is None else form.format(value)

    def measured(name, form):
        return "-" if cell is None else text(cell[name], form)

    return {
        "Method": row.method,
        "Published TFLOPs": text(row.tflops, "{:.2f}"),
        "Counted": text(counted_tflops(row, cell), "{:.2f}"),
        "ImageReward": text(row.image_reward, "{:.4f}"),
        "CLIP": text(row.clip, "{:.3f}"),
        "Here: `--cache`": "-" if row.cache is None else f"`{row.cache}`",
        "Computed": measured("computed_steps", "{:.1f} of " + str(row.steps)),
        "Uncached (s)": measured("uncached_seconds", "{:.3f}"),
        "Time (s)": measured("seconds", "{:.3f}"),
        "Speedup": measured("speedup", "{:.2f}x"),
        "PSNR": "equal" if cell and cell["psnr"] is None else measured("psnr", "{:.1f}"),
        "SSIM": measured("ssim", "{:.4f}"),
        "Prompt Score": measured("prompt_score", "{:.1%}"),
        "CLIP Score": measured("clip_score", "{:.4f}"),
    }


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "drawbench", description=__doc__)
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="captions that no mask was learnt from")
    add_save_path(parser.add_argument, "./results/drawbench", "tables and pictures")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("limit", args.limit, 1, 1000)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def unseen_captions(number):
    """So many captions that nothing here was learnt from."""
    presets = [json.loads(file.read_text(encoding="utf-8")) for file in PRESET_FILES]
    seen = {*held_out_captions(LEARNT_FROM), *(prompt for preset in presets for prompt in preset["search"]["prompts"])}
    return [caption for caption in held_out_captions(number + len(seen), SEED) if caption not in seen][:number]


def cells_of(args):
    """The cells of a sweep over all rows, {(tag or preset, steps): cell}."""
    prompts, tags = args.save_path / "prompts.txt", dict.fromkeys(row.cache for row in ROWS if row.cache)
    write_text(prompts, "".join(f"{caption}\n" for caption in unseen_captions(args.limit)))
    options = ["--prompts", prompts, "--limit", args.limit, "--seed", SEED, "--num_inference_steps", STEPS]
    tags = [tag for tag in tags if tag != UNCACHED]
    options += ["--cases", "fewer_steps", "--cache", *tags, "--save_path", args.save_path]
    if sweep.main(list(map(str, options))) != 0:
        raise OSError("the sweep did not end well")
    cells = json.loads((args.save_path / "sweep.json").read_text(encoding="utf-8"))["cells"]
    return {(cell["cache"], cell["steps"]): cell for cell in cells}


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        cells = cells_of(args)
        rows = [columns_of(row, cells.get((row.cache, row.steps))) for row in ROWS]
        data = {"settings": {**machine(), "captions": args.limit}, "rows": rows}
        publish(args.save_path, "drawbench", markdown(rows), rows, data, args.into)

    return exit_status("drawbench", work)


if __name__ == "__main__":
    sys.exit(main())
