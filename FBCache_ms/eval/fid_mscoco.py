"""Draws MSCOCO's captions under each configuration and measures the Fréchet distance to MSCOCO's own pictures."""

import statistics
import sys
from pathlib import Path

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.quality import METRICS_PYTHON, TINY_CLIP, ClipScore, fid, fid_lacks
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
from FBCache_ms.eval.shared.cases import ROWS
from FBCache_ms.eval.shared.drawing import draw_and_finish, named_settings
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.metrics import open_picture
from FBCache_ms.eval.shared.prompts import coco_captions
from FBCache_ms.eval.shared.tables import markdown, publish


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "fid_mscoco", "--coco_root FOLDER [options]", description=__doc__)
    add = parser.add_argument_group("MSCOCO").add_argument
    add(
        "--coco_root",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="holds annotations/captions_val2017.json and val2017/",
    )
    add(
        "--inception",
        type=Path,
        metavar="FILE",
        help="weights-inception-2015-12-05-6726825d.pth as torch-fidelity publishes it; without it the distance is "
        "measured on a small CLIP's features, and not called FID",
    )
    add(
        "--metrics_python",
        type=Path,
        default=METRICS_PYTHON,
        metavar="PATH",
        help="the Python of an environment with tools/metrics/requirements.txt, for --inception",
    )
    prompts = "captions as MSCOCO has them, JSON (default: captions_val2017.json in --coco_root)"
    add_drawing_options(parser, limit=5000, save_path="./results/fid_mscoco", prompts=prompts)
    add = parser.add_argument_group("rows").add_argument
    add(
        "--cache",
        nargs="*",
        default=list(ROWS),
        metavar="TAG|PRESET",
        help=f"rows beside the baseline (default: {', '.join(ROWS)})",
    )
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        check_model_and_size(args)
        check_range("limit", args.limit, 2)
        for tag in args.cache:
            check_cache(CacheConfig.named(tag), args.ckpt, args.num_inference_steps)
        if args.inception is not None:
            lack = fid_lacks(args.inception, args.metrics_python)
            if lack:
                raise ValueError(f"--inception needs {lack}")
        args.prompts, args.references = read_coco(args)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def read_coco(args):
    """The first --limit captions, one an image, and their images' paths.

    Raises OSError or ValueError, naming the file, for what is missing or has another shape.
    """
    path = args.prompts or args.coco_root / "annotations" / "captions_val2017.json"
    captions, files = coco_captions(path)
    chosen = list(captions)[: args.limit]
    if len(chosen) < 2:
        raise ValueError(f"{path} has captions of {len(chosen)} images; a distance needs 2 or more")
    references = []
    for image in chosen:
        reference = args.coco_root / "val2017" / files.get(image, f"{image:012d}.jpg")
        if not reference.is_file():
            raise OSError(f"MSCOCO's picture {reference} is missing")
        with open_picture(reference):
            pass
        references.append(reference)
    return [captions[image] for image in chosen], references


def distances(args, folders):
    """The measure's name and {setting: the Fréchet distance of its pictures to MSCOCO's}."""
    numbers = range(len(args.prompts))
    pictures = {setting: [folder.file(index) for index in numbers] for setting, folder in folders.items()}
    if args.inception is not None:
        return "FID", {
            setting: fid(paths, args.references, args.inception, args.metrics_python)
            for setting, paths in pictures.items()
        }
    from FBCache_ms.eval.shared.metrics import frechet_distance, read_picture

    clip = ClipScore(TINY_CLIP)
    reference = clip.image_features(map(read_picture, args.references))
    return "Fréchet Distance (Small CLIP)", {
        setting: frechet_distance(clip.image_features(map(read_picture, paths)), reference)
        for setting, paths in pictures.items()
    }


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    settings = named_settings(args.cache, args.num_inference_steps)

    def finish(painter, folders):
        measure, values = distances(args, folders)
        rows = [
            {
                "Configuration": name,
                "Image Size": "x".join(map(str, painter.image_size)),
                "Steps": each.steps,
                "Total Time, Median (s)": statistics.median(
                    line["denoise"] for line in folders[each].seconds(len(args.prompts))
                ),
                measure: values[each],
            }
            for name, each in settings.items()
        ]
        text = markdown(
            [
                {
                    **row,
                    "Total Time, Median (s)": f"{row['Total Time, Median (s)']:.3f}",
                    measure: f"{row[measure]:.4f}",
                }
                for row in rows
            ]
        )
        data = {"settings": painter.common, "pictures": len(args.prompts), "rows": rows}
        publish(args.save_path, "fid_mscoco", text, rows, data, args.into, ["pictures"])

    def work():
        draw_and_finish(args, args.prompts, settings.values(), finish, uncached_beside=False)

    return exit_status("fid_mscoco", work)


if __name__ == "__main__":
    sys.exit(main())
