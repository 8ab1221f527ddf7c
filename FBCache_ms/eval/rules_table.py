"""Draws the same prompts under every caching rule and writes a table: what each computes, saves and loses."""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from FBCache_ms.checkpoint import TINY_FLUX, block_counts, check_checkpoint
from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.run_flux_withFBCache_pipeline import Parser, one_line, quiet, write_file
from FBCache_ms.eval.scenes import held_out_captions, parse_caption, score_picture
from FBCache_ms.schedules import row as schedule_row

UNCACHED = CacheConfig(gate="none")
UNCACHED_EVERY = 10
"""The uncached run is timed beside every so many-th cached one."""


@dataclass(frozen=True)
class Row:
    """A row of the table: the rule, whose users know it, and how it is asked for: a tag, or a share of the steps."""

    rule: str
    known_from: str
    cache: str
    steps: float = 1.0


ROWS = (
    Row("no cache", "", "F0B0_W0_R0.12,gate=none"),
    Row("60 % of the steps", "fewer steps", "F0B0_W0_R0.12,gate=none", 0.6),
    Row("34 % of the steps", "fewer steps", "F0B0_W0_R0.12,gate=none", 0.34),
    Row("22 % of the steps", "fewer steps", "F0B0_W0_R0.12,gate=none", 0.22),
    Row("First-Block Cache", "ParaAttention", "conservative"),
    Row("First-Block Cache", "ParaAttention", "balanced"),
    Row("First-Block Cache", "ParaAttention", "aggressive"),
    Row("First-Block Cache + TaylorSeer", "ParaAttention", "F1B0_W0_T1O1_R0.2"),
    Row("First-Block Cache + TaylorSeer", "ParaAttention", "F1B0_W0_T1O2_R0.2"),
    Row("every 4th channel compared", "ParaAttention", "F1B0_W0_R0.12,downsample_factor=4"),
    Row("hidden state compared", "ComfyUI-WaveSpeed", "F1B0_W0_R0.12,probe=hidden"),
    Row("window, hits in a row", "ComfyUI", "F1B0_W0MC2_R0.2,start=0.1,end=0.9"),
    Row("DBCache slow", "cache-dit", "slow"),
    Row("DBCache medium", "cache-dit", "medium"),
    Row("DBCache fast", "cache-dit", "fast"),
    Row("DBCache ultra", "cache-dit", "ultra"),
    Row("DBCache, last blocks run", "cache-dit", "F3B2_W2MC3_R0.15"),
    Row("accumulated limit", "cache-dit", "F1B0_W0_R0.2,max_accumulated_residual_diff=2"),
    Row("dynamic mask", "cache-dit", "F1B0_W0_R0.24,schedule=mask_medium"),
    Row("static mask slow", "cache-dit", "mask_slow"),
    Row("static mask medium", "cache-dit", "mask_medium"),
    Row("static mask fast", "cache-dit", "mask_fast"),
    Row("static mask ultra", "cache-dit", "mask_ultra"),
    Row("a mask of one's own", "cache-dit", "F0B0_W0_R0.12,gate=static,steps_computation_mask={own}"),
    Row("double gate", "Nunchaku", "double_gate"),
    Row("double gate, single stack alone", "Nunchaku", "F1B0_W0_R0,span=stacks,residual_diff_threshold_single=0.2"),
    Row("double gate, double stack alone", "Nunchaku", "F1B0_W0_R0.2,span=stacks,residual_diff_threshold_single=0"),
    Row("TeaCache", "TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.25"),
    Row("TeaCache", "TeaCache", "teacache"),
    Row("TeaCache", "TeaCache", "F0B0_W0_R0.12,gate=teacache,teacache_threshold=0.8"),
    Row("First-Block Cache and TeaCache", "", "F1B0_W0_R0.12,gate=fbcache_and_teacache"),
    Row("First-Block Cache or TeaCache", "", "F1B0_W0_R0.2,gate=fbcache_or_teacache,teacache_threshold=0.25"),
    Row("TaylorSeer", "TaylorSeer", "taylorseer"),
    Row("TaylorSeer, order 2", "TaylorSeer", "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer"),
    Row("HiCache", "HiCache", "hicache"),
    Row("Newton", "", "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer,forecast=newton"),
    Row(
        "Newton in sigma",
        "",
        "F0B0_W0_T1O2_R0.12,gate=static,schedule=taylorseer,forecast=newton,forecast_coordinate=sigma",
    ),
    Row("FORA", "FORA", "fora"),
    Row("Delta-DiT", "Delta-DiT", "delta_dit"),
    Row("MagCache", "MagCache", "magcache"),
    Row("CG-Taylor", "CG-Taylor", "cg_taylor"),
    Row("DiCache", "DiCache", "dicache"),
    Row("DiCache's gate, reuse", "DiCache", "F1B0_W6_R0.4,gate=dicache"),
    Row("decision by the worst sample", "", "F1B0_W0_R0.12,batch_reduction=max"),
)


