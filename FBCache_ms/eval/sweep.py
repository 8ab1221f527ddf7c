"""Draws the same prompts under many configurations: what each takes, skips and loses, and what it draws."""

import sys

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    add_into_option,
    check_cache,
    check_model_and_size,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.cases import BASELINE, CASES, Row, is_for
from FBCache_ms.eval.shared.drawing import Setting, draw_and_finish, share
from FBCache_ms.eval.shared.files import check_folder, check_into, put_into, say_written
from FBCache_ms.eval.shared.measure import Judge, cell_of, clip_folder, write_sweep
from FBCache_ms.eval.shared.prompts import choose_prompts
from FBCache_ms.eval.shared.ranks import group_and_groups
from FBCache_ms.eval.shared.tables import KINDS, show

OVER_THRESHOLDS = ("fbcache", "teacache", "gates")


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "sweep", description=__doc__)
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
    rows, steps = [BASELINE], args.num_inference_steps
    for case in cases:
        grid = (tuple(args.thresholds),) if args.thresholds is not None and case in OVER_THRESHOLDS else ()
        # A fitted preset is for one number of steps.
        rows += [row for row in CASES[case](*grid) if is_for(row.cache_at(steps), row.steps_of(steps))]
    return rows + [Row("--cache", tag, tag) for tag in args.cache]


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    steps = args.num_inference_steps
    settings = {row: Setting.named(row.cache_at(steps), row.steps_of(steps)) for row in args.rows}
    drawn = dict.fromkeys(settings.values())

    def work():
        from tqdm import tqdm

        ranks = group_and_groups(args.context_parallel)
        # The first rank judges each row.
        total = len(drawn) * len(share(ranks, args.prompts)) + (len(settings) if ranks[0] == 0 else 0)
        with tqdm(total=total, desc="sweep") as bar:

            def finish(painter, folders):
                judge, cells = Judge(args.prompts, folders[settings[BASELINE]], args.clip), []
                for row, setting in settings.items():
                    cells.append(cell_of(row, setting, folders[setting], args.save_path, judge))
                    bar.update()
                bar.close()
                text = write_sweep(args.save_path, {**painter.common, "steps": steps}, args.prompts, cells)
                put_into(args.into, text)
                show(text)
                say_written(args.save_path, *(f"sweep.{kind}" for kind in KINDS), "pictures")

            draw_and_finish(args, args.prompts, drawn, finish, bar=bar)

    return exit_status("sweep", work)


if __name__ == "__main__":
    sys.exit(main())
