"""Puts the cache on and off each of mindone's Flux pipelines, and measures what it costs and gains."""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Tuple

import numpy as np

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.tables import markdown, publish

SIDE = 64
PROMPT, OTHER = "a big red circle in the center, blue background", "a small green square on the left, black background"


@dataclass(frozen=True)
class Case:
    """How a pipeline is called: on a checkpoint of which layout, with which pictures, with what else."""

    layout: str
    pictures: Tuple[str, ...] = ()
    more: Dict[str, object] = field(default_factory=dict)


STRENGTH = {"strength": 0.8}
AS_GIVEN = {"_auto_resize": False, "max_area": SIDE * SIDE}
"""Kontext otherwise brings every picture to about a megapixel."""

PIPELINES = {
    "FluxPipeline": Case("dev"),
    "FluxImg2ImgPipeline": Case("dev", ("image",), STRENGTH),
    "FluxInpaintPipeline": Case("dev", ("image", "mask_image"), STRENGTH),
    "FluxControlPipeline": Case("control", ("control_image",)),
    "FluxControlImg2ImgPipeline": Case("control", ("image", "control_image"), STRENGTH),
    "FluxControlInpaintPipeline": Case("control", ("image", "control_image", "mask_image"), STRENGTH),
    "FluxControlNetPipeline": Case("controlnet", ("control_image",)),
    "FluxControlNetImg2ImgPipeline": Case("controlnet", ("image", "control_image"), STRENGTH),
    "FluxControlNetInpaintPipeline": Case("controlnet", ("image", "control_image", "mask_image"), STRENGTH),
    "FluxFillPipeline": Case("fill", ("image", "mask_image")),
    "FluxKontextPipeline": Case("kontext", ("image",), AS_GIVEN),
    "FluxKontextInpaintPipeline": Case("kontext", ("image", "mask_image"), {**STRENGTH, **AS_GIVEN}),
}
"""mindone 0.5.0's pipelines with a Flux transformer."""


def pictures(width=SIDE):
    """What the pipelines are given: a picture, one that guides it, and a mask, white where the picture is to change."""
    from PIL import Image, ImageDraw

    image, control, mask = (
        Image.new("RGB", (width, SIDE), "navy"),
        Image.new("RGB", (width, SIDE)),
        Image.new("L", (width, SIDE)),
    )
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill="yellow")
    ImageDraw.Draw(control).ellipse((12, 12, 52, 52), outline="white", width=3)
    ImageDraw.Draw(mask).rectangle((16, 16, 56, 56), fill=255)
    return {"image": image, "control_image": control, "mask_image": mask}


def load(name, folder, **components):
    """A pipeline of mindone's by its class's name, from a checkpoint of its layout; components may be given."""
    import mindone.diffusers

    pipe = getattr(mindone.diffusers, name).from_pretrained(str(folder), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=PROMPT, width=SIDE, seed=0, **settings):
    """One call of a pipeline of PIPELINES: pictures as arrays, unless told otherwise."""
    case = PIPELINES[type(pipe).__name__]
    given = {name: picture for name, picture in pictures(width).items() if name in case.pictures}
    settings = {"num_inference_steps": 28, "max_sequence_length": 32, "output_type": "np", **case.more, **settings}
    generator = np.random.default_rng(seed)
    return pipe(prompt=prompt, height=SIDE, width=width, generator=generator, **given, **settings)[0]


def uncached(pipe, **settings):
    """The same without the cache, by mindone's own transformer.

    mindone gives a ControlNet's residuals to the graph as constants, so that it compiles at every step, and takes old
    graphs for new ones; here they are inputs.
    """
    from FBCache_ms.pipelines.cached_transformer import StandIn, graph_input

    class Plain(StandIn):
        def __call__(self, *args, **kwargs):
            return self.original(*args, **{name: graph_input(value) for name, value in kwargs.items()})

    transformer = pipe.transformer
    pipe.__dict__["transformer"] = Plain(transformer)
    try:
        return draw(pipe, **settings)
    finally:
        pipe.__dict__["transformer"] = transformer


def break_off(pipe, step, timestep, tensors):
    """A callback_on_step_end that interrupts the generation after its third step."""
    pipe._interrupt = step == 2
    return {}


def seconds_in_turn(pipe, configs, runs, **settings):
    """The median time of a call up to its latents, under each CacheConfig."""
    from FBCache_ms import apply_cache_on_pipe

    times = [[] for _ in configs]
    for _ in range(runs):
        for config, taken in zip(configs, times):
            apply_cache_on_pipe(pipe, config)
            begin = time.perf_counter()
            draw(pipe, output_type="latent", **settings).asnumpy()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer_2")
