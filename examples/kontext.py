"""Edits a picture as a sentence says: FLUX.1-Kontext, with the cache switched on in one line.

python examples/kontext.py results/family/kontext --image text_to_image.png --prompt "make the circle green"
"""

import argparse

from mindone.diffusers import FluxKontextPipeline
from PIL import Image

import mindspore as ms

from FBCache_ms import CacheConfig, apply_cache_on_pipe, choose_device


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder, or a name such as black-forest-labs/FLUX.1-Kontext-dev")
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", default="kontext.png")
    args = parser.parse_args(argv)

    device = choose_device()
    ms.set_context(mode=ms.GRAPH_MODE)
    pipe = FluxKontextPipeline.from_pretrained(args.checkpoint, mindspore_dtype=device.mindspore_dtype)
    apply_cache_on_pipe(pipe, CacheConfig(residual_diff_threshold=0.12, taylorseer_derivative=1))

    image = Image.open(args.image).convert("RGB")
    # Pictures are otherwise brought to about a megapixel, Kontext's own size.
    size = {"height": image.height, "width": image.width, "max_area": image.height * image.width}
    drawn = pipe(image=image, prompt=args.prompt, _auto_resize=False, **size)[0][0]
    drawn.save(args.output)
    print(pipe.transformer.cache_stats)


if __name__ == "__main__":
    main()
