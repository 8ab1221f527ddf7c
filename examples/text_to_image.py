"""Text to image with the whole denoise loop as one cached graph.

python examples/text_to_image.py --prompt "a big red circle in the center, blue background"
"""

import argparse

from FBCache_ms import TINY_FLUX, CacheConfig, FluxPipeline, choose_device

CHECKPOINT = "folder, or a name such as black-forest-labs/FLUX.1-dev (default: the embedded checkpoint)"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=TINY_FLUX, help=CHECKPOINT)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--size", type=int, help="height and width (default: the model's)")
    parser.add_argument("--output", default="text_to_image.png")
    args = parser.parse_args(argv)

    config = CacheConfig(residual_diff_threshold=0.12, taylorseer_derivative=1)
    pipe = FluxPipeline.from_pretrained(args.checkpoint, device=choose_device(), cache_config=config)
    image = pipe(args.prompt, height=args.size, width=args.size, num_inference_steps=28)[0][0]
    image.save(args.output)
    print(pipe.cache_stats)


if __name__ == "__main__":
    main()
