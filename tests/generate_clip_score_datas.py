"""Draws what flux_accuracy_test.py compares, with and without the cache, and scores it.

    .venv/bin/python tests/generate_clip_score_datas.py --ckpt path/to/FLUX.1-dev --clip path/to/clip-vit-large-patch14

It goes on where it was killed, and takes msrun's ranks, as the programs of FBCache_ms.eval do.
"""

import sys

from test_accuracy_data import PROMPTS, STEPS, config_of, sizes

from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    check_model_and_size,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.drawing import Setting, draw_missing, session, wait_for_all
from FBCache_ms.eval.shared.files import check_folder, json_bytes, write_file
from FBCache_ms.eval.shared.floors import FLOORS
from FBCache_ms.eval.shared.measure import Judge, clip_folder
from FBCache_ms.eval.shared.prompts import choose_prompts


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "generate_clip_score_datas", description=__doc__.splitlines()[0])
    add_drawing_options(parser, limit=PROMPTS, save_path="./results/accuracy")
    add_clip_option(parser)
    parser.set_defaults(num_inference_steps=STEPS)
    args = parser.parse_args(argv)
    try:
        check_model_and_size(args)
        args.prompts = choose_prompts(args)
        args.clip = clip_folder(args)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def generate(args):
    """Draws and scores everything; on the first rank it writes accuracy.json, a list of figures."""
    steps, rows = args.num_inference_steps, []
    with session(args) as (painter, ranks):
        for size in [args.image_size] if args.image_size else sizes(args.ckpt):
            here = painter.resized(list(size))
            path = args.save_path / "x".join(map(str, size))
            uncached = Setting.named(UNCACHED, steps)
            settings = {key: Setting(config_of(*key), steps) for key in FLOORS}
            folders = {each: here.folder(path, each) for each in (uncached, *settings.values())}
            draw_missing(here, folders, args.prompts, ranks)
            if ranks[0] != 0:
                continue
            wait_for_all(folders, len(args.prompts))
            judge = Judge(args.prompts, folders[uncached], args.clip)
            reference = judge.judge(uncached, folders[uncached])
            for (threshold, order), setting in settings.items():
                figures = judge.judge(setting, folders[setting])
                row = {"image_size": list(size), "threshold": threshold, "order": order}
                rows.append({**row, **figures, "uncached_clip_score": reference["clip_score"]})
    if ranks[0] == 0:
        write_file(args.save_path / "accuracy.json", lambda stream: stream.write(json_bytes(rows)))


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    return exit_status("generate_clip_score_datas", lambda: generate(args))


if __name__ == "__main__":
    sys.exit(main())
