"""Growth: time and memory of a step against tokens, blocks, the forecast's order and the batch, fitted.

    .venv/bin/python benchmarks/growth.py

Transformers of FLUX.1's shape, a third of the blocks double, 64 wide and randomly initialised. Each point is measured
in a process of its own: from one compiled loop, in turn, three steps that are all computed, and nine of which the last
eight are reused, which gives the time of a computed and of a reused step. Memory is resident memory at its greatest,
compilation included.

Each quantity is fitted twice: as a power of what varies, n, by least squares in logarithms; and as a sum of terms that
say where it comes from, a + b n, with c n^2 where attention is in it, none below 0, by least squares of the relative
error. The table has the power, its R^2, and each term's share at the largest n.
"""

import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_into_option,
    add_save_path,
    check_range,
    exit_status,
    quiet,
    reason,
)
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread
from FBCache_ms.rules.schedules import MAX_STEPS

STEPS, REUSES, TEXT = 3, 8, 32


@dataclass(frozen=True)
class Point:
    """What is measured: image tokens, blocks (a third of them double), order of the forecast, latents a call."""

    tokens: int = 256
    blocks: int = 12
    order: int = 0
    batch: int = 1


VALUES = {
    "tokens": (64, 256, 1024, 4096),
    "blocks": (12, 24, 36, 57),
    "order": (0, 1, 2, 3),
    "batch": (1, 2, 4, 8),
}
"""What varies, one at a time; the others stay as a Point has them."""

QUANTITIES = {
    "computed": "computed step",
    "reused": "reused step",
    "cache_bytes": "cache",
    "peak_bytes": "peak memory",
}
TERMS = {
    "tokens": {
        "computed": ("calls of operators", "projections and MLP", "attention"),
        "reused": ("calls of operators", "projections and MLP", "first block's attention"),
        "cache_bytes": ("trace and settings", "each token's buffers"),
        "peak_bytes": ("program, weights, graph", "activations", "attention's scores"),
    },
    "blocks": {
        "computed": ("embedding, Euler step", "blocks"),
        "reused": ("embedding, first block, forecast", "skipped blocks"),
        "cache_bytes": ("all of the cache",),
        "peak_bytes": ("program", "weights and graph"),
    },
    "order": {
        "computed": ("blocks", "differences"),
        "reused": ("first block", "weighted sum"),
        "cache_bytes": ("reference, trace and settings", "differences"),
        "peak_bytes": ("program, weights, graph, activations", "differences"),
    },
    "batch": {
        "computed": ("calls of operators", "each latent's work"),
        "reused": ("calls of operators", "each latent's work"),
        "cache_bytes": ("trace and settings", "each latent's buffers"),
        "peak_bytes": ("program, weights, graph", "each latent's activations"),
    },
}
"""What the terms a, b n and c n^2 of each fit stand for."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "growth", description=__doc__)
    parser.add_argument("--vary", nargs="+", default=list(VALUES), choices=VALUES, metavar="WHAT", help="what varies")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs of each point")
    add_save_path(parser.add_argument, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def loop_of(point):
    """A point's FluxDenoiseLoop, and a function that gives its inputs for a CacheConfig and a range of steps."""
    import numpy as np
    from mindone.diffusers import FluxTransformer2DModel

    import mindspore as ms

    from FBCache_ms import CacheContext, FluxDenoiseLoop, prepare_device
    from FBCache_ms.cache.gates import step_tables

    ms.set_context(mode=ms.GRAPH_MODE)
    prepare_device()
    doubles = point.blocks // 3
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=doubles,
        num_single_layers=point.blocks - doubles,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    side = int(point.tokens**0.5)
    rng, ids = np.random.default_rng(0), np.indices((1, side, side)).reshape(3, -1).T
    steps = 1 + REUSES
    sigmas = np.append(np.linspace(1, 1 / steps, steps), 0)

    def tensor(value, dtype=ms.float32):
        return ms.Tensor(value, dtype)

    def normal(*shape):
        return tensor(rng.standard_normal(shape))

    fixed = (
        normal(point.batch, point.tokens, 16),
        normal(1, point.batch, TEXT, 64),
        normal(1, point.batch, 64),
        tensor(np.zeros((TEXT, 3))),
        tensor(ids),
        tensor(np.full(point.batch, 3.5)),
        tensor(1.0),
        tensor(sigmas[:-1] * 1000),
        tensor(sigmas),
        tensor(0, ms.int32),
    )

    def inputs(config, stop):
        return (*fixed, tensor(stop, ms.int32), *map(ms.Tensor, step_tables(config, steps, sigmas)))

    context = CacheContext(point.batch, point.tokens, transformer.inner_dim, point.order)
    return FluxDenoiseLoop(transformer, context), inputs


