"""Finds the best configuration for a model and prompts: the fastest that is good enough, or the best at a speed."""

import sys
import textwrap
from dataclasses import dataclass

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    add_into_option,
    check_cache,
    check_model_and_size,
    check_range,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.cases import BASELINE, UNCACHED, Row
from FBCache_ms.eval.shared.drawing import Setting, draw_missing, session, share, wait_for_all
from FBCache_ms.eval.shared.files import check_folder, check_into, json_bytes, put_into, say_written, write_file
from FBCache_ms.eval.shared.measure import Judge, cell_of, clip_folder, means, write_sweep
from FBCache_ms.eval.shared.prompts import choose_prompts
from FBCache_ms.eval.shared.tables import KINDS

THRESHOLDS = (0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1)
TEACACHE = (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.3, 1.6, 2)
INTERVALS = (2, 3, 4, 5, 6, 7, 8)
FAMILIES = {
    "FBCache": ("F1B0_W0_R{:g}", THRESHOLDS),
    "FBCache + TaylorSeer, order 1": ("F1B0_W0_T1O1_R{:g}", THRESHOLDS),
    "FBCache + TaylorSeer, order 2": ("F1B0_W0_T1O2_R{:g}", THRESHOLDS),
    "DBCache, 4 warm-up steps": ("F1B0_W4_T1O1_R{:g}", THRESHOLDS),
    "CG-Taylor": ("F1B0_W0_T1O1_R{:g},gate=cg_taylor", THRESHOLDS),
    "TeaCache": ("F0B0_W0_R0.12,gate=teacache,teacache_threshold={:g}", TEACACHE),
    "TeaCache + TaylorSeer": ("F0B0_W0_T1O1_R0.12,gate=teacache,teacache_threshold={:g}", TEACACHE),
    "FORA": ("F0B0_W0_R0.12,gate=static,schedule=fora,schedule_interval={:d}", INTERVALS),
    "TaylorSeer": ("F0B0_W0_T1O1_R0.12,gate=static,schedule=taylorseer,schedule_interval={:d}", INTERVALS),
    "HiCache": (
        "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer,schedule_interval={:d},forecast=hicache",
        INTERVALS,
    ),
    "static masks": (
        "F0B0_W0_R0.12,gate=static,schedule=mask_{}",
        ("slow", "medium", "fast", "ultra"),
    ),
    "static masks + TaylorSeer": (
        "F0B0_W0_T1O1_R0.12,gate=static,schedule=mask_{}",
        ("slow", "medium", "fast", "ultra"),
    ),
}
"""Tags with one number left open, and its values from careful to daring: each next one is faster and further off."""


@dataclass(frozen=True)
class Wish:
    """What the best configuration has to keep, each None where it does not matter.

    Args:
        min_psnr: mean PSNR in dB.
        max_clip_score_loss: share of the uncached CLIP score that may be lost, in [0, 1].
        min_speedup: over the uncached graph.
    """

    min_psnr: float = None
    max_clip_score_loss: float = None
    min_speedup: float = None

    def good(self, figures, uncached):
        """Whether the quality is kept."""
        if self.min_psnr is not None and figures["psnr"] < self.min_psnr:
            return False
        lost = self.max_clip_score_loss
        return lost is None or figures["clip_score"] >= uncached["clip_score"] * (1 - lost)

    def fast(self, figures):
        """Whether the speed-up is reached."""
        return self.min_speedup is None or figures["speedup"] >= self.min_speedup

    def kept(self, figures, uncached):
        """Whether all of it is kept."""
        return self.good(figures, uncached) and self.fast(figures)

    def rank(self, figures):
        """The larger the better: quality where a speed-up is asked for, the speed-up otherwise."""
        return figures["speedup"] if self.min_speedup is None else figures["psnr"]

    def __str__(self):
        parts = []
        if self.min_psnr is not None:
            parts.append(f"PSNR at least {self.min_psnr:g} dB")
        if self.max_clip_score_loss is not None:
            parts.append(f"at most {self.max_clip_score_loss:.2%} of the CLIP score lost")
        if self.min_speedup is not None:
            parts.append(f"at least {self.min_speedup:g}x")
        return ", ".join(parts)


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(
        __name__,
        "tune",
        "(--min_psnr DB | --max_clip_score_loss PERCENT | --min_speedup X) [options]",
        description=__doc__,
    )
    add = parser.add_argument_group("what is wished for, one or more").add_argument
    add("--min_psnr", type=float, metavar="DB", help="keep this mean PSNR against the uncached pictures; 35, say")
    add("--max_clip_score_loss", type=float, metavar="PERCENT", help="lose at most so much of the CLIP score; 0.5, say")
    add("--min_speedup", type=float, metavar="X", help="be so many times as fast as uncached; 2, say")
    add_drawing_options(parser, limit=10, save_path="./results/tune")
    add_clip_option(parser)
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        check_model_and_size(args)
        check_range("limit", args.limit, 2)
        if (args.min_psnr, args.max_clip_score_loss, args.min_speedup) == (None, None, None):
            raise ValueError("one of --min_psnr, --max_clip_score_loss and --min_speedup is needed")
        for name, high in {"min_psnr": None, "max_clip_score_loss": 100, "min_speedup": None}.items():
            if getattr(args, name) is not None:
                check_range(name, getattr(args, name), 0, high)
        lost = args.max_clip_score_loss
        args.wish = Wish(args.min_psnr, None if lost is None else lost / 100, args.min_speedup)
        args.prompts = choose_prompts(args)
        args.clip = clip_folder(args)
        if len(args.prompts) < 2:
            raise ValueError("--prompts: leaving one prompt out needs 2 or more")
        if args.max_clip_score_loss is not None and args.clip is None:
            raise ValueError("--max_clip_score_loss needs --clip FOLDER, a CLIPModel in transformers layout")
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


