"""Draws a prompt with Flux, First-Block Cache and TaylorSeer, and says what was cached and what that saved."""

import argparse
import importlib.util
import math
import statistics
import sys
import time
from itertools import count

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_cache_options,
    add_context_parallel,
    add_model_options,
    add_picture_options,
    add_save_path,
    branches_of,
    cache_config,
    check_cache,
    check_model_and_size,
    check_range,
    device_of,
    exit_status,
    guidance_of,
)
from FBCache_ms.eval.shared.files import check_folder, json_bytes, locked, write_file
from FBCache_ms.eval.shared.metrics import SSIM_WINDOW
from FBCache_ms.eval.shared.pictures import check_numbers
from FBCache_ms.eval.shared.ranks import group_and_groups, is_follower
from FBCache_ms.runtime.checkpoint import family_of
from FBCache_ms.runtime.imports import quick_imports
from FBCache_ms.runtime.quantize import quantized_as

NAMES = OUTPUT, BASELINE, COMPARISON = "output", "baseline", "comparison"
"""Of the pictures' files: with the cache, without it, and both side by side."""

COMPARE_RUNS, COMPARE_SECONDS = 3, 2
"""With --compare, how often the cached and the uncached run are timed, in turn; more often up to so many seconds."""


def parse_arguments(argv=None):
    """The command line, checked before anything is loaded; exits with 2 and one line if it is off."""
    parser = Parser(
        __name__,
        "fbcache-flux",
        "[--prompt TEXT] [--cache TAG|PRESET] [--compare] [options]",
        description=__doc__,
    )
    add = parser.add_argument_group("model").add_argument
    add_model_options(add, compile_cache=True)
    add_context_parallel(add)
    add(
        "--cfg_parallel",
        action="store_true",
        help="one half of the devices of --context_parallel takes the prompt, the other half the negative prompt",
    )
    add(
        "--use_graph_mode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile, or run operator by operator",
    )
    add = parser.add_argument_group("picture").add_argument
    add("--prompt", default="a big red circle in the center, blue background", metavar="TEXT", help="what to show")
    add_picture_options(add)
    add("--num_images_per_prompt", type=int, default=1, metavar="N", help="how many pictures")
    add_cache_options(parser)
    add = parser.add_argument_group("output").add_argument
    add_save_path(add, "./results", "the pictures and run.json")
    add(
        "--compare",
        action="store_true",
        help="also run with the cache off, report the speed-up and the loss, and write both pictures side by side",
    )
    args = parser.parse_args(argv)
    try:
        args.config = cache_config(args)
        check_arguments(args)
    except (OSError, TypeError, ValueError) as error:
        parser.error(error)
    return args


def check_arguments(args):
    """Raises ValueError or OSError, naming the option, for a value that cannot work."""
    check_range("num_images_per_prompt", args.num_images_per_prompt, 1)
    if args.compare and importlib.util.find_spec("skimage") is None:
        raise ValueError("--compare needs scikit-image; install FBCache_ms[eval]")
    check_model_and_size(args)
    if args.compare and args.image_size is not None and min(args.image_size) < SSIM_WINDOW:
        raise ValueError(f"--compare needs an --image_size of {SSIM_WINDOW} pixels or more, for SSIM")
    check_cache(args.config, args.ckpt, args.num_inference_steps)
    if args.context_parallel > 1 and group_and_groups(args.context_parallel)[1] > 1:
        raise ValueError("--context_parallel has to be as many as msrun has started: one prompt is drawn once")
    if args.cfg_parallel and args.context_parallel % 2:
        raise ValueError(f"--cfg_parallel needs an even --context_parallel, not {args.context_parallel}")
    if args.cfg_parallel and branches_of(args) == 1:
        raise ValueError("--cfg_parallel needs a --negative_prompt and a --true_cfg_scale above 1")
    check_folder(args.save_path)


