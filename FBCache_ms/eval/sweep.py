"""Draws the same prompts under many configurations: what each takes, skips and loses, and what it draws."""

import sys

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    add_into_option,
    check_cache,
    check_model_and_size,
    exit_status,
    reason,
)
from FBCache_ms.eval.cases import BASELINE, CASES, Row
from FBCache_ms.eval.drawing import Setting, draw_and_finish
from FBCache_ms.eval.files import check_folder, check_into, put_into
from FBCache_ms.eval.measure import Judge, cell_of, clip_folder, write_sweep
from FBCache_ms.eval.prompts import choose_prompts

OVER_THRESHOLDS = ("fbcache", "teacache", "gates")


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(prog="sweep", description=__doc__, allow_abbrev=False)
    add = parser.add_argument_group("configurations").add_argument
    add("--cases", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)} (default: fbcache)")
    add("--cache", nargs="+", default=[], metavar="TAG|PRESET", help="rows of your own, beside or instead of the cases")
    add(
        "--thresholds",
        nargs="+",
        type=float,
        metavar="T",
        help=f"instead of those that {', '.join(OVER_THRESHOLDS)} have",
    )
    add_drawing_options(parser, limit=50, save_path="./results/sweep")
    add_clip_option(parser)
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        check_model_and_size(args)
        args.rows = rows_of(args)
        for row in args.rows:
            config = CacheConfig.named(row.cache_at(args.num_inference_steps))
            check_cache(config, args.ckpt, row.steps_of(args.num_inference_steps))
        args.prompts = choose_prompts(args)
        args.clip = clip_folder(args)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def rows_of(args):
    """The rows that the command line asks for, the uncached one first."""
    cases = args.cases or ([] if args.cache else ["fbcache"])
    if args.thresholds is not None and not set(cases) & set(OVER_THRESHOLDS):
        raise ValueError(f"--thresholds needs one of --cases {', '.join(OVER_THRESHOLDS)}")
    rows = [BASELINE]
    for case in cases:
        grid = (tuple(args.thresholds),) if args.thresholds is not None and case in OVER_THRESHOLDS else ()
        rows += CASES[case](*grid)
    return rows + [Row("--cache", tag, tag) for tag in args.cache]


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    steps = args.num_inference_steps
    settings = {row: Setting.named(row.cache_at(steps), row.steps_of(steps)) for row in args.rows}

    def finish(painter, folders):
        from tqdm import tqdm

        judge = Judge(args.prompts, folders[settings[BASELINE]], args.clip)
        cells = [
            cell_of(row, setting, folders[setting], args.save_path, judge)
            for row, setting in tqdm(settings.items(), desc="judging")
        ]
        text = write_sweep(args.save_path, {**painter.common, "steps": steps}, args.prompts, cells)
        put_into(args.into, text)
        print(text, end="")

    return exit_status("sweep", lambda: draw_and_finish(args, args.prompts, dict.fromkeys(settings.values()), finish))


if __name__ == "__main__":
    sys.exit(main())
