"""Paints a box of a picture anew: FLUX.1-Fill, with the cache switched on in one line.

python examples/fill.py results/family/fill --image text_to_image.png --box 8 8 56 56 --prompt "a small green square"
"""

import argparse

from mindone.diffusers import FluxFillPipeline
from PIL import Image

import mindspore as ms

from FBCache_ms import CacheConfig, apply_cache_on_pipe, choose_device


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder, or a name such as black-forest-labs/FLUX.1-Fill-dev")
    parser.add_argument("--image", required=True)
    parser.add_argument("--box", type=int, nargs=4, required=True, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"))
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", default="fill.png")
    args = parser.parse_args(argv)

    device = choose_device()
    ms.set_context(mode=ms.GRAPH_MODE)
    pipe = FluxFillPipeline.from_pretrained(args.checkpoint, mindspore_dtype=device.mindspore_dtype)
    apply_cache_on_pipe(pipe, CacheConfig(residual_diff_threshold=0.12, taylorseer_derivative=1))

    image = Image.open(args.image).convert("RGB")
    mask = Image.new("L", image.size)
    mask.paste(255, args.box)
    drawn = pipe(args.prompt, image=image, mask_image=mask, height=image.height, width=image.width)[0][0]
    drawn.save(args.output)
    print(pipe.transformer.cache_stats)


if __name__ == "__main__":
    main()
