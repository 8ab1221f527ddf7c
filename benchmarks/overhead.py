"""The loop's overhead: how long cached generations take, against what their steps must take.

    .venv/bin/python benchmarks/overhead.py

A generation's limit is its computed steps at the time of a step without a cache, and its reused steps at the time of a
step through the first block alone: what a reuse must run. The former comes from the loop without a gate, the latter
from the same loop around a transformer that has no other block, where the compiler drops what only the next block would
need: the end of the first one's text stream. Five transformers: the embedded checkpoint's, and four randomly
initialised, whose steps differ so much that their thresholds are larger. Three have FLUX.1's 19 double and 38 single
blocks: "deep", 64 wide; "large", 128 wide as the embedded one and on 256 image tokens in the place of 64; and "wide",
256 wide and on 256 tokens. "widest" is 3,072 wide as FLUX.1, with one double and two single blocks, on 256 tokens.
FLUX.1 has 4,096. All loops of a number of steps are run in turn; every turn gives its own ratios.

A second table tells where the time over the limit goes, from the same graphs: under a schedule that computes every
step, and under one that reuses all but the first. Ends with status 1 if a generation takes more than 1.03 of its limit.
"""

import os
import statistics
import sys
from functools import partial

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.rules.schedules import MAX_STEPS

PROMPT = "a big red circle in the center, blue background"
ORDERS = (0, 1, 2)
THRESHOLDS = {"embedded": (0.05, 0.08, 0.12, 0.2)}
THRESHOLDS.update(dict.fromkeys(("deep", "large", "wide"), (0.35, 0.5)), widest=(0.6, 0.8))
FLUX = {"num_layers": 19, "num_single_layers": 38}
CHANGES = {
    "embedded": {},
    "deep": {**FLUX, "num_attention_heads": 2},
    "large": FLUX,
    "wide": {**FLUX, "num_attention_heads": 8},
    "widest": {
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
    },
}
SIDES = {"embedded": 64, "deep": 64, "large": 128, "wide": 128, "widest": 128}
"""Pixels of a picture."""

LONGEST = 1.03

FULL, FIRST = "full step", "first block"
"""The loops that the limit is made of."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "overhead", description=__doc__)
    parser.add_argument(
        "--transformers", nargs="+", default=list(THRESHOLDS), choices=THRESHOLDS, metavar="NAME", help="which"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50], metavar="N", help="of a generation")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="turns")
    add_save_path(parser.add_argument, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        for steps in args.steps:
            check_range("steps", steps, 5, MAX_STEPS)
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def transformer_of(config, trained=None, **changes):
    """A FluxTransformer2DModel of a config with changes: randomly initialised, or with a trained one's weights."""
    from mindone.diffusers import FluxTransformer2DModel

    import mindspore as ms

    transformer = FluxTransformer2DModel.from_config({**config, **changes})
    if trained is not None:
        weights = trained.parameters_dict()
        for parameter in transformer.get_parameters():
            parameter.set_data(ms.Tensor(weights[parameter.name].asnumpy()))
    return transformer


def with_transformer(pipe, transformer):
    """A pipeline with another transformer."""
    from FBCache_ms import FluxPipeline

    other = FluxPipeline(**{**pipe.components, "transformer": transformer})
    other.set_progress_bar_config(disable=True)
    return other


def pipelines(names):
    """{transformer's name: (pipeline, pipeline with its first block alone)}, and a prompt's embeddings.

    The pipelines' default size is the transformer's.
    """
    from FBCache_ms import FluxPipeline
    from FBCache_ms.runtime.checkpoint import TINY_FLUX

    pipe = FluxPipeline.from_pretrained(str(TINY_FLUX))
    pipe.set_progress_bar_config(disable=True)
    prompt = pipe.encode_prompt(PROMPT, max_sequence_length=pipe.tokenizer_2.model_max_length)[:2]
    pairs = {}
    for name in names:
        transformer = pipe.transformer
        if CHANGES[name]:
            transformer = transformer_of(transformer.config, **CHANGES[name])
        first = transformer_of(transformer.config, transformer, num_layers=1, num_single_layers=0)
        pairs[name] = with_transformer(pipe, transformer), with_transformer(pipe, first)
        for each in pairs[name]:
            each.default_sample_size = SIDES[name] // each.vae_scale_factor
    return pairs, prompt


def denoise(pipe, prompt, config, steps):
    """The seconds of a generation's denoise loop, and how many steps it computed."""
    import numpy as np

    pipe(
        prompt_embeds=prompt[0],
        pooled_prompt_embeds=prompt[1],
        num_inference_steps=steps,
        generator=np.random.default_rng(0),
        output_type="latent",
        cache_config=config,
    )
    return pipe.seconds["denoise"], len(pipe.cache_stats.computed_steps)