def own_mask(steps):
    """A mask for the row that shows one: the first quarter computed, then every third step, and the last."""
    return "".join(str(int(step < steps // 4 or step % 3 == 0 or step == steps - 1)) for step in range(steps))


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(prog="rules_table", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, default=TINY_FLUX, metavar="PATH")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line (default: captions of our own)")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="how many prompts (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the captions and of the noise")
    parser.add_argument("--num_inference_steps", type=int, default=28, metavar="N")
    parser.add_argument("--guidance_scale", type=float, default=3.5, metavar="G")
    parser.add_argument("--cache", nargs="+", metavar="TAG|PRESET", help="these rows instead of every rule")
    parser.add_argument("--save_path", type=Path, default=Path("./results/rules"), metavar="FOLDER")
    parser.add_argument(
        "--into",
        nargs=2,
        metavar=("FILE", "NAME"),
        help="also put the table into a text, between the lines <!-- NAME --> and <!-- end of NAME -->",
    )
    args = parser.parse_args(argv)
    try:
        if args.into is not None:
            insert(*args.into, "")
        for name, low, high in (("limit", 1, 10_000), ("num_inference_steps", 1, 1000), ("seed", 0, 2**32)):
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name} must be in [{low}, {high}], not {getattr(args, name)}")
        args.rows = ROWS if args.cache is None else (ROWS[0], *(Row(tag, "", tag) for tag in args.cache))
        check_checkpoint(args.ckpt)
        for each in args.rows:
            config = config_of(each, args.num_inference_steps)
            config.check_blocks(*block_counts(args.ckpt))
            schedule_row(config, steps_of(each, args.num_inference_steps), 1.0)
        args.prompts = read_prompts(args)
        args.save_path.mkdir(parents=True, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:
        parser.error(error)
    return args


def read_prompts(args):
    """The prompts to draw."""
    if args.prompts is None:
        return held_out_captions(args.limit, args.seed)
    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts} holds no prompt")
    return prompts[: args.limit]


def config_of(row, steps):
    """A row's CacheConfig."""
    return CacheConfig.named(row.cache.format(own=own_mask(steps)))


def steps_of(row, steps):
    """How many steps a row takes."""
    return max(round(row.steps * steps), 1)


class Measure:
    """Draws the prompts under one rule after the other, on one pipeline."""

    def __init__(self, args):
        import numpy as np

        from FBCache_ms import FluxPipeline

        self.args, self.np = args, np
        self.pipe = FluxPipeline.from_pretrained(str(args.ckpt))
        self.pipe.set_progress_bar_config(disable=True)
        length = min(self.pipe.tokenizer_2.model_max_length, 512)
        self.embeds = [self.pipe.encode_prompt(prompt, max_sequence_length=length)[:2] for prompt in args.prompts]
        self.scenes = [scene_or_none(prompt) for prompt in args.prompts]
        self.uncached = [self.draw(index, UNCACHED) for index in range(len(args.prompts))]

    def draw(self, index, config, steps=None):
        """The picture of a prompt, (H, W, 3) in [0, 1]."""
        embeds, pooled = self.embeds[index]
        return self.pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            num_inference_steps=steps or self.args.num_inference_steps,
            guidance_scale=self.args.guidance_scale,
            generator=self.np.random.default_rng((self.args.seed, index)),
            output_type="np",
            cache_config=config,
        )[0][0]

    def measure(self, row):
        """A row's figures."""
        from PIL import Image

        from FBCache_ms.eval.metrics import psnr, ssim

        config, steps = config_of(row, self.args.num_inference_steps), steps_of(row, self.args.num_inference_steps)
        self.draw(0, config, steps)
        times, uncached, figures, right = [], [], [], []
        for index, reference in enumerate(self.uncached):
            picture = self.draw(index, config, steps)
            times.append(self.pipe.seconds["denoise"])
            stats = self.pipe.cache_stats
            figures.append(
                (len(stats.computed_steps), stats.skipped, psnr(reference, picture), ssim(reference, picture))
            )
            if self.scenes[index] is not None:
                image = Image.fromarray((picture * 255).round().astype("uint8"))
                right += [ok for _, ok in score_picture(image, self.scenes[index])]
            if index % UNCACHED_EVERY == 0:
                self.draw(index, UNCACHED)
                uncached.append(self.pipe.seconds["denoise"])
        computed, skipped, psnrs, ssims = zip(*figures)
        return {
            "rule": row.rule,
            "known_from": row.known_from,
            "cache": row.cache.format(own=own_mask(self.args.num_inference_steps)),
            "config": str(config),
            "steps": steps,
            "computed_steps": statistics.mean(computed),
            "skipped": statistics.mean(skipped),
            "operations_ratio": self.args.num_inference_steps / steps / (1 - statistics.mean(skipped)),
            "speedup": statistics.median(uncached) / statistics.median(times),
            "psnr": statistics.mean(min(value, 99.0) for value in psnrs),
            "ssim": statistics.mean(ssims),
            "score": statistics.mean(right) if right else None,
        }


def scene_or_none(prompt):
    """The scene that a prompt names, None for a prompt of another kind."""
    try:
        return parse_caption(prompt)
    except ValueError:
        return None


def markdown(figures):
    """The table."""
    head = "| rule | known from | `--cache` | computed | operations | speed-up | PSNR | SSIM | prompt score |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in figures:
        psnr = "-" if row["psnr"] >= 99 else f"{row['psnr']:.1f}"
        score = "-" if row["score"] is None else f"{row['score']:.1%}"
        computed = f"{row['computed_steps']:.1f} of {row['steps']}"
        lines.append(
            f"| {row['rule']} | {row['known_from']} | `{row['cache']}` | {computed} | {row['operations_ratio']:.2f}x | "
            f"{row['speedup']:.2f}x | {psnr} | {row['ssim']:.4f} | {score} |"
        )
    return "\n".join(lines) + "\n"


def insert(file, name, table):
    """The text of a file with the table between the marks of that name. Raises ValueError if the marks are missing."""
    text = Path(file).read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    if not end:
        raise ValueError(f"--into: {file} has no lines <!-- {name} --> and <!-- end of {name} -->")
    return f"{before}{begin}{table}{end}{after}"


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    quiet()
    from tqdm import tqdm

    try:
        measure = Measure(args)
        figures = []
        for row in tqdm(args.rows, desc="rules"):
            figures.append(measure.measure(row))
            text, data = markdown(figures), json.dumps({"prompts": args.prompts, "rows": figures}, indent=1) + "\n"
            write_file(args.save_path / "rules.md", lambda stream: stream.write(text.encode()))
            write_file(args.save_path / "rules.json", lambda stream: stream.write(data.encode()))
        if args.into is not None:
            Path(args.into[0]).write_text(insert(*args.into, text), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"rules_table: error: {one_line(error)}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
