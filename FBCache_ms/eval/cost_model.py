"""Predicts how long Flux takes on a device that is not here, from published times of FLUX.1-dev on one like it."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Tuple

import numpy as np

from FBCache_ms.cache.gates import deciding, every_gate, plan, refreshed_steps, step_tables
from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.cost_chart import chart_page
from FBCache_ms.eval.shared.files import check_folder, check_into, write_text
from FBCache_ms.eval.shared.published import (
    ATLAS,
    L20,
    PLAIN,
    Fit,
    best,
    neighbours,
    predict,
    predict_rows,
    with_fusion,
)
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.models import costs_of
from FBCache_ms.predict.roofline import PYNATIVE, WHOLE_LOOP, Accelerator, Shapes, seconds, step, work_seconds
from FBCache_ms.rules.schedules import MAX_STEPS
from FBCache_ms.runtime.checkpoint import FLUX_DEV, image_unit, transformer_config
from FBCache_ms.runtime.quantize import QUANT_TYPES

SIZES, STEPS, BATCHES, ORDERS = (512, 768, 1024, 1536, 2048), (4, 14, 28, 50), (1, 2, 4, 8), (0, 1, 2, 3)
FIGURES = {
    "peak": ("peak_tflops", 1e12, "10^12 operations of matrix products a second (default: published)"),
    "bandwidth": ("bandwidth_gbs", 1e9, "10^9 bytes a second between memory and cores (default: published)"),
    "efficiency": (
        "efficiency",
        1,
        "the share of both that is reached, in (0, 1] (default: fitted to published times)",
    ),
    "launch_seconds": ("launch_us", 1e-6, "microseconds for launching an operator of a graph (default: 10)"),
    "turn_seconds": (
        "turn_ms",
        1e-3,
        "milliseconds of a turn of the host, once a run (default: fitted to published times)",
    ),
}
"""An Accelerator's fields that the user can set: the option, its unit, what it is."""


@dataclass(frozen=True)
class Run:
    """What the user asks about.

    Args:
        shapes: the Shapes.
        unit: pixels of an image token's side.
        config: the CacheConfig.
        steps: N.
        computed: how many of them each gate computes.
    """

    shapes: Shapes
    unit: int
    config: CacheConfig
    steps: int
    computed: Tuple[int, ...]


def known_steps(config, steps):
    """For each gate the least and the most steps that it can compute; equal where its schedule says all."""
    limits, known = step_tables(config, steps, np.linspace(1, 0, steps + 1))[0], []
    for gate, rows in zip(every_gate(plan(config)), limits):
        least = int((rows[:steps, 0] == -np.inf).sum()) - refreshed_steps(config, steps)
        if gate.decides:
            known.append((least, steps if gate.rules else least))
    return known


def computed_steps(config, steps, given=None):
    """How many steps each gate computes, from its schedule or as given.

    Raises ValueError where the schedule alone does not say, or does not allow what is given.
    """
    known = known_steps(config, steps)
    if given is None:
        if any(least < most for least, most in known):
            raise ValueError(f"{config} decides while it runs: give --computed_steps, {len(known)} in all, one a gate")
        return tuple(least for least, _ in known)
    if len(given) != len(known):
        raise ValueError(f"--computed_steps must be {len(known)} for {config}, one a gate, not {len(given)}")
    for count, (least, most) in zip(given, known):
        check_range("computed_steps", count, least, most)
    return tuple(given)


def scaled_steps(run, steps):
    """How many of another number of steps each gate computes: what its schedule says, else the same share."""
    shares = (round(count * steps / run.steps) for count in run.computed)
    return tuple(min(max(count, low), high) for count, (low, high) in zip(shares, known_steps(run.config, steps)))


def names_of(config):
    """The names of all gates: those that reuse at a step that every gate reuses."""
    return tuple(gate.name for gate in deciding(plan(config)))


