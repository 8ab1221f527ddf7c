"""The whole loop as one graph against a cached step that Python calls, as the example in mindone is built.

    .venv/bin/python benchmarks/against_example.py --into docs/results/against_example.md

The example is rebuilt by its rules: a step with the first block, the decision on what that added and the buffers is a
graph; mindone's pipeline calls it once a step, runs the scheduler in Python and has the text projected and the rotary
table made at each step anew; the threshold is a constant of the graph. It is measured beside FBCache_ms's cached step
in the same pipeline (apply_cache_on_pipe) and beside FBCache_ms's whole loop. Uncached, the first is mindone's own
transformer, and the others have no gate.

A generation goes from given embeddings to latents, by the pipeline's own call; all are run in turn. Ends with status 1
if the three do not reuse the same steps.
"""

import statistics
import sys
import time
from pathlib import Path

import mindone.diffusers
import numpy as np
from mindone.diffusers.utils import logging
from tqdm.auto import tqdm

import mindspore as ms
from mindspore import Parameter, nn, ops

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe, prepare_device
from FBCache_ms.cache.step import run_blocks
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.pipelines.cached_transformer import StandIn
from FBCache_ms.rules.arithmetic import relative_difference
from FBCache_ms.rules.schedules import MAX_STEPS
from FBCache_ms.runtime.checkpoint import TINY_FLUX

PROMPT = "a big red circle in the center, blue background"
EXAMPLE, STEP, LOOP = "the example: step, Python loop", "FBCache_ms: step, Python loop", "FBCache_ms: whole loop"
FEWEST_STEPS = 5
"""What fewer leave uncached."""


class ExampleStep(nn.Cell):
    """A step of a transformer with First-Block Cache, as a graph of its own for each threshold.

    Args:
        transformer: mindone's FluxTransformer2DModel.
        threshold: a constant of the graph.
        shape: (B, S, D).
    """

    def __init__(self, transformer, threshold, shape):
        super().__init__(auto_prefix=False)
        self.transformer, self.model, self.threshold = transformer, transformer.cached_model, threshold
        self.blocks = sum(self.model.stacks)
        self.first_residual = Parameter(ms.Tensor(np.zeros(shape), ms.float32), "example_first_residual", False)
        self.residual = Parameter(ms.Tensor(np.zeros(shape), ms.float32), "example_residual", False)
        self.step = Parameter(ms.Tensor(0, ms.int32), "example_step", False)
        self.reused = Parameter(ms.Tensor(np.zeros(MAX_STEPS), ms.int32), "example_reused", False)
        self.every_step = ms.Tensor(np.arange(MAX_STEPS), ms.int32)

    def begin(self):
        """Begins a generation."""
        ops.assign(self.step, ms.Tensor(0, ms.int32))

    def construct(
        self,
        hidden_states,
        timestep,
        guidance,
        pooled_projections,
        encoder_hidden_states,
        txt_ids,
        img_ids,
        joint_attention_kwargs=None,
        return_dict=False,
    ):
        model, dtype = self.model, hidden_states.dtype
        inputs = {
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "txt_ids": txt_ids,
            "img_ids": img_ids,
            "guidance": guidance,
        }
        text, given = model.condition(model.times(timestep, dtype), *model.prepare(inputs, None, dtype))
        image = model.embed(hidden_states)
        first, text = run_blocks(model, 0, 1, image, text, given)
        probe = first - image
        difference = relative_difference(self.first_residual, probe)
        reuse = ops.logical_and(self.step > 0, difference < self.threshold)
        if reuse:
            image = first + self.residual
        else:
            image = run_blocks(model, 1, self.blocks, first, text, given)[0]
            ops.assign(self.first_residual, probe)
            ops.assign(self.residual, image - first)
        ops.assign(self.reused, ops.where(self.every_step == self.step, reuse.astype(ms.int32), self.reused))
        ops.assign(self.step, self.step + 1)
        return (model.head(image, given),)