def generate(pipe, args, cache_config):
    """The pictures, as float arrays (number, H, W, 3) in [0, 1]. Raises ValueError for what is not a number."""
    import numpy as np

    height, width = args.image_size or (None, None)
    negative = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    pictures = pipe(
        prompt=args.prompt,
        **negative,
        **guidance_of(args),
        height=height,
        width=width,
        num_inference_steps=args.num_inference_steps,
        num_images_per_prompt=args.num_images_per_prompt,
        generator=np.random.default_rng(args.seed),
        output_type="np",
        cache_config=cache_config,
    )[0]
    check_numbers(pipe, cache_config)
    return pictures


def compare(pipe, args):
    """The uncached pictures, the cached and the uncached run's median denoise times, and of how many runs these are."""
    # The progress bar would run the loop in pieces and take time of its own.
    pipe.set_progress_bar_config(disable=True)
    times = {"cached": [], "baseline": []}
    generate(pipe, args, CacheConfig(gate="none"))
    # Processes that share a picture have times of their own, and have to draw as often.
    while len(times["cached"]) < COMPARE_RUNS or (
        pipe.sharing is None and sum(map(sum, times.values())) < COMPARE_SECONDS
    ):
        reference = generate(pipe, args, CacheConfig(gate="none"))
        times["baseline"].append(pipe.seconds["denoise"])
        generate(pipe, args, args.config)
        times["cached"].append(pipe.seconds["denoise"])
    return (reference, *(statistics.median(times[name]) for name in ("cached", "baseline")), len(times["cached"]))


def compared(pictures, references, report):
    """The mean PSNR and SSIM of the pictures against the uncached ones, and each pair side by side, as an Image."""
    from FBCache_ms.eval.shared.comparison import side_by_side
    from FBCache_ms.eval.shared.metrics import psnr, ssim

    pairs = list(zip(references, pictures))
    psnrs, ssims = ([metric(*pair) for pair in pairs] for metric in (psnr, ssim))
    reused = f"{len(report['cached_steps'])} of {report['steps']} steps reused"
    sheets = []
    for pair, decibels, similarity in zip(pairs, psnrs, ssims):
        words = "no difference" if math.isinf(decibels) else "difference, {times} times as bright"
        far = "the same picture" if math.isinf(decibels) else f"PSNR {decibels:.1f} dB, SSIM {similarity:.4f}"
        labels = ("without the cache", f"{report['steps']} steps computed"), (words, far), ("with the cache", reused)
        sheets.append(side_by_side(*pair, labels))
    # Equal pictures have no number of decibels; the mean is of the others.
    return statistics.mean(list(filter(math.isfinite, psnrs)) or psnrs), statistics.mean(ssims), sheets


def write(save_path, images, report):
    """Writes the images, {name: list}, as NAME_0.png and so on, and run.json; a former run's others go.

    Each is written into a new file that then takes its name.
    """
    for name, numbered in images.items():
        for index, image in enumerate(numbered):
            write_file(save_path / f"{name}_{index}.png", lambda stream: image.save(stream, format="PNG"))
    write_file(save_path / "run.json", lambda stream: stream.write(json_bytes(report)))
    for name in NAMES:
        for index in count(len(images.get(name, ()))):
            former = save_path / f"{name}_{index}.png"
            if not former.is_file():
                break
            former.unlink()