def growth(device, fused, run):
    """Predictions for ours where the picture, the steps, the batch and the order grow, a dictionary each.

    ``fused`` is the device as with_fusion has it, for the uncached run in "predicted_uncached_fused".
    """
    rows = []

    def add(grows, value, shapes=run.shapes, config=run.config, steps=run.steps):
        computed, reused = scaled_steps(run, steps), names_of(config)
        rows.append(
            {
                "grows": grows,
                "value": value,
                "config": str(config),
                "image_tokens": shapes.image_tokens,
                "batch": shapes.batch,
                "steps": steps,
                "computed_steps": "/".join(map(str, computed or (steps,))),
                "predicted_computed_step": seconds(device, WHOLE_LOOP, step(shapes, config, WHOLE_LOOP)),
                "predicted_reused_step": seconds(device, WHOLE_LOOP, step(shapes, config, WHOLE_LOOP, reused)),
                "predicted_uncached": predict(device, WHOLE_LOOP, PLAIN, steps, (), shapes),
                "predicted_uncached_fused": predict(fused, WHOLE_LOOP, PLAIN, steps, (), shapes),
                "predicted_cached": predict(device, WHOLE_LOOP, config, steps, computed, shapes),
            }
        )

    for size in SIZES:
        add("image size", size, replace(run.shapes, image_tokens=(size // run.unit) ** 2))
    for steps in STEPS if run.config.steps_computation_mask is None else (run.steps,):
        add("steps", steps, steps=steps)
    for batch in BATCHES:
        add("batch", batch, replace(run.shapes, batch=batch))
    for order in ORDERS:
        try:
            config = run.config.changed(taylorseer_derivative=order)
        except ValueError:
            # A forecast that the user chose may not come in every order.
            continue
        add("order", order, config=config)
    return rows


def changes(published, fit, fused):
    """Predicted seconds of the published rows from the published design to ours and further, {change: seconds}."""
    loop = replace(published.design, whole_loop=True)
    designs = {
        "as published, a graph a step": (fit, published.design),
        "the whole loop as one graph, one turn of the host": (fit, loop),
        "text, guidance and rotary tables embedded once": (fit, replace(loop, hoisted=True)),
        "on a reuse no text stream that only skipped blocks need": (fit, replace(loop, hoisted=True, lean=True)),
        "decision and forecast in float32: ours": (fit, WHOLE_LOOP),
        "ours, if the host still had a turn at each step": (fit, replace(WHOLE_LOOP, whole_loop=False)),
        "ours, if graphs fuse operators": (fused, WHOLE_LOOP),
    }
    return {change: predict_rows(published, fit, of.device, design) for change, (of, design) in designs.items()}


def parts(device, run):
    """Predicted seconds of ours by part, {part: (of a computed step, of a reused one)}."""
    found = {}
    for place, reused in enumerate(((), names_of(run.config))):
        for work in step(run.shapes, run.config, WHOLE_LOOP, reused):
            found.setdefault(work.part, [0.0, 0.0])[place] += work_seconds(device, WHOLE_LOOP, work)
    return {part: tuple(pair) for part, pair in found.items()}


@dataclass(frozen=True)
class Prediction:
    """All that the program shows.

    Args:
        run: the Run.
        fit, fused, check: the best Fit of ATLAS, that with_fusion, and the best one of L20.
        device, fused_device: the Accelerators that the run is predicted on, without and with fused operators.
        changes, parts, growth: as the functions of these names give them.
    """

    run: Run
    fit: Fit
    fused: Fit
    check: Fit
    device: Accelerator
    fused_device: Accelerator
    changes: dict
    parts: dict
    growth: list


def prediction_of(run, figures):
    """The Prediction of a run on the device of ATLAS, some of whose figures the user may have set."""
    fit, fused = best(ATLAS), with_fusion(ATLAS)
    device, fused_device = (replace(each.device, **figures) for each in (fit, fused))
    return Prediction(
        run,
        fit,
        fused,
        best(L20),
        device,
        fused_device,
        changes(ATLAS, fit, fused),
        parts(device, run),
        growth(device, fused_device, run),
    )


def described(device):
    """An Accelerator's figures in words."""
    return (
        f"{device.name}, {device.efficiency:.0%} of {device.peak / 1e12:.1f} TFLOPS and of "
        f"{device.bandwidth / 1e9:.0f} GB/s, {1000 * device.turn_seconds:.1f} ms for a turn of the host"
    )


def published_table(published, fit):
    """Published and predicted seconds, a dictionary a row."""
    rows = [("no cache", published.uncached, fit.predicted[0], "0")]
    if published.pynative is not None:
        rows.insert(0, ("PyNative", published.pynative, predict(fit.device, PYNATIVE, PLAIN, published.steps), "0"))
    for (threshold, measured), predicted, hits in zip(published.cached, fit.predicted[1:], fit.reused):
        rows.append((f"FBCache({threshold:g})", measured, predicted, str(hits)))
    return [
        {
            "Device": published.device.name,
            "Configuration": name,
            "Published (s)": f"{measured:.2f}",
            "Predicted (s)": f"{predicted:.2f}",
            "Error": "fitted" if name == "PyNative" else f"{predicted / measured - 1:+.1%}",
            "Predicted Reuses": f"{hits} of {published.steps}",
        }
        for name, measured, predicted, hits in rows
    ]


def neighbours_table(published, fit):
    """What other decisions would imply, a dictionary a row."""
    return [
        {
            **{f"Reuses at {at:g}": hits for (at, _), hits in zip(published.cached, other.reused)},
            "Largest Error": f"{other.error:.1%}",
            "Efficiency": f"{other.device.efficiency:.0%}",
            "Host's Turn (ms)": f"{1000 * other.device.turn_seconds:.1f}",
            "Ours, Predicted (s)": " and ".join(
                f"{value:.2f}" for value in predict_rows(published, other, other.device, WHOLE_LOOP)[1:]
            ),
        }
        for other in neighbours(published, fit)
    ]


def changes_table(published, rows):
    """The changes, a dictionary a row."""
    names = ["No Cache", *(f"FBCache({threshold:g})" for threshold, _ in published.cached)]
    return [
        {"Design": change, **{f"{name}, Predicted (s)": f"{value:.3f}" for name, value in zip(names, times)}}
        for change, times in rows.items()
    ]


def parts_table(rows):
    """Where a step's time goes, a dictionary a row."""
    whole = tuple(map(sum, zip(*rows.values())))
    return [
        {
            "Part": part,
            "Computed Step, Predicted (ms)": f"{1000 * computed:.2f}",
            "Reused Step, Predicted (ms)": f"{1000 * reused:.2f}",
        }
        for part, (computed, reused) in {**rows, "all": whole}.items()
    ]


def growth_table(rows):
    """What grows, a dictionary a row."""
    return [
        {
            "Grows": row["grows"],
            "To": row["value"],
            "Computed": f"{row['computed_steps']} of {row['steps']}",
            "Computed Step, Predicted (s)": f"{row['predicted_computed_step']:.4f}",
            "Reused Step, Predicted (s)": f"{row['predicted_reused_step']:.4f}",
            "No Cache, Predicted (s)": f"{row['predicted_uncached']:.2f}",
            "No Cache, Fused, Predicted (s)": f"{row['predicted_uncached_fused']:.2f}",
            "Cached, Predicted (s)": f"{row['predicted_cached']:.2f}",
        }
        for row in rows
    ]


def text_of(prediction):
    """Every table under a line that says what it shows, in Markdown."""
    fit, fused, run = prediction.fit, prediction.fused, prediction.run
    launch, saved = 1e6 * fit.device.dispatch_seconds, fused.device.fused
    shapes = f"{run.config}, {run.shapes.image_tokens} image tokens, batch {run.shapes.batch}"
    sections = (
        f"Predicted and published times of FLUX.1-dev, 1024x1024, {ATLAS.steps} steps. Fitted devices: "
        f"{described(fit.device)}; {described(prediction.check.device)}.",
        published_table(ATLAS, fit) + published_table(L20, prediction.check),
        f"PyNative's time is predicted either if launching an operator from Python takes {launch:.0f} microseconds, "
        f"or, if launching costs nothing, if graphs fuse operators so that {saved:.0%} fewer bytes move outside of "
        "products and attention. The published times do not tell which; the decisions are the same. Predicted "
        f"decisions of the {ATLAS.device.name}, with their neighbours and what ours takes at each:",
        neighbours_table(ATLAS, fit),
        "Predicted gains at the best of these decisions: from the published design to ours, in four rows that add up, "
        "and two rows that each change ours:",
        changes_table(ATLAS, prediction.changes),
        f"Predicted parts of a step of ours, {shapes}:",
        parts_table(prediction.parts),
        f"Predicted growth of ours from {shapes}, {run.steps} steps. Device: {described(prediction.device)}; with "
        f"fused operators {described(prediction.fused_device)}.",
        growth_table(prediction.growth),
    )
    return "\n".join(part + "\n" if isinstance(part, str) else markdown(part) for part in sections)


def data_of(prediction):
    """The same for programs."""
    tables = ((ATLAS, prediction.fit), (ATLAS, prediction.fused), (L20, prediction.check))
    return {
        "predicted": {
            "device": asdict(prediction.device),
            "fused_device": asdict(prediction.fused_device),
            "fits": [
                {"published": (table.uncached, *(cached for _, cached in table.cached)), **asdict(fit)}
                for table, fit in tables
            ],
            "changes": prediction.changes,
            "parts": prediction.parts,
            "growth": prediction.growth,
        }
    }


def page_of(prediction):
    """The chart's page."""
    names = ["no cache", *(f"FBCache({threshold:g})" for threshold, _ in ATLAS.cached)]
    published = ATLAS.uncached, *(cached for _, cached in ATLAS.cached)
    ours = predict_rows(ATLAS, prediction.fit, prediction.fit.device, WHOLE_LOOP)
    rows = {"published": published, "predicted": prediction.fit.predicted, "ours, predicted": ours}
    return chart_page(
        f"Predicted, not measured: {prediction.device.name}, {prediction.run.config}",
        {name: dict(zip(names, values)) for name, values in rows.items()},
        {part: reused for part, (_, reused) in prediction.parts.items() if reused},
        prediction.growth,
    )


def read_run(path):
    """What a run.json says: tag, steps, image size, number of computed steps, pictures, and whether it is int8.

    Raises OSError or ValueError, naming the file, for one that cannot be read, is none, or cannot be predicted.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        found = run["config"], run["steps"], tuple(run["image_size"]), len(run["computed_steps"]), run["pictures"]
        if [type(value) for value in (*found[:2], *found[2], found[4])] != [str, int, int, int, int]:
            raise TypeError
        quantized, branches = "transformer" in (run.get("quantize") or ()), run.get("branches", 1)
    except OSError as error:
        raise OSError(f"--run {path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"--run {path} is no run.json of fbcache-flux") from None
    if branches > 1:
        raise ValueError(f"--run {path} is of true classifier-free guidance, which is not predicted")
    return (*found, quantized)


def run_of(args):
    """The Run that the command line asks for. Raises OSError, TypeError or ValueError for one that cannot be."""
    cache, steps, size, given = args.cache, args.num_inference_steps, args.image_size, args.computed_steps
    if args.run is not None:
        if any(value is not None for value in (cache, steps, size, args.batch_size, args.quantize)):
            raise ValueError("--run says --cache, --num_inference_steps, --image_size, --batch_size and --quantize")
        cache, steps, size, computed, args.batch_size, args.quantize = read_run(args.run)
        if len(names_of(CacheConfig.named(cache))) == 1:
            if given is not None:
                raise ValueError("--run says --computed_steps too, where there is one gate")
            given = [computed]
    transformer, unit = FLUX_DEV, 16
    if args.ckpt is not None:
        transformer, unit = transformer_config(args.ckpt), image_unit(args.ckpt)
    steps, size = ATLAS.steps if steps is None else steps, size or (1024, 1024)
    check_range("num_inference_steps", steps, 1, MAX_STEPS)
    check_range("text_tokens", args.text_tokens, 1)
    batch_size = 1 if args.batch_size is None else args.batch_size
    check_range("batch_size", batch_size, 1)
    if min(size) < 1 or any(side % unit for side in size):
        raise ValueError(f"--image_size must be positive multiples of {unit}, not {' '.join(map(str, size))}")
    config = ATLAS.configs[-1] if cache is None else CacheConfig.named(cache)
    config.check_blocks(*costs_of(transformer).stacks(transformer))
    if cache is None and given is None:
        given = [max(round(steps * (1 - best(ATLAS).reused[-1] / ATLAS.steps)), 1)]
    tokens = size[0] // unit * (size[1] // unit)
    shapes = Shapes(transformer, batch_size, tokens, args.text_tokens, weight_itemsize=1 if args.quantize else None)
    return Run(shapes, unit, config, steps, computed_steps(config, steps, given))


def figures_of(args):
    """The Accelerator's fields that the command line sets. Raises ValueError for values that no device has."""
    figures = {}
    for field, (option, unit, _) in FIGURES.items():
        value = getattr(args, option)
        if value is None:
            continue
        most = 1 if field == "efficiency" else np.inf
        if not 0 <= value <= most or np.isinf(value) or value == 0 and not field.endswith("_seconds"):
            allowed = "in (0, 1]" if field == "efficiency" else "a number above 0"
            raise ValueError(
                f"--{option} must be {'0 or more' if field.endswith('_seconds') else allowed}, not {value}"
            )
        figures[field] = value * unit
    return figures


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "cost_model", description=__doc__)
    add = parser.add_argument_group("what to predict").add_argument
    add("--ckpt", type=Path, metavar="PATH", help="folder in diffusers layout (default: FLUX.1-dev's figures)")
    add("--image_size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: 1024 1024)")
    add("--text_tokens", type=int, default=512, metavar="T", help="of a prompt")
    add("--num_inference_steps", type=int, metavar="N", help=f"steps of a generation (default: {ATLAS.steps})")
    add("--batch_size", type=int, metavar="B", help="pictures at once (default: 1)")
    add("--cache", metavar="TAG|PRESET", help="what is on (default: as published)")
    add(
        "--quantize",
        choices=QUANT_TYPES,
        help="the blocks' weights are int8, a byte each; products are predicted to take as long as bfloat16's",
    )
    add(
        "--computed_steps",
        type=int,
        nargs="+",
        metavar="N",
        help="for a cache that decides while it runs, one a gate (default: what its schedule says)",
    )
    add("--run", type=Path, metavar="FILE", help="a run.json, for its cache, size, steps, pictures and decisions")
    add = parser.add_argument_group("the device").add_argument
    for option, _, text in FIGURES.values():
        add(f"--{option}", type=float, metavar="X", help=text)
    add_save_path(parser.add_argument_group("output").add_argument, "./results/cost_model", "tables and charts")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        if find_spec("plotly") is None:
            raise ValueError("cost_model needs plotly; install FBCache_ms[eval]")
        check_into(args.into)
        args.what, args.figures = run_of(args), figures_of(args)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        prediction = prediction_of(args.what, args.figures)
        text = text_of(prediction)
        write_text(args.save_path / "cost_model.html", page_of(prediction))
        data, more = data_of(prediction), ["cost_model.html"]
        publish(args.save_path, "cost_model", text, prediction.growth, data, args.into, more)

    return exit_status("cost_model", work)


if __name__ == "__main__":
    sys.exit(main())