class ExampleTransformer(StandIn):
    """In a transformer's place: the step for the threshold of the moment, or the transformer itself at None."""

    def __init__(self, transformer):
        super().__init__(transformer, active=transformer, steps={})

    def choose(self, threshold, shape):
        """Begins a generation of latents of this shape, (B, S, D)."""
        self.active = self.original
        if threshold is not None:
            if threshold not in self.steps:
                self.steps[threshold] = ExampleStep(self.original, threshold, shape)
            self.active = self.steps[threshold]
            self.active.begin()

    def __call__(self, *args, **kwargs):
        return self.active(*args, **kwargs)


class Example:
    """mindone's pipeline with the example's step."""

    def __init__(self, ckpt, shape):
        self.pipe, self.shape = mindone.diffusers.FluxPipeline.from_pretrained(ckpt), shape
        self.pipe.__dict__["transformer"] = ExampleTransformer(self.pipe.transformer)

    def choose(self, threshold):
        self.pipe.transformer.choose(threshold, self.shape)

    def graphs(self):
        return [*self.pipe.transformer.steps.values(), self.pipe.transformer.original]

    def reused(self, steps):
        return [bool(mark) for mark in self.pipe.transformer.active.reused.asnumpy()[:steps]]


class Step:
    """mindone's pipeline with FBCache_ms's step."""

    def __init__(self, ckpt, shape):
        self.pipe = apply_cache_on_pipe(mindone.diffusers.FluxPipeline.from_pretrained(ckpt))

    def choose(self, threshold):
        apply_cache_on_pipe(self.pipe, config_at(threshold))

    def graphs(self):
        return self.pipe.transformer.steps

    def reused(self, steps):
        return list(map(bool, self.pipe.transformer.cache_stats.reused))


class Loop:
    """FBCache_ms's pipeline."""

    def __init__(self, ckpt, shape):
        self.pipe = FluxPipeline.from_pretrained(ckpt)

    def choose(self, threshold):
        apply_cache_on_pipe(self.pipe, config_at(threshold))

    def graphs(self):
        return self.pipe._loops

    def reused(self, steps):
        return list(map(bool, self.pipe.cache_stats.reused))


CONTENDERS = {EXAMPLE: Example, STEP: Step, LOOP: Loop}


def config_at(threshold):
    """The CacheConfig of a threshold; None is without a gate."""
    return CacheConfig.named(UNCACHED) if threshold is None else CacheConfig(threshold)


def compilations(contender):
    """How many graphs of the transformer have been compiled."""
    return sum(len(cell.compile_cache) for cell in contender.graphs())