MODELS = ("transformer", "controlnet")


def measure(name, folder, config, steps, runs, components):
    """One pipeline's row, {column: value}.

    ``components`` keeps the encoders for every pipeline and the models for those of their layout, as they compile long.
    """
    from FBCache_ms import apply_cache_on_pipe, remove_cache_from_pipe
    from FBCache_ms.eval.shared.metrics import psnr

    pipe = load(name, folder, **components.get("", {}), **components.get(folder.name, {}))
    for key, parts in {"": ENCODERS, folder.name: MODELS}.items():
        components[key] = {part: getattr(pipe, part) for part in parts if hasattr(pipe, part)}
    before = {part: getattr(pipe, part) for part in ("transformer", "scheduler")}
    plain = uncached(pipe, num_inference_steps=steps)
    never = config.switched_off()
    apply_cache_on_pipe(pipe, never)
    off = draw(pipe, num_inference_steps=steps)
    apply_cache_on_pipe(pipe, config)
    on = draw(pipe, num_inference_steps=steps)
    stats = pipe.transformer.cache_stats
    whole, cached = seconds_in_turn(pipe, (never, config), runs, num_inference_steps=steps)
    draw(pipe, OTHER, width=96, seed=1, num_inference_steps=steps // 2)
    draw(pipe, OTHER, seed=2, num_inference_steps=steps, callback_on_step_end=break_off)
    again = draw(pipe, num_inference_steps=steps)
    remove_cache_from_pipe(pipe)
    removed = all(getattr(pipe, part) is each for part, each in before.items())
    removed = removed and np.array_equal(plain, uncached(pipe, num_inference_steps=steps))
    return {
        "Pipeline": name,
        "Checkpoint": folder.name,
        "Cache off, Largest Difference": float(np.abs(off - plain).max()),
        "Reused": f"{len(stats.cached_steps)} of {len(stats.reused)}",
        "PSNR (dB)": psnr(plain, on),
        "Off (s)": whole,
        "On (s)": cached,
        "Speed-up": whole / cached,
        "After Others": "the same bits" if np.array_equal(on, again) else "differs",
        "Removed": "the same bits" if removed else "differs",
    }


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "family", "CHECKPOINTS [options]", description=__doc__)
    parser.add_argument(
        "checkpoints", type=Path, metavar="CHECKPOINTS", help="folder of the layouts, as tools/tiny_family makes it"
    )
    parser.add_argument(
        "--pipelines",
        nargs="+",
        choices=tuple(PIPELINES),
        default=tuple(PIPELINES),
        metavar="NAME",
        help="of mindone's",
    )
    parser.add_argument("--cache", default="F1B0_W0_R0.2", metavar="TAG|PRESET", help="what is put on")
    parser.add_argument("--num_inference_steps", type=int, default=28, metavar="N", help="steps of a generation")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs")
    add_save_path(parser.add_argument, "./results/family", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("runs", args.runs, 1)
        check_range("num_inference_steps", args.num_inference_steps, 4)
        args.config = CacheConfig.named(args.cache)
        for name in args.pipelines:
            folder = args.checkpoints / PIPELINES[name].layout
            if not folder.is_dir():
                raise ValueError(f"checkpoint {folder} is not a folder; tools/tiny_family/make_family.py makes it")
        check_into(args.into)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def table_of(rows):
    """The rows as a Markdown table."""
    formats = {
        "Cache off, Largest Difference": "{:.1g}",
        "PSNR (dB)": "{:.1f}",
        "Off (s)": "{:.3f}",
        "On (s)": "{:.3f}",
        "Speed-up": "{:.2f}x",
    }
    return markdown([{name: formats.get(name, "{}").format(value) for name, value in row.items()} for row in rows])


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        import mindspore as ms

        from FBCache_ms import prepare_device

        prepare_device()
        ms.set_context(mode=ms.GRAPH_MODE)
        from tqdm import tqdm

        rows, components = [], {}
        for name in tqdm(args.pipelines, desc="pipelines"):
            folder = args.checkpoints / PIPELINES[name].layout
            rows.append(measure(name, folder, args.config, args.num_inference_steps, args.runs, components))
        text = table_of(rows)
        publish(args.save_path, "family", text, rows, {"cache": str(args.config), "rows": rows}, args.into)

    return exit_status("family", work)


if __name__ == "__main__":
    sys.exit(main())
