"""Draws a prompt with Flux, First-Block Cache and TaylorSeer, and says what was cached and what that saved."""

import argparse
import importlib.util
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import fields
from pathlib import Path

from FBCache_ms.checkpoint import TINY_FLUX, block_counts, check_checkpoint, image_unit
from FBCache_ms.config import PRESETS, CacheConfig, parse, value_text
from FBCache_ms.schedules import row

COMPARE_RUNS = 3
"""With --compare, how often the cached and the uncached run are timed, in turn; their medians are reported."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def parse_arguments(argv=None):
    """The command line, checked before anything is loaded; exits with 2 and one line if it is off."""
    parser = Parser(prog="fbcache-flux", description=__doc__, allow_abbrev=False)
    add = parser.add_argument_group("model").add_argument
    add(
        "--ckpt",
        type=Path,
        default=TINY_FLUX,
        metavar="PATH",
        help="folder in diffusers layout (default: the embedded checkpoint)",
    )
    add("--device", choices=("auto", "Ascend", "CPU"), default="auto", help="auto: Ascend where there is one")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="auto: bfloat16 on Ascend, float32 on CPU",
    )
    add(
        "--use_graph_mode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile, or run operator by operator",
    )
    add = parser.add_argument_group("picture").add_argument
    add("--prompt", default="a big red circle in the center, blue background", metavar="TEXT")
    add("--negative_prompt", metavar="TEXT", help="what not to show; takes effect with --true_cfg_scale above 1")
    add("--image_size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: the model's own size)")
    add("--num_inference_steps", type=int, default=28, metavar="N")
    add("--guidance_scale", type=float, default=3.5, metavar="G", help="of the guidance embedding (Flux dev)")
    add("--true_cfg_scale", type=float, default=1.0, metavar="G", help="of true classifier-free guidance")
    add("--num_images_per_prompt", type=int, default=1, metavar="N")
    add("--seed", type=int, default=0)
    add_cache_options(parser)
    add = parser.add_argument_group("output").add_argument
    add("--save_path", type=Path, default=Path("./results"), metavar="FOLDER")
    add("--compare", action="store_true", help="also run with the cache off, and report the speed-up and the loss")
    args = parser.parse_args(argv)
    try:
        args.config = cache_config(args)
        check_arguments(args)
    except (OSError, TypeError, ValueError) as error:
        parser.error(error)
    return args


def add_cache_options(parser):
    """--cache, and an option for each field of CacheConfig, in its groups."""
    add = parser.add_argument_group("cache").add_argument
    add(
        "--cache",
        metavar="TAG|PRESET",
        help=f"like F1B0_W4M0MC0_T1O2_R0.12, or {', '.join(PRESETS)}; the options below change it",
    )
    titles = {
        "gate": "cache: what decides",
        "limits": "cache: limits",
        "schedule": "cache: steps known before",
        "span": "cache: blocks",
        "forecast": "cache: what is added on a reused step",
    }
    groups = {group: parser.add_argument_group(title) for group, title in titles.items()}
    for option in fields(CacheConfig):
        default = "" if option.default is None else f" (default: {value_text(option.default)})"
        choices = option.metadata["allowed"] if option.metadata["kind"] is str else None
        groups[option.metadata["group"]].add_argument(
            f"--{option.name}",
            metavar=None if choices else option.name.split("_")[-1].upper(),
            choices=choices,
            help=(option.metadata["text"] + default).replace("%", "%%"),
        )


def cache_config(args):
    """The CacheConfig of the cache options."""
    config = CacheConfig() if args.cache is None else CacheConfig.named(args.cache)
    given = {option.name: getattr(args, option.name) for option in fields(CacheConfig)}
    options = {option.name: option for option in fields(CacheConfig)}
    return config.changed(**{name: parse(options[name], text) for name, text in given.items() if text is not None})


def check_arguments(args):
    """Raises ValueError or OSError, naming the option, for a value that cannot work."""
    for name in ("num_inference_steps", "num_images_per_prompt"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if args.num_inference_steps > 1000:
        raise ValueError(f"--num_inference_steps must be at most 1000, not {args.num_inference_steps}")
    for name in ("guidance_scale", "true_cfg_scale"):
        if not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name} must be a finite number, not {getattr(args, name)}")
    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {args.seed}")
    if args.true_cfg_scale > 1 and args.negative_prompt is None:
        raise ValueError("--true_cfg_scale above 1 needs a --negative_prompt")
    if args.compare and importlib.util.find_spec("skimage") is None:
        raise ValueError("--compare needs scikit-image; install FBCache_ms[eval]")
    row(args.config, args.num_inference_steps, args.config.residual_diff_threshold)
    check_checkpoint(args.ckpt)
    args.config.check_blocks(*block_counts(args.ckpt))
    if args.image_size is not None:
        unit = image_unit(args.ckpt)
        if min(args.image_size) < 1 or any(size % unit for size in args.image_size):
            raise ValueError(
                f"--image_size must be positive multiples of {unit}, not {' '.join(map(str, args.image_size))}"
            )
    try:
        args.save_path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.save_path).close()
    except OSError as error:
        raise OSError(f"--save_path {args.save_path} cannot be written: {error.strerror}") from None


def quiet():
    """Keeps the libraries' warnings off the terminal, unless the user has set their levels."""
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("mindone.transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def choose_device(args):
    """Sets the device and returns its name and the dtype's. Raises ValueError for what is not there or cannot be."""
    import mindspore as ms

    here = "Ascend" if ms.hal.is_available("Ascend") else "CPU"
    device = here if args.device == "auto" else args.device
    if device == "Ascend" and here == "CPU":
        raise ValueError("--device Ascend: there is no Ascend NPU here; only CPU is")
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "Ascend" else "float32"
    if device == "CPU" and dtype != "float32":
        raise ValueError(f"--dtype {dtype} is not supported on CPU; only float32 is")
    ms.set_device(device)
    return device, dtype


def generate(pipe, args, cache_config):
    """The pictures, as float arrays (number, H, W, 3) in [0, 1]."""
    import numpy as np

    height, width = args.image_size or (None, None)
    return pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        height=height,
        width=width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        true_cfg_scale=args.true_cfg_scale,
        num_images_per_prompt=args.num_images_per_prompt,
        generator=np.random.default_rng(args.seed),
        output_type="np",
        cache_config=cache_config,
    )[0]