def loops_of(pair, thresholds):
    """{name: function of a prompt and a number of steps} of all that is run in turn, on a pair of pipelines.

    A cached generation's name is its order and its threshold, None for the one that computes every step and 1 for the
    one that computes the first alone.
    """
    whole, first = pair
    uncached = CacheConfig.named(UNCACHED)
    loops = {FULL: partial(denoise, whole, config=uncached), FIRST: partial(denoise, first, config=uncached)}
    for order in ORDERS:
        configs = {threshold: CacheConfig(threshold, order) for threshold in (*thresholds, 1)}
        configs[None] = CacheConfig(taylorseer_derivative=order, warmup_steps=MAX_STEPS)
        loops.update({(order, key): partial(denoise, whole, config=config) for key, config in configs.items()})
    return loops


def measure(loops, prompt, steps, runs):
    """{name: (seconds of each run, computed steps)} of the loops, all run in turn after a first time."""
    computed = {name: loop(prompt=prompt, steps=steps)[1] for name, loop in loops.items()}
    seconds = {name: [] for name in loops}
    for _ in range(runs):
        for name, loop in loops.items():
            seconds[name].append(loop(prompt=prompt, steps=steps)[0])
    return {name: (seconds[name], computed[name]) for name in loops}


def limits(measured, steps, computed):
    """The least that a generation may take, in each run: seconds."""
    return [
        (computed * full + (steps - computed) * first) / steps
        for full, first in zip(measured[FULL][0], measured[FIRST][0])
    ]


def ratios(values, others):
    """One list over another."""
    return [value / other for value, other in zip(values, others)]


def generations(transformer, steps, measured):
    """The figures of each cached generation with a threshold of its own."""
    figures = []
    for (order, threshold), (seconds, computed) in cached(measured).items():
        if threshold not in (None, 1):
            limit = limits(measured, steps, computed)
            figures.append(
                {
                    "transformer": transformer,
                    "steps": steps,
                    "order": order,
                    "threshold": threshold,
                    "computed_steps": computed,
                    "seconds": seconds,
                    "limits": limit,
                    "ratios": ratios(seconds, limit),
                }
            )
    return figures


def parts(transformer, steps, measured):
    """The seconds of a computed and of a reused step in the cached loop, and of what each has to run."""
    full, first = ([total / steps for total in measured[name][0]] for name in (FULL, FIRST))
    figures = []
    for order in ORDERS:
        computed = [total / steps for total in measured[order, None][0]]
        # All but the first step are reused.
        reused = [(total - one) / (steps - 1) for total, one in zip(measured[order, 1][0], computed)]
        figures.append(
            {
                "transformer": transformer,
                "steps": steps,
                "order": order,
                "full": full,
                "computed": computed,
                "first": first,
                "reused": reused,
            }
        )
    return figures


def cached(measured):
    """The part of what was measured that has an order and a threshold."""
    return {name: figures for name, figures in measured.items() if isinstance(name, tuple)}


def generation_row(figures):
    """A row of the first table."""
    return {
        "Transformer": figures["transformer"],
        "Order": figures["order"],
        "Threshold": figures["threshold"],
        "Computed": f"{figures['computed_steps']} of {figures['steps']}",
        "Time (s)": spread(figures["seconds"]),
        "Limit (s)": spread(figures["limits"]),
        "Over the Limit": spread(figures["ratios"]),
    }


def part_row(figures):
    """A row of the second table."""

    def milliseconds(name):
        return f"{1000 * statistics.median(figures[name]):.2f}"

    return {
        "Transformer": figures["transformer"],
        "Steps": figures["steps"],
        "Order": figures["order"],
        "Step without Cache (ms)": milliseconds("full"),
        "Computed Step (ms)": milliseconds("computed"),
        "Ratio": spread(ratios(figures["computed"], figures["full"])),
        "First Block Alone (ms)": milliseconds("first"),
        "Reused Step (ms)": milliseconds("reused"),
        "Its Ratio": spread(ratios(figures["reused"], figures["first"])),
    }


def main(argv=None):
    """The program; returns its exit status, 1 where a generation takes too long."""
    args = parse_arguments(argv)
    # Weights that are in no graph, as those of the text stream's end, are an error each to MindSpore's log.
    os.environ.setdefault("GLOG_v", "4")
    over = []

    def work():
        from tqdm import tqdm

        pairs, prompt = pipelines(args.transformers)
        whole, divided = [], []
        cases = [(name, pair, steps) for name, pair in pairs.items() for steps in args.steps]
        for name, pair, steps in tqdm(cases, desc="transformers and steps"):
            measured = measure(loops_of(pair, THRESHOLDS[name]), prompt, steps, args.runs)
            whole += generations(name, steps, measured)
            divided += parts(name, steps, measured)
        rows = list(map(generation_row, whole))
        text = f"{markdown(rows)}\n{markdown(list(map(part_row, divided)))}"
        data = {"settings": {**machine(), "runs": args.runs}, "generations": whole, "steps": divided}
        publish(args.save_path, "overhead", text, rows, data, args.into)
        over.extend(figures for figures in whole if statistics.median(figures["ratios"]) > LONGEST)

    return exit_status("overhead", work) or int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