def run(args):
    """Loads, draws, compares if asked, writes; returns run.json's content."""
    begin = time.perf_counter()
    with quick_imports():
        device = device_of(args)
        import mindone

        import mindspore as ms

        import FBCache_ms

        kind = getattr(FBCache_ms, family_of(args.ckpt).PIPELINE)
    imported = time.perf_counter()
    pipe = kind.from_pretrained(
        str(args.ckpt),
        cache_config=args.config,
        use_graph_mode=args.use_graph_mode,
        device=device,
        quantize_config=args.quantize,
    )
    loaded = time.perf_counter()
    reason = pipe.why_not_cached()
    if reason:
        raise ValueError(f"checkpoint {args.ckpt} cannot run with the cache: {reason}")
    if args.context_parallel > 1:
        from FBCache_ms.runtime.parallel import ContextParallelConfig

        pipe.enable_parallelism(
            ContextParallelConfig(args.context_parallel, args.context_parallel_scheme, args.cfg_parallel)
        )
    pictures = generate(pipe, args, args.config)
    stats, bytes_of_cache = pipe.cache_stats, pipe.cache_bytes
    seconds = {"imports": imported - begin, "load": loaded - imported, **pipe.seconds}
    seconds["total"] += loaded - begin
    report = {
        "config": str(args.config),
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        **guidance_of(args),
        "branches": branches_of(args),
        "seed": args.seed,
        "steps": args.num_inference_steps,
        "pictures": len(pictures),
        "image_size": list(pictures.shape[1:3]),
        "computed_steps": stats.computed_steps,
        "cached_steps": stats.cached_steps,
        "residual_diffs": stats.residual_diffs,
        "skipped": stats.skipped,
        "seconds": seconds,
        "graph_compilations": pipe.graph_compilations,
        "graphs_from_cache": pipe.graphs_from_cache,
        "cache_bytes": bytes_of_cache,
        "quantize": quantized_as(pipe),
        "context_parallel": args.context_parallel,
        "context_parallel_scheme": args.context_parallel_scheme,
        "cfg_parallel": args.cfg_parallel,
        "device": device.name,
        "mode": "GRAPH_MODE" if args.use_graph_mode else "PYNATIVE_MODE",
        "dtype": device.dtype,
        "jit_level": device.jit_level,
        "mindspore": ms.__version__,
        "mindone": mindone.__version__,
    }
    images = {OUTPUT: list(map(image_of, pictures))}
    if args.compare:
        references, denoise, baseline, runs = compare(pipe, args)
        report["seconds"].update(denoise=denoise, per_step=denoise / args.num_inference_steps)
        psnr, ssim, images[COMPARISON] = compared(pictures, references, report)
        images[BASELINE] = list(map(image_of, references))
        report["baseline"] = {
            "denoise": baseline,
            "speedup": baseline / denoise,
            "runs": runs,
            "psnr": psnr,
            "ssim": ssim,
        }
    if is_follower(args.context_parallel):
        return report
    report["files"] = [f"{name}_{index}.png" for name in NAMES for index in range(len(images.get(name, ())))]
    write(args.save_path, images, report)
    return report


def image_of(picture):
    """A float array (H, W, 3) in [0, 1] as a PIL Image."""
    from PIL import Image

    return Image.fromarray((picture * 255).round().astype("uint8"))


def summary(report, save_path):
    """What a person wants to know of a run, in a few lines."""
    seconds, reused = report["seconds"], report["cached_steps"]
    lines = [
        f"{report['config']}: {len(reused)} of {report['steps']} steps reused, "
        f"{len(report['computed_steps'])} computed, {report['skipped']:.1%} of the operations skipped",
        f"imports {seconds['imports']:.1f} s, load {seconds['load']:.1f} s, encode {seconds['encode']:.1f} s, "
        f"compile {seconds['compile']:.1f} s, denoise {seconds['denoise']:.2f} s "
        f"({seconds['per_step'] * 1000:.1f} ms a step), decode {seconds['decode']:.1f} s "
        f"on {report['device']}, {report['dtype']}, {report['mode']}",
    ]
    if "baseline" in report:
        baseline = report["baseline"]
        loss = "the same picture" if math.isinf(baseline["psnr"]) else f"PSNR {baseline['psnr']:.1f} dB"
        lines.append(
            f"denoise {seconds['denoise']:.3f} s with the cache, {baseline['denoise']:.3f} s without "
            f"(medians of {baseline['runs']} each, warm): {baseline['speedup']:.2f} times as fast; "
            f"{loss}, SSIM {baseline['ssim']:.4f}"
        )
    last = report["pictures"] - 1
    files = [f"{name}_0.png" for name in NAMES if f"{name}_0.png" in report["files"]]
    if last:
        files = [f"{first} to {first.replace('_0', f'_{last}')}" for first in files]
    lines.append(f"written to {save_path}: {', '.join(files)} and run.json")
    return "\n".join(lines)


def main(argv=None):
    """The command fbcache-flux; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        if is_follower(args.context_parallel):
            run(args)
            return
        with locked(args.save_path):
            print(summary(run(args), args.save_path))

    return exit_status("fbcache-flux", work)


if __name__ == "__main__":
    sys.exit(main())
