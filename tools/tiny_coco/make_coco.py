"""Makes a folder in MSCOCO's layout from scenes that the embedded checkpoint knows: captions, drawings for pictures.

.venv/bin/python tools/tiny_coco/make_coco.py results/tiny_coco --limit 200
"""

import argparse
import json
from pathlib import Path

import numpy as np

from FBCache_ms.eval.shared.scenes import draw, held_out_captions, parse_caption

IMAGE_SIZE = 64


def make_coco(folder, number, seed=0):
    """Writes annotations/captions_val2017.json and val2017/*.jpg of ``number`` scenes into a folder."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "val2017").mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for index, caption in enumerate(held_out_captions(number, seed)):
        name = f"{index:012d}.jpg"
        draw(parse_caption(caption), IMAGE_SIZE, rng).save(folder / "val2017" / name, quality=95)
        images.append({"id": index, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        annotations.append({"id": index, "image_id": index, "caption": caption})
    content = {"images": images, "annotations": annotations}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="how many pictures (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_coco(args.folder, args.limit, args.seed)


if __name__ == "__main__":
    main()
