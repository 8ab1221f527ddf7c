"""What int8 weights change: pictures, decisions, what the cache compares, and memory, against weights in float32.

    .venv/bin/python benchmarks/quantized.py

The pictures are the embedded checkpoint's, of captions that it was not trained on. Each is compared with the same
setting's in float32. Memory is that of loading a random transformer of FLUX.1's width, a process each. A killed run
goes on with the kind of weights it was at.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.quality import summary
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.closed_loop import Ledger
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.metrics import psnr, ssim
from FBCache_ms.eval.shared.scenes import held_out_captions
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.runtime.checkpoint import TINY_FLUX, fingerprint
from FBCache_ms.runtime.compile_cache import sources_checksum
from FBCache_ms.runtime.quantize import QuantizeConfig, quantize

STEPS, SEED = 28, 7
THRESHOLDS, ORDERS = (0.08, 0.12, 0.2), (0, 1, 2)
WIDTH, HEADS, DOUBLES, SINGLES = 3072, 24, 1, 2

FIRST = ("transformer_blocks.0.",)
"""What the gate compares is what this block adds."""

ROUNDED = "weights in bfloat16"
KINDS = {
    "float32": None,
    ROUNDED: None,
    "int8_weight_only": QuantizeConfig(),
    "int8_weight_only, every layer": QuantizeConfig(layers="all"),
    "int8_weight_only, the first block dense": QuantizeConfig(exclude_layers=FIRST),
    "int8": QuantizeConfig("int8"),
    "int8, the first block dense": QuantizeConfig("int8", exclude_layers=FIRST),
    "int8, the modulation too": QuantizeConfig("int8", weight_only_layers=()),
}
"""How the transformer's weights are kept."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "quantized", description=__doc__)
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="captions")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "KIND"), help="load that, and print the peak of memory")
    add_save_path(parser.add_argument, "./results/quantized", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("limit", args.limit, 1, 1000)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def load(kind):
    """The embedded checkpoint's pipeline with its weights kept so, and their bytes."""
    import mindspore as ms

    from FBCache_ms import FluxPipeline

    pipe = FluxPipeline.from_pretrained(str(TINY_FLUX))
    pipe.set_progress_bar_config(disable=True)
    if KINDS[kind] is not None:
        quantize(pipe, KINDS[kind])
    elif kind == ROUNDED:
        for parameter in pipe.transformer.get_parameters():
            parameter.set_data(parameter.astype(ms.bfloat16).astype(ms.float32))
    return pipe, sum(parameter.nbytes for parameter in pipe.transformer.get_parameters())


def drawn(kind, configs, captions):
    """{CacheConfig: [(picture, reused, differences) of each caption]}, and the weights' bytes."""
    pipe, size = load(kind)
    found = {config: [] for config in configs}
    for index, caption in enumerate(captions):
        embeds = pipe.embeddings(caption)
        for config in configs:
            generator = np.random.default_rng((SEED, index))
            settings = {"num_inference_steps": STEPS, "generator": generator, "output_type": "np"}
            picture = pipe(**embeds, **settings, cache_config=config)[0][0]
            diffs = np.array(pipe.cache_stats.residual_diffs, float)
            found[config].append((picture, np.array(pipe.cache_stats.reused), diffs))
    return found, size


def rows_of(kind, found, truth, captions):
    """A row for each setting: what is drawn against what float32 weights draw."""
    from FBCache_ms.eval.quality import prompt_score

    for config, pictures in found.items():
        changed = steps = 0
        psnrs, ssims, moved, scores = [], [], [], []
        for (picture, reused, diffs), (true, true_reused, true_diffs), caption in zip(
            pictures, truth[config], captions
        ):
            psnrs.append(psnr(true, picture))
            ssims.append(ssim(true, picture))
            scores.append(prompt_score(picture, caption))
            changed, steps = changed + int((reused != true_reused).sum()), steps + STEPS
            # The step after a decision that fell otherwise compares with another one.
            same = np.cumprod(np.concatenate(([True], reused == true_reused))[:-1]).astype(bool)
            compared = same & np.isfinite(diffs) & np.isfinite(true_diffs) & (true_diffs > 0)
            moved += list(np.abs(diffs[compared] / true_diffs[compared] - 1))
        yield {
            "weights": kind,
            "threshold": config.residual_diff_threshold,
            "order": config.taylorseer_derivative,
            "reused": float(np.mean([reused.mean() for _, reused, _ in pictures])),
            "psnr": summary(psnrs)["mean"],
            "ssim": statistics.mean(ssims),
            "prompt_score": statistics.mean(scores),
            "changed": changed,
            "decisions": steps,
            "median_change": float(np.median(moved)) if moved else 0.0,
            "largest_change": max(moved, default=0.0),
        }


def text_of(rows):
    """The table of pictures."""
    return markdown(
        [
            {
                "Weights": row["weights"],
                "Threshold": f"{row['threshold']:g}",
                "Order": row["order"],
                "Steps reused": f"{row['reused']:.0%}",
                "PSNR (dB)": f"{row['psnr']:.1f}" if np.isfinite(row["psnr"]) else "equal",
                "SSIM": f"{row['ssim']:.4f}",
                "Prompt score": f"{row['prompt_score']:.1%}",
                "Decisions changed": f"{row['changed']} of {row['decisions']}",
                "Change of d, median": f"{row['median_change']:.2%}",
                "Largest": f"{row['largest_change']:.2%}",
            }
            for row in rows
        ]
    )


def make_wide(folder):
    """Writes a random transformer of FLUX.1's width, in bfloat16 and in shards, and what a pipeline's folder needs."""
    from mindone.diffusers import FluxTransformer2DModel

    import mindspore as ms

    shutil.copytree(TINY_FLUX, folder, ignore=shutil.ignore_patterns("transformer"))
    heads = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "num_layers": DOUBLES}
    settings = json.loads((TINY_FLUX / "transformer" / "config.json").read_text())
    rope = {"axes_dims_rope": (16, 56, 56)}
    settings = {**{name: settings[name] for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim")}}
    model = FluxTransformer2DModel(**settings, **heads, **rope, num_single_layers=SINGLES, guidance_embeds=True)
    rng = np.random.default_rng(0)
    for parameter in model.get_parameters():
        values = rng.standard_normal(parameter.shape, dtype=np.float32) / np.float32(parameter.shape[-1] ** 0.5)
        parameter.set_data(ms.Tensor(values))
    model.to(ms.bfloat16).save_pretrained(str(folder / "transformer"), max_shard_size="300MB")


def peak_of_loading(folder, kind):
    """Prints the bytes of a loaded transformer's weights, and by how much the process's memory grew at most."""
    import mindspore as ms

    from FBCache_ms import FluxPipeline
    from FBCache_ms.eval.shared.drawing import peak_bytes, reset_peak
    from FBCache_ms.runtime.quantize import load_quantized

    before = resident()
    reset_peak("CPU")
    kinds = {name: config for name, config in KINDS.items() if config is not None}
    if kind in kinds:
        model = load_quantized(FluxPipeline.FILE.KIND, folder / "transformer", kinds[kind], ms.bfloat16)
    else:
        model = FluxPipeline.FILE.KIND.from_pretrained(str(folder / "transformer"), mindspore_dtype=ms.bfloat16)
    peak = peak_bytes("CPU") - before
    print(json.dumps([sum(parameter.nbytes for parameter in model.get_parameters()), peak]))


def resident():
    """Bytes of memory that this process holds."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


def memory_rows():
    """A row for mindone's loading in bfloat16, and for ours as int8."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide"
        make_wide(wide)
        shards = [file.stat().st_size for file in (wide / "transformer").glob("*.safetensors")]
        for kind in ("bfloat16, by mindone", "int8_weight_only"):
            command = [sys.executable, __file__, "--save_path", folder, "--load", str(wide), kind]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            size, peak = json.loads(found.splitlines()[-1])
            rows.append({"weights": kind, "bytes": size, "peak": peak, "largest_shard": max(shards)})
    return rows


def memory_text(rows):
    """The table of memory."""

    def megabytes(value):
        return f"{value / 1e6:.0f}"

    return markdown(
        [
            {
                "Loaded": row["weights"],
                "Weights (MB)": megabytes(row["bytes"]),
                "Peak while loading (MB)": megabytes(row["peak"]),
                "Largest shard (MB)": megabytes(row["largest_shard"]),
            }
            for row in rows
        ]
    )


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        from tqdm import tqdm

        if args.load:
            peak_of_loading(Path(args.load[0]), args.load[1])
            return
        captions = held_out_captions(args.limit)
        configs = [CacheConfig(value, order) for value in THRESHOLDS for order in ORDERS]
        configs.append(CacheConfig(0))
        rows, sizes = [], []
        # What other code or another checkpoint drew is not gone on with.
        key = f"{crc32(f'{sources_checksum()} {fingerprint(TINY_FLUX)}'.encode()):08x}"
        unfinished = args.save_path / f"unfinished_{args.limit}_captions_{key}"
        ledger = Ledger(unfinished, (0, 1))

        @cache
        def truth():
            return drawn("float32", configs, captions)

        def of(kind):
            found, size = truth() if kind == "float32" else drawn(kind, configs, captions)
            return {"rows": list(rows_of(kind, found, truth()[0], captions)), "bytes": size}

        for kind in tqdm(KINDS, desc="weights"):
            measured = ledger.found(kind, lambda: of(kind))
            rows += measured["rows"]
            sizes.append({"weights": kind, "bytes": measured["bytes"]})
        memory = memory_rows()
        text = f"{text_of(rows)}\n{memory_text(memory)}"
        data = {"settings": {**machine(), "captions": captions}, "rows": rows, "sizes": sizes, "memory": memory}
        publish(args.save_path, "quantized", text, rows, data, args.into)
        # The next run measures anew.
        shutil.rmtree(unfinished)

    return exit_status("quantized", work)


if __name__ == "__main__":
    sys.exit(main())
