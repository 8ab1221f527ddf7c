"""A picture with the outlines of another one: ControlNet, with the cache switched on in one line.

python examples/controlnet.py results/family/controlnet results/family/controlnet/controlnet --image text_to_image.png \
    --prompt "a big yellow circle in the center, black background"
"""

import argparse

from mindone.diffusers import FluxControlNetModel, FluxControlNetPipeline
from PIL import Image, ImageFilter

import mindspore as ms

from FBCache_ms import CacheConfig, apply_cache_on_pipe, choose_device


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder, or a name such as black-forest-labs/FLUX.1-dev")
    parser.add_argument("controlnet", help="folder, or a name such as InstantX/FLUX.1-dev-Controlnet-Canny")
    parser.add_argument("--image", required=True, help="picture whose outlines are kept")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", default="controlnet.png")
    args = parser.parse_args(argv)

    device = choose_device()
    ms.set_context(mode=ms.GRAPH_MODE)
    controlnet = FluxControlNetModel.from_pretrained(args.controlnet, mindspore_dtype=device.mindspore_dtype)
    pipe = FluxControlNetPipeline.from_pretrained(
        args.checkpoint, controlnet=controlnet, mindspore_dtype=device.mindspore_dtype
    )
    apply_cache_on_pipe(pipe, CacheConfig(residual_diff_threshold=0.12, taylorseer_derivative=1))

    image = Image.open(args.image)
    outlines = image.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB")
    size = {"height": image.height, "width": image.width}
    drawn = pipe(args.prompt, control_image=outlines, controlnet_conditioning_scale=0.6, **size)[0][0]
    drawn.save(args.output)
    print(pipe.transformer.cache_stats)


if __name__ == "__main__":
    main()
