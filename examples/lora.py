"""One prompt without a LoRA adapter, with it, at half its strength and without it again, in the cached loop.

python examples/lora.py results/family/lora --prompt "a big red circle in the center"
"""

import argparse
from pathlib import Path

import numpy as np

from FBCache_ms import TINY_FLUX, CacheConfig, FluxPipeline, choose_device

CHECKPOINT = "folder, or a name such as black-forest-labs/FLUX.1-dev (default: the embedded checkpoint)"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="folder, file or a name of LoRA weights")
    parser.add_argument("--checkpoint", default=TINY_FLUX, help=CHECKPOINT)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", type=Path, default=Path("lora"), help="folder of the pictures")
    args = parser.parse_args(argv)

    config = CacheConfig(residual_diff_threshold=0.12, taylorseer_derivative=1)
    pipe = FluxPipeline.from_pretrained(args.checkpoint, device=choose_device(), cache_config=config)
    args.output.mkdir(parents=True, exist_ok=True)

    def draw(name):
        generator = np.random.default_rng(0)
        pipe(args.prompt, num_inference_steps=28, generator=generator)[0][0].save(args.output / f"{name}.png")
        print(name, pipe.cache_stats, sep="\n")

    draw("without")
    pipe.load_lora_weights(args.lora, adapter_name="style")
    draw("with")
    pipe.set_adapters(["style"], [0.5])
    draw("half")
    pipe.unload_lora_weights()
    draw("without_again")


if __name__ == "__main__":
    main()
