"""Qwen-Image in four steps, as its Lightning adapters draw: cache-dit's five settings on 60 blocks, against no cache.

    .venv/bin/python benchmarks/lightning.py

The transformer has Qwen-Image's 60 blocks, narrow and randomly initialised (tools/tiny_models). Seconds and pictures'
quality are this machine's and this model's; operations are those of the published transformer at 1024 x 1024, for the
steps that were computed. Every setting is drawn in turn with the uncached run.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.metrics import psnr
from FBCache_ms.eval.shared.tables import markdown, publish, spread

STEPS, BLOCKS, SIDE = 4, 60, 64
TOKENS, TEXT = 4096, 27
"""Of the published table: with a text of 27 tokens the uncached run takes its 274.33 TFLOPs."""

PUBLISHED = {
    UNCACHED: 274.33,
    "F24B24_W2MC1_R0.8": 264.74,
    "F16B16_W2MC1_R0.8": 244.25,
    "F12B12_W2MC1_R0.8": 234.63,
    "F8B8_W2MC1_R0.8": 224.29,
    "F1B0_W2MC1_R0.8": 206.90,
}
"""cache-dit's table for Qwen-Image-Lightning, TFLOPs a picture by setting; there some steps were not reused."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "lightning", description=__doc__)
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="drawn under each setting")
    parser.add_argument("--blocks", type=int, default=BLOCKS, metavar="N", help="of the transformer")
    add_save_path(parser.add_argument, "./results/lightning", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("pictures", args.pictures, 1)
        check_range("blocks", args.blocks, 50)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def load(folder, blocks):
    """A QwenImagePipeline of so many blocks, made in a folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "tiny_models"))
    from make_models import make, make_qwen_transformer

    from FBCache_ms import QwenImagePipeline

    make(folder, "qwenimage")
    make_qwen_transformer(folder / "transformer", 64, blocks)
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tflops(config, reused):
    """TFLOPs of the published transformer for a picture whose steps were reused so."""
    from FBCache_ms.cache.gates import plan
    from FBCache_ms.models.qwenimage_costs import PUBLISHED as QWEN_IMAGE
    from FBCache_ms.models.qwenimage_costs import step_costs

    costs = step_costs(QWEN_IMAGE, 1, TOKENS, TEXT)
    skipped = sum(costs.of_blocks(*gate.span(QWEN_IMAGE.num_layers, 0)) for gate in plan(config))
    return (costs.total * len(reused) - skipped * sum(reused)) / 1e12


def figures_of(args):
    """What each setting reused, took and lost, picture by picture."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = load(Path(folder) / "model", args.blocks)
    embeds = pipe.embeddings("a big red circle")

    def draw(tag, seed):
        arguments = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "true_cfg_scale": 1.0}
        generator = np.random.default_rng(seed)
        config = CacheConfig.named(tag)
        picture = pipe(**embeds, **arguments, generator=generator, output_type="np", cache_config=config)[0][0]
        return picture, pipe.seconds["denoise"], list(pipe.cache_stats.reused)

    figures = []
    for tag in PUBLISHED:
        found = {"cache": tag, "seconds": [], "uncached": [], "psnr": [], "tflops": [], "computed": []}
        draw(tag, 0)
        draw(UNCACHED, 0)
        for seed in range(args.pictures):
            reference, uncached, _ = draw(UNCACHED, seed)
            picture, seconds, reused = draw(tag, seed)
            found["uncached"].append(uncached)
            found["seconds"].append(seconds)
            found["psnr"].append(psnr(reference, picture))
            found["tflops"].append(tflops(CacheConfig.named(tag), reused))
            found["computed"].append(len(reused) - sum(reused))
        figures.append(found)
    return figures


def row(found):
    """A row of the table."""
    plain = found["cache"] == UNCACHED
    ratios = [uncached / cached for uncached, cached in zip(found["uncached"], found["seconds"])]
    return {
        "`--cache`": f"`{found['cache']}`",
        "Computed of 4": f"{statistics.mean(found['computed']):g}",
        "TFLOPs at 1024 x 1024": f"{statistics.mean(found['tflops']):.2f}",
        "Published": f"{PUBLISHED[found['cache']]:.2f}",
        "Denoise (s)": spread(found["seconds"]),
        "Uncached (s)": spread(found["uncached"]),
        "Speed-up": "1" if plain else spread(ratios, 2),
        "PSNR (dB)": "-" if plain else f"{statistics.mean(found['psnr']):.1f}",
    }


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        figures = figures_of(args)
        rows = list(map(row, figures))
        data = {"settings": {**machine(), "pictures": args.pictures, "blocks": args.blocks}, "rows": figures}
        publish(args.save_path, "lightning", markdown(rows), rows, data, args.into)

    return exit_status("lightning", work)


if __name__ == "__main__":
    sys.exit(main())