def run(ckpt, thresholds, steps, runs):
    """The record: for each contender its seconds by threshold, its compilations, and what was reused."""
    logging.disable_progress_bar()
    ms.set_context(mode=ms.GRAPH_MODE)
    prepare_device()
    encoder = FluxPipeline.from_pretrained(ckpt)
    size, unit = encoder.vae.config.sample_size, 2 * encoder.vae_scale_factor
    embeds, pooled, _ = encoder.encode_prompt(PROMPT, max_sequence_length=encoder.tokenizer_2.model_max_length)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": size, "width": size}
    shape = (1, (size // unit) ** 2, encoder.transformer.inner_dim)
    contenders = {name: make(ckpt, shape) for name, make in CONTENDERS.items()}

    def draw(contender, threshold):
        contender.choose(threshold)
        begin = time.perf_counter()
        latents = contender.pipe(
            **given, num_inference_steps=steps, output_type="latent", generator=np.random.default_rng(0)
        )[0].asnumpy()
        return time.perf_counter() - begin, latents

    record, pictures = {name: {"seconds": {}, "first": {}, "reused": {}} for name in contenders}, {}
    for name, contender in contenders.items():
        contender.pipe.set_progress_bar_config(disable=True)
        for threshold in (None, *thresholds):
            record[name]["first"][str(threshold)], pictures[name, threshold] = draw(contender, threshold)
            if threshold is None:
                uncached = compilations(contender)
            else:
                record[name]["reused"][str(threshold)] = contender.reused(steps)
        record[name]["graphs"] = compilations(contender) - uncached
        record[name]["seconds"] = {str(threshold): [] for threshold in (None, *thresholds)}
    for threshold in tqdm([None, *thresholds] * runs, unit="turn"):
        for name, contender in contenders.items():
            record[name]["seconds"][str(threshold)].append(draw(contender, threshold)[0])
    for name, figures in record.items():
        figures["difference"] = {
            str(threshold): float(np.abs(pictures[name, threshold] - pictures[LOOP, threshold]).max())
            for threshold in (None, *thresholds)
        }
    return record


def speed_rows(record, steps):
    """A row for each threshold and contender."""
    rows = []
    for threshold, loop in record[LOOP]["seconds"].items():
        for name, figures in record.items():
            seconds = figures["seconds"][threshold]
            reused = figures["reused"].get(threshold)
            rows.append(
                {
                    "Threshold": "no cache" if reused is None else threshold,
                    "What Runs": name,
                    "Reused": "-" if reused is None else f"{sum(reused)} of {steps}",
                    "Denoising (s)": spread(seconds),
                    "A Step (ms)": f"{1000 * statistics.median(seconds) / steps:.1f}",
                    "Whole Loop (s)": spread(loop),
                    "Over the Whole Loop": f"{statistics.median(map(ratio, zip(seconds, loop))):.2f}x",
                    "Largest Difference from It": f"{figures['difference'][threshold]:.1e}",
                }
            )
    return rows


def ratio(pair):
    """The first of two over the second."""
    return pair[0] / pair[1]


def graph_rows(record):
    """A row for each contender: what the thresholds took to compile."""
    rows = []
    for name, figures in record.items():
        first = {
            threshold: seconds for threshold, seconds in figures["first"].items() if threshold in figures["reused"]
        }
        warm = {threshold: statistics.median(figures["seconds"][threshold]) for threshold in first}
        rows.append(
            {
                "What Runs": name,
                f"Graphs for {len(first)} Thresholds": figures["graphs"],
                "Their Compilation (s)": f"{sum(first.values()) - sum(warm.values()):.1f}",
            }
        )
    return rows


def same_decisions(record):
    """Whether all contenders reused the same steps."""
    return all(figures["reused"] == record[LOOP]["reused"] for figures in record.values())


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "against_example", description=__doc__)
    parser.add_argument("--ckpt", type=Path, default=TINY_FLUX, metavar="PATH", help="folder in diffusers layout")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.08, 0.12, 0.2], metavar="R", help="of the cache"
    )
    parser.add_argument("--steps", type=int, default=28, metavar="N", help="of a generation")
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="turns")
    add_save_path(parser.add_argument, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        for threshold in args.thresholds:
            check_range("thresholds", threshold, 0, 1)
        check_range("steps", args.steps, FEWEST_STEPS, MAX_STEPS)
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def main(argv=None):
    """The program; returns its exit status."""
    args, same = parse_arguments(argv), []

    def work():
        record = run(str(args.ckpt), args.thresholds, args.steps, args.runs)
        same.append(same_decisions(record))
        rows = speed_rows(record, args.steps)
        text = f"{markdown(rows)}\n{markdown(graph_rows(record))}"
        settings = {"thresholds": args.thresholds, "steps": args.steps, "runs": args.runs, **machine()}
        publish(args.save_path, "against_example", text, rows, {"settings": settings, "contenders": record}, args.into)
        if not same[0]:
            print("the three did not reuse the same steps", file=sys.stderr)

    return exit_status("against_example", work) or int(not same[0])


if __name__ == "__main__":
    sys.exit(main())
