"""Draws with FBCache_ms on a CPU, the whole denoise loop as one graph, as protocol.py asks it to.

benchmarks/against_torch.py starts it beside worker.py.
"""

import argparse
from importlib.metadata import version

from protocol import serve, take_standard_output


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder in diffusers layout")
    parser.add_argument("--cache", default="balanced", metavar="TAG|PRESET", help="(default: balanced)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    stream = take_standard_output()

    import mindspore as ms

    from FBCache_ms import CacheConfig, FluxPipeline
    from FBCache_ms.runtime.device import choose_device

    config, device = CacheConfig.named(args.cache), choose_device("CPU", args.dtype)
    ms.device_context.cpu.op_tuning.threads_num(args.threads)
    pipe = FluxPipeline.from_pretrained(args.checkpoint, cache_config=config, device=device)
    pipe.set_progress_bar_config(disable=True)

    def draw(latents, **arguments):
        picture = pipe(latents=ms.Tensor(latents), output_type="pil", **arguments)[0][0]
        return picture, pipe.seconds["denoise"], [bool(reused) for reused in pipe.cache_stats.reused]

    name = f"FBCache_ms, {'uncached' if config.gate == 'none' else 'cached'}"
    serve(stream, name, {package: version(package) for package in ("FBCache_ms", "mindspore", "mindone")}, draw)


if __name__ == "__main__":
    main()