def measure(point, runs):
    """A point's figures: seconds of a computed and of a reused step in each run, and bytes."""
    quiet()
    from FBCache_ms.eval.shared.drawing import peak_bytes

    loop, inputs = loop_of(point)
    computing = CacheConfig(taylorseer_derivative=point.order, warmup_steps=MAX_STEPS)
    reusing = CacheConfig(1, point.order)

    def seconds(config, steps):
        begin = time.perf_counter()
        loop(*inputs(config, steps)).asnumpy()
        return time.perf_counter() - begin

    loop(*inputs(reusing, 2)).asnumpy()
    computed, reused = [], []
    for _ in range(runs):
        computed.append(seconds(computing, STEPS) / STEPS)
        # The first step has nothing to reuse.
        reused.append((seconds(reusing, 1 + REUSES) - computed[-1]) / REUSES)
    return {
        "computed": computed,
        "reused": reused,
        "cache_bytes": loop.cache.nbytes,
        "peak_bytes": peak_bytes("CPU"),
    }


def measure_alone(point, runs):
    """measure() in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, point, runs).result()


def power(n, values):
    """The exponent of c n^a that fits best in logarithms, and its R^2 there; 0 and 1 where nothing grows."""
    import numpy as np

    if len(set(values)) == 1:
        return 0.0, 1.0
    x, y = np.log(n), np.log(values)
    exponent, constant = np.polyfit(x, y, 1)
    left, whole = ((y - constant - exponent * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return exponent, 1 - left / whole


def terms(n, values, degree):
    """The coefficients, none below 0, of a polynomial in n with the least relative errors, lowest power first."""
    import numpy as np
    from scipy.optimize import nnls

    powers = np.vander(np.asarray(n, float), degree + 1, increasing=True)
    # Columns of one size, since n^2 is large.
    sizes = powers[-1]
    coefficients, _ = nnls(powers / sizes / np.asarray(values, float)[:, None], np.ones(len(n)))
    return coefficients / sizes


def shares(n, values, degree):
    """The share of each term at the largest n."""
    parts = [coefficient * n[-1] ** power for power, coefficient in enumerate(terms(n, values, degree))]
    return [part / sum(parts) for part in parts]


def fit_row(vary, quantity, points):
    """A row of the second table: how a quantity grows with what varies, from [(value, figures)]."""
    shift = 1 if vary == "order" else 0
    n = [value + shift for value, _ in points]
    values = [middle(figures[quantity]) for _, figures in points]
    exponent, r2 = power(n, values)
    names = TERMS[vary][quantity]
    parts = zip(shares(n, values, len(names) - 1), names)
    return {
        "Varies": "order + 1" if shift else vary,
        "Quantity": QUANTITIES[quantity],
        "Exponent": f"{exponent:.2f}",
        "R^2": f"{r2:.3f}",
        "At the Largest": ", ".join(f"{share:.0%} {name}" for share, name in parts if share >= 0.005),
    }


def middle(figure):
    """The median of runs, or the one number there is."""
    return statistics.median(figure) if isinstance(figure, list) else figure


def point_row(vary, value, figures):
    """A row of the first table."""
    return {
        "Varies": vary,
        "Value": value,
        "Computed Step (ms)": spread([1000 * seconds for seconds in figures["computed"]], 1),
        "Reused Step (ms)": spread([1000 * seconds for seconds in figures["reused"]], 1),
        "Cache (kB)": f"{figures['cache_bytes'] / 1e3:.1f}",
        "Peak Memory (MB)": f"{figures['peak_bytes'] / 1e6:.0f}",
    }


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        from tqdm import tqdm

        lines = {vary: [(value, replace(Point(), **{vary: value})) for value in VALUES[vary]] for vary in args.vary}
        points = dict.fromkeys(point for line in lines.values() for _, point in line)
        for point in tqdm(points, desc="points"):
            points[point] = measure_alone(point, args.runs)
        measured = {vary: [(value, points[point]) for value, point in line] for vary, line in lines.items()}
        rows = [point_row(vary, *each) for vary, line in measured.items() for each in line]
        fits = [fit_row(vary, quantity, line) for vary, line in measured.items() for quantity in QUANTITIES]
        data = {
            "settings": {**machine(), "runs": args.runs, "steps": STEPS, "reuses": REUSES, "text_tokens": TEXT},
            "points": [{**asdict(point), **figures} for point, figures in points.items()],
            "fits": fits,
        }
        text = f"{markdown(rows)}\n{markdown(fits)}"
        publish(args.save_path, "growth", text, rows, data, args.into)

    return exit_status("growth", work)


if __name__ == "__main__":
    sys.exit(main())
