"""Draws with torch and diffusers, with another project's cache or without, as protocol.py asks it to.

It runs in that project's own environment; benchmarks/against_torch.py starts it.

python -m venv /tmp/peer && /tmp/peer/bin/pip install -r tools/golden/requirements_para_attention.txt
/tmp/peer/bin/pip install --no-deps para-attn==0.3.38
python -m venv /tmp/cache_dit && /tmp/cache_dit/bin/pip install -r tools/golden/requirements_cache_dit.txt
/tmp/cache_dit/bin/pip install --no-deps cache-dit==1.5.3
"""

import argparse
import time
from importlib.metadata import version

import torch
from diffusers import FluxPipeline
from protocol import serve, take_standard_output


def apply_nothing(pipe, threshold):
    """Leaves the pipeline as it is. Returns, like its neighbours, what tells the reused steps of the last call."""
    return lambda steps: [False] * steps


def apply_para_attention(pipe, threshold):
    """Applies ParaAttention's First-Block Cache."""
    from para_attn.first_block_cache import utils
    from para_attn.first_block_cache.diffusers_adapters.flux import apply_cache_on_pipe

    reused, decide = [], utils.get_can_use_cache

    # Kept out of compiled graphs, as what it stands for is.
    @torch.compiler.disable
    def recorded(*args, **kwargs):
        reused.append(bool(decide(*args, **kwargs)))
        return reused[-1]

    utils.get_can_use_cache = recorded
    apply_cache_on_pipe(pipe, residual_diff_threshold=threshold)
    return lambda steps: reused[-steps:]


def apply_cache_dit(pipe, threshold):
    """Applies cache-dit's DBCache as F1B0 without a warm-up, which is First-Block Cache."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=0
    )
    cache_dit.enable_cache(pipe, cache_config=config)

    def reused(steps):
        (stats,) = cache_dit.summary(pipe, logging=False)
        return [step in stats.cached_steps for step in range(steps)]

    return reused


CACHES = {
    "none": (apply_nothing, ()),
    "para_attention": (apply_para_attention, ("para-attn",)),
    "cache_dit": (apply_cache_dit, ("cache-dit",)),
}
"""What applies a cache, and the packages it comes from."""

NAMES = {"para-attn": "ParaAttention"}


class Stopwatch:
    """Stands in for a pipeline's progress bar, which lasts as long as its denoise loop."""

    seconds = None

    def __call__(self, iterable=None, total=None):
        return self

    def __enter__(self):
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.begin

    def update(self, n=1):
        """Shows nothing."""


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder in diffusers layout")
    parser.add_argument("--cache", choices=CACHES, default="none")
    parser.add_argument("--threshold", type=float, default=0.12, help="of the cache (default: 0.12)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the transformer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    stream = take_standard_output()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    pipe = FluxPipeline.from_pretrained(args.checkpoint, torch_dtype=dtype)
    pipe.progress_bar = stopwatch = Stopwatch()
    apply, packages = CACHES[args.cache]
    reused = apply(pipe, args.threshold)
    if args.compile:
        # All blocks of a stack share one function, and beyond 8 versions of a function torch compiles no more of it.
        torch._dynamo.config.recompile_limit = 1024
        pipe.transformer.compile()

    def draw(latents, **arguments):
        picture = pipe(latents=torch.from_numpy(latents).to(dtype), output_type="pil", **arguments).images[0]
        return picture, stopwatch.seconds, reused(arguments["num_inference_steps"])

    parts = [f"{NAMES.get(package, package)} {version(package)}" for package in ("diffusers", *packages)]
    name = " + ".join([*parts, "torch.compile"] if args.compile else parts)
    serve(stream, name, {package: version(package) for package in ("torch", "diffusers", *packages)}, draw)


if __name__ == "__main__":
    main()