class Search:
    """Looks for the border of what is wished for, in every family at once, by halving.

    Args:
        measure: a function that takes a list of Rows, and how many more may follow, and gives a list of their figures.
        wish: the Wish.
        families: {name: (tag with a gap, values from careful to daring)}.
    """

    def __init__(self, measure, wish, families=None):
        self.measure, self.wish = measure, wish
        self.families = FAMILIES if families is None else families
        # Below low all is careful enough, from high on all is too daring; what is asked of the speed turns it round.
        self.borders = {family: [0, len(values)] for family, (_, values) in self.families.items()}
        self.uncached = measure([BASELINE], self.left())[0]
        self.found = {}

    def left(self):
        """How many Rows are still to be tried, at most."""
        return sum((high - low).bit_length() for low, high in self.borders.values())

    def row(self, family, index):
        """The Row of a family's value."""
        tag, values = self.families[family]
        value = values[index]
        number = None if isinstance(value, str) else value
        return Row(family, f"{family}: {value}", tag.format(value), threshold=number)

    def run(self):
        """{Row: figures} of every configuration that was tried."""
        while self.left():
            rows = {family: self.row(family, (low + high) // 2) for family, (low, high) in self.borders.items()}
            for (family, row), figures in zip(rows.items(), self.measure(list(rows.values()), self.left() - len(rows))):
                self.found[row] = figures
                middle = sum(self.borders[family]) // 2
                if self.careful(figures):
                    self.borders[family][0] = middle + 1
                else:
                    self.borders[family][1] = middle
            self.borders = {family: [low, high] for family, (low, high) in self.borders.items() if low < high}
        return self.found

    def careful(self, figures):
        """Whether a more daring value may be better still."""
        if self.wish.min_speedup is not None:
            return not self.wish.fast(figures)
        return self.wish.good(figures, self.uncached)


def best(found, uncached, wish):
    """The best row of {row: figures} that keeps the wish, None if none does."""
    kept = [row for row, figures in found.items() if wish.kept(figures, uncached)]
    return max(kept, key=lambda row: wish.rank(found[row]), default=None)


def leave_one_out(found, uncached, wish, chosen):
    """How sure the choice is: for each prompt, what the others choose, and whether it keeps the wish on this one.

    Returns (how often they choose the same, how often theirs keeps the wish on the prompt left out, of how many, the
    lowest PSNR of their choice on a prompt left out).
    """
    number = len(uncached["pictures"])
    same = kept = 0
    lowest = float("inf")
    for out in range(number):
        rest = {row: without(figures, out) for row, figures in found.items()}
        choice = best(rest, without(uncached, out), wish)
        if choice is None:
            continue
        entry = found[choice]["pictures"][out]
        figures = means([entry], [found[choice]["uncached_seconds"]])
        same += choice == chosen
        kept += wish.kept(figures, means([uncached["pictures"][out]], [uncached["uncached_seconds"]]))
        lowest = min(lowest, entry["psnr"])
    return same, kept, number, lowest


def without(figures, out):
    """The figures of all pictures but one."""
    entries = [entry for entry in figures["pictures"] if entry["index"] != out]
    return {**means(entries, [figures["uncached_seconds"]]), "uncached_seconds": figures["uncached_seconds"]}


def usable_families(ckpt, steps):
    """The FAMILIES that a checkpoint's blocks and the number of steps allow, each with the values that they allow."""
    usable = {}
    for family, (tag, values) in FAMILIES.items():
        allowed = []
        for value in values:
            try:
                check_cache(CacheConfig.named(tag.format(value)), ckpt, steps)
            except ValueError:
                continue
            allowed.append(value)
        if allowed:
            usable[family] = (tag, allowed)
    return usable


def text_of(args, found, uncached, chosen, control):
    """What a person wants to know: the choice, how sure it is, and the line to use it."""
    figures = found[chosen]
    same, kept, number, lowest = leave_one_out(found, uncached, args.wish, chosen)
    entries = figures["pictures"]
    psnr = "equal pictures" if figures["psnr"] == float("inf") else f"PSNR {figures['psnr']:.1f} dB"
    scores = [
        f"{name} {figures[key]:.4f} (uncached {uncached[key]:.4f})"
        for name, key in (("prompt score", "prompt_score"), ("CLIP score", "clip_score"))
        if figures[key] is not None
    ]
    return "\n".join(
        [
            f"{args.wish}: of {len(found)} configurations, {number} prompts and {figures['steps']} steps",
            f"  {chosen.name}, {figures['config']}",
            f"  {figures['speedup']:.2f}x ({figures['seconds']:.3f} s against {figures['uncached_seconds']:.3f} s), "
            f"{figures['computed_steps']:.1f} steps computed",
            f"  {psnr} (worst prompt {min(entry['psnr'] for entry in entries):.1f}), SSIM {figures['ssim']:.4f}",
            *(f"  {score}" for score in scores),
            f"leaving one prompt out: the others choose the same {same} times of {number}; on the prompt left out "
            f"their choice keeps the wish {kept} times of {number} (lowest PSNR {lowest:.1f} dB)",
            f"for comparison, {control['steps']} of {figures['steps']} steps and no cache: {control['speedup']:.2f}x "
            f"({control['seconds']:.3f} s against {control['uncached_seconds']:.3f} s), PSNR {control['psnr']:.1f} dB",
            f"use it: --cache {args.save_path / 'best.json'}",
            "",
        ]
    )


def run(args):
    """Searches and, on the first rank, writes sweep.json, best.json and what was found."""
    from tqdm import tqdm

    with session(args) as (painter, ranks), tqdm(desc="tune") as bar:
        steps, path = args.num_inference_steps, args.save_path / "pictures"
        judges = []
        if ranks[0] == 0:
            (args.save_path / "best.json").unlink(missing_ok=True)

        def measure(rows, left):
            # Each row is drawn and judged; the control comes last.
            bar.total = bar.n + (len(rows) + left + 1) * (len(share(ranks, args.prompts)) + 1)
            settings = {row: Setting.named(row.cache, row.steps_of(steps)) for row in rows}
            folders = {row: painter.folder(path, setting) for row, setting in settings.items()}
            by_setting = {settings[row]: folder for row, folder in folders.items()}
            draw_missing(painter, by_setting, args.prompts, ranks, bar=bar)
            wait_for_all(by_setting, len(args.prompts))
            if not judges:
                judges.append(Judge(args.prompts, folders[BASELINE], args.clip))
            cells = []
            for row in rows:
                cells.append(cell_of(row, settings[row], folders[row], args.save_path, judges[0]))
                bar.update()
            return cells

        search = Search(measure, args.wish, usable_families(args.ckpt, steps))
        found = search.run()
        chosen = best(found, search.uncached, args.wish)
        part = min(1 / found[chosen]["speedup"], 1) if chosen else 0.5
        control = measure([Row("fewer steps", f"{part:.0%} of the steps", UNCACHED, part)], -1)[0]
        bar.close()
        if ranks[0] != 0:
            return
        cells = [search.uncached, *found.values(), control]
        write_sweep(args.save_path, {**painter.common, "steps": steps}, args.prompts, cells)
        written = [*(f"sweep.{kind}" for kind in KINDS), "pictures"]
        if chosen is None:
            say_written(args.save_path, *written)
            nearest = max(found, key=lambda row: (found[row]["psnr"], found[row]["speedup"]))
            raise ValueError(
                f"none of {len(found)} configurations keeps {args.wish}; the nearest to the uncached pictures is "
                f"{found[nearest]['config']}: {found[nearest]['psnr']:.1f} dB at {found[nearest]['speedup']:.2f}x"
            )
        text = text_of(args, found, search.uncached, chosen, control)
        same, kept, number, _ = leave_one_out(found, search.uncached, args.wish, chosen)
        evidence = {name: value for name, value in found[chosen].items() if name not in ("pictures", "folder")}
        preset = {
            "config": found[chosen]["config"],
            "wish": str(args.wish),
            "figures": evidence,
            "left_one_out": {"chosen_again": same, "wish_kept": kept, "prompts": number},
            "settings": {**painter.common, "steps": steps},
        }
        write_file(args.save_path / "best.json", lambda stream: stream.write(json_bytes(preset)))
        put_into(args.into, textwrap.indent(text, "    "))
        print(text, end="")
        say_written(args.save_path, "best.json", *written)


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    return exit_status("tune", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
