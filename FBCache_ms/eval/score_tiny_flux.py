"""Scores the embedded checkpoint: draws captions that training never saw and counts what the pictures show rightly."""

import json
import sys
from collections import Counter
from pathlib import Path

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_save_path, exit_status
from FBCache_ms.eval.shared.files import say_written, write_file
from FBCache_ms.eval.shared.scenes import held_out_captions, parse_caption, score_picture
from FBCache_ms.runtime.checkpoint import TINY_FLUX, check_checkpoint

BATCH = 20
ROW = 10


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "score_tiny_flux", description=__doc__)
    parser.add_argument("--ckpt", type=Path, default=TINY_FLUX, metavar="PATH", help="folder in diffusers layout")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="how many captions")
    parser.add_argument("--seed", type=int, default=0, help="of the captions and of the noise")
    parser.add_argument("--num_inference_steps", type=int, default=28, metavar="N", help="steps of the denoise loop")
    parser.add_argument("--guidance_scale", type=float, default=3.5, metavar="G", help="of the guidance embedding")
    parser.add_argument("--cache", metavar="TAG|PRESET", help="like F1B0_W0M0MC0_T1O1_R0.12 (default: no cache)")
    add_save_path(parser.add_argument, "./results/score", "score.json and pictures.png")
    args = parser.parse_args(argv)
    try:
        args.config = None if args.cache is None else CacheConfig.named(args.cache)
        for name, low, high in (("limit", 1, 10_000), ("num_inference_steps", 1, 1000), ("seed", 0, 2**32)):
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name} must be in [{low}, {high}], not {getattr(args, name)}")
        check_checkpoint(args.ckpt)
        args.save_path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def draw_captions(args, captions):
    """A picture for each caption, in batches."""
    import numpy as np
    from tqdm import tqdm

    from FBCache_ms import FluxPipeline

    pipe = FluxPipeline.from_pretrained(str(args.ckpt))
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in tqdm(range(0, len(captions), BATCH), desc=f"{BATCH} pictures each"):
        pictures += pipe(
            captions[start : start + BATCH],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=np.random.default_rng((args.seed, start)),
            cache_config=args.config,
        )[0]
    return pictures


def score(captions, pictures):
    """The share of right answers, {attribute: share in [0, 1]}, and "all" of them together."""
    right, number = Counter(), Counter()
    for caption, picture in zip(captions, pictures):
        for attribute, ok in score_picture(picture, parse_caption(caption)):
            right.update({attribute: ok, "all": ok})
            number.update((attribute, "all"))
    return {attribute: right[attribute] / number[attribute] for attribute in number}


def row(pictures):
    """The first pictures side by side, twice as large."""
    from PIL import Image

    pictures = [picture.resize((128, 128), Image.Resampling.NEAREST) for picture in pictures[:ROW]]
    strip = Image.new("RGB", (132 * len(pictures) - 4, 128), "white")
    for index, picture in enumerate(pictures):
        strip.paste(picture, (132 * index, 0))
    return strip


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    return exit_status("score_tiny_flux", lambda: run(args))


def run(args):
    """Draws, scores, and writes score.json and pictures.png."""
    captions = held_out_captions(args.limit, args.seed)
    pictures = draw_captions(args, captions)
    shares = score(captions, pictures)
    report = {"captions": len(captions), "config": args.config and str(args.config), "shares": shares}
    text = json.dumps({**report, "first": captions[:ROW]}, indent=1) + "\n"
    write_file(args.save_path / "score.json", lambda stream: stream.write(text.encode()))
    write_file(args.save_path / "pictures.png", lambda stream: row(pictures).save(stream, format="PNG"))
    for attribute, share in shares.items():
        print(f"{attribute:<12}{share:6.1%}")
    say_written(args.save_path, "score.json", "pictures.png")


if __name__ == "__main__":
    sys.exit(main())