def compare(pipe, args, pictures):
    """run.json's "baseline", and the cached run's median denoise time; both are timed anew, in turn."""
    from FBCache_ms.eval.metrics import psnr, ssim

    # The progress bar would run the loop in pieces and take time of its own.
    pipe.set_progress_bar_config(disable=True)
    times = {"cached": [], "baseline": []}
    generate(pipe, args, CacheConfig(gate="none"))
    for _ in range(COMPARE_RUNS):
        reference = generate(pipe, args, CacheConfig(gate="none"))
        times["baseline"].append(pipe.seconds["denoise"])
        generate(pipe, args, args.config)
        times["cached"].append(pipe.seconds["denoise"])
    cached, baseline = (statistics.median(times[name]) for name in ("cached", "baseline"))
    report = {
        "denoise": baseline,
        "speedup": baseline / cached,
        "psnr": statistics.mean(map(psnr, reference, pictures)),
        "ssim": statistics.mean(map(ssim, reference, pictures)),
    }
    return report, cached


def write(save_path, pictures, report):
    """Writes the pictures and run.json, each into a new file that then takes its name."""
    from PIL import Image

    for index, picture in enumerate(pictures):
        image = Image.fromarray((picture * 255).round().astype("uint8"))
        write_file(save_path / f"output_{index}.png", lambda stream: image.save(stream, format="PNG"))
    text = json.dumps(finite(report), indent=1, ensure_ascii=False) + "\n"
    write_file(save_path / "run.json", lambda stream: stream.write(text.encode()))


def write_file(path, write_to):
    """Writes a file through ``write_to(stream)``, under its name only once it is whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        try:
            write_to(stream)
        except BaseException:
            os.unlink(stream.name)
            raise
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, path)


def finite(value):
    """The same with None for numbers that JSON does not have: the PSNR of equal pictures, a difference of NaN."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error):
    """An error's message as one line."""
    return " ".join(str(error).split())


def run(args):
    """Loads, draws, compares if asked, writes; returns run.json's content."""
    device, dtype = choose_device(args)
    import mindone

    import mindspore as ms

    from FBCache_ms import FluxPipeline

    begin = time.perf_counter()
    pipe = FluxPipeline.from_pretrained(
        str(args.ckpt),
        mindspore_dtype=getattr(ms, dtype),
        cache_config=args.config,
        use_graph_mode=args.use_graph_mode,
    )
    load = time.perf_counter() - begin
    reason = pipe.why_not_cached({})
    if reason:
        raise ValueError(f"checkpoint {args.ckpt} cannot run with the cache: {reason}")
    pictures = generate(pipe, args, args.config)
    stats, seconds, bytes_of_cache = pipe.cache_stats, dict(pipe.seconds), pipe.cache_bytes
    report = {
        "config": str(args.config),
        "prompt": args.prompt,
        "seed": args.seed,
        "steps": args.num_inference_steps,
        "image_size": list(pictures.shape[1:3]),
        "computed_steps": stats.computed_steps,
        "cached_steps": stats.cached_steps,
        "residual_diffs": stats.residual_diffs,
        "skipped": stats.skipped,
        "seconds": {"load": load, **seconds, "total": load + seconds["total"]},
        "graph_compilations": pipe.graph_compilations,
        "cache_bytes": bytes_of_cache,
        "device": device,
        "mode": "GRAPH_MODE" if args.use_graph_mode else "PYNATIVE_MODE",
        "dtype": dtype,
        "mindspore": ms.__version__,
        "mindone": mindone.__version__,
    }
    if args.compare:
        report["baseline"], denoise = compare(pipe, args, pictures)
        report["seconds"].update(denoise=denoise, per_step=denoise / args.num_inference_steps)
    write(args.save_path, pictures, report)
    return report


def summary(report, save_path):
    """What a person wants to know of a run, in a few lines."""
    seconds, reused = report["seconds"], report["cached_steps"]
    lines = [
        f"{report['config']}: {len(reused)} of {report['steps']} steps reused, "
        f"{len(report['computed_steps'])} computed, {report['skipped']:.1%} of the operations skipped",
        f"load {seconds['load']:.1f} s, compile {seconds['compile']:.1f} s, denoise {seconds['denoise']:.2f} s "
        f"({seconds['per_step'] * 1000:.1f} ms a step) on {report['device']}, {report['dtype']}, {report['mode']}",
    ]
    if "baseline" in report:
        baseline = report["baseline"]
        lines.append(
            f"without the cache: denoise {baseline['denoise']:.2f} s, so {baseline['speedup']:.2f} times as fast; "
            f"PSNR {baseline['psnr']:.1f} dB, SSIM {baseline['ssim']:.4f} against it"
        )
    lines.append(f"written to {save_path}: output_0.png and run.json")
    return "\n".join(lines)


def main(argv=None):
    """The command fbcache-flux; returns its exit status."""
    args = parse_arguments(argv)
    quiet()
    try:
        report = run(args)
    except (OSError, TypeError, ValueError) as error:
        print(f"fbcache-flux: error: {one_line(error)}", file=sys.stderr)
        return 2
    print(summary(report, args.save_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
