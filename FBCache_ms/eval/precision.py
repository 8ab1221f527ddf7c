"""Shows what bfloat16 does to decisions and forecasts: emulated in NumPy on the streams of the model in float32."""

import statistics
import sys
from dataclasses import dataclass
from math import factorial
from typing import Callable

import numpy as np

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_drawing_options,
    add_into_option,
    check_cache,
    check_model_and_size,
    check_range,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.closed_loop import last_residuals, to_numpy
from FBCache_ms.eval.shared.drawing import session
from FBCache_ms.eval.shared.files import check_folder, check_into, put_into, say_written
from FBCache_ms.eval.shared.prompts import choose_prompts
from FBCache_ms.eval.shared.tables import KINDS, markdown, show, write_tables

THRESHOLDS = np.geomspace(0.05, 0.5, 1000)
NEAR = (0.004, 0.01)
"""Shares of a threshold: how near the difference lies to it."""

BLOCK = 2**24
"""How many numbers are worked on at a time."""

ORDERS, APART, DISTANCES = (0, 1, 2, 3), (1, 3), (1, 2, 4)
"""Orders of the forecast, steps between the computed steps, and from the newest of them to the forecast."""


def exact(values):
    """Values as they are."""
    return values


def bfloat16(values):
    """Each value's nearest bfloat16, ties to even, as float32; what is no number stays none."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    # Python's own numbers would make an int64 of a single value.
    last_kept = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + last_kept) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), rounded)


def mean(values, rounded):
    """The mean over the last axis, its sum kept in the values' own dtype and the result rounded, as torch's is."""
    return rounded(values.mean(-1))


def mean_in_pairs(values, rounded):
    """The mean whose partial sums are rounded too, each of two halves."""
    count = values.shape[-1]
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
        values = rounded(values[..., ::2] + values[..., 1::2])
    return rounded(values[..., 0] / np.float32(count))


def mean_in_turn(values, rounded):
    """The mean whose sum is rounded after every term."""
    total = np.zeros(values.shape[:-1], np.float32)
    for term in np.moveaxis(values, -1, 0):
        total = rounded(total + term)
    return rounded(total / np.float32(values.shape[-1]))


@dataclass(frozen=True)
class Arithmetic:
    """What a cache computes with.

    Args:
        rounded: what becomes of the result of every operation.
        kept: what becomes of the differences while they are stored.
        mean: the mean of a tensor's magnitudes.
    """

    rounded: Callable = exact
    kept: Callable = exact
    mean: Callable = mean

    def relative_difference(self, reference, probe):
        """d = mean|r* - r| / mean|r*| over the last axis (rules.relative_difference)."""
        change, size = np.abs(self.rounded(reference - probe)), np.abs(reference)
        return self.rounded(self.mean(change, self.rounded) / self.mean(size, self.rounded))

    def finite_differences(self, values, apart):
        """The differences, order 0 first, from values at as many computed steps, oldest first, so many steps apart."""
        older = []
        for value in values:
            orders = [value]
            for previous in older:
                orders.append(self.rounded(self.rounded(orders[-1] - previous) / np.float32(apart)))
            older = [self.kept(order) for order in orders]
        return older

    def forecast(self, derivatives, k):
        """TaylorSeer's sum of D_i k^i / i!, in the order of ParaAttention's and cache-dit's operations."""
        total = np.float32(0)
        for order, derivative in enumerate(derivatives):
            term = self.rounded(derivative * np.float32(1 / factorial(order)))
            total = self.rounded(total + self.rounded(term * np.float32(k**order)))
        return total


FLOAT32 = Arithmetic()
AS_BUILT = Arithmetic(kept=bfloat16)
AS_PEERS = Arithmetic(bfloat16, bfloat16)
IN_PAIRS, IN_TURN = Arithmetic(bfloat16, bfloat16, mean_in_pairs), Arithmetic(bfloat16, bfloat16, mean_in_turn)


@dataclass(frozen=True)
class Streams:
    """The image stream of an uncached run at every step, (N, S D) of float32 each.

    Args:
        embedded: before the first block.
        probed: behind the first block.
        final: behind the last one.
    """

    embedded: np.ndarray
    probed: np.ndarray
    final: np.ndarray

    def changes(self, rounded):
        """What the first block adds, and what the others add, of a model whose results are so rounded."""
        embedded, probed, final = map(rounded, (self.embedded, self.probed, self.final))
        return rounded(probed - embedded), rounded(final - probed)


def record(painter, index, prompt):
    """The Streams of prompt number ``index``, the prompt's own under true guidance.

    They are read from the cache while every step is computed.
    """
    kept = {}
    for probe in ("residual", "hidden"):
        steps = []

        def read(pipe, step, timestep, tensors):
            context = pipe.cache_context
            first = to_numpy(context.first_residual).reshape(context.branches, -1)[0]
            steps.append((np.array(first), last_residuals(context)[0].ravel()))
            return {}

        painter.pipe(
            **{**painter.arguments(index, prompt, painter.args.num_inference_steps), "output_type": "latent"},
            cache_config=CacheConfig(0, probe=probe),
            callback_on_step_end=read,
        )
        kept[probe], span = map(np.stack, zip(*steps))
    return Streams(kept["hidden"] - kept["residual"], kept["hidden"], kept["hidden"] + span)


def all_differences(probes, arithmetic):
    """d of every step's probe against every earlier one's: (N, N), [earlier, later]."""
    table = np.full((len(probes), len(probes)), np.nan)
    earlier, later = np.triu_indices(len(probes), 1)
    rows = max(BLOCK // probes.shape[1], 1)
    for start in range(0, len(earlier), rows):
        pair = earlier[start : start + rows], later[start : start + rows]
        table[pair] = arithmetic.relative_difference(*(probes[step] for step in pair))
    return table


def decisions(differences, thresholds=THRESHOLDS):
    """Which steps First-Block Cache reuses at each threshold: (thresholds, N) of bool, from all_differences."""
    reference, reused = np.zeros(len(thresholds), int), [np.zeros(len(thresholds), bool)]
    for step in range(1, len(differences)):
        reused.append(differences[reference, step] < thresholds)
        reference = np.where(reused[-1], reference, step)
    return np.stack(reused, 1)


def compare_decisions(name, truth, other):
    """A row: how far two arithmetics' differences, a list of tables each, and the decisions from them lie apart."""
    truth, other = np.stack(truth), np.stack(other)
    compared = (truth >= THRESHOLDS[0]) & (truth <= THRESHOLDS[-1])
    errors = np.abs(other[compared] / truth[compared] - 1)
    pairs = [(decisions(a), decisions(b)) for a, b in zip(truth, other)]
    flipped = np.stack([a != b for a, b in pairs])
    # A threshold between the two differences decides otherwise; those at most ``near`` from the true one are equally
    # likely.
    flips = {near: float(np.minimum(errors, near).mean() / (2 * near)) for near in NEAR}
    return {
        "rounded": name,
        "mean_error": float(errors.mean()),
        "largest_error": float(errors.max()),
        **{f"flips_within_{near:.1%}": share for near, share in flips.items()},
        "decisions_flipped": float(flipped[:, :, 1:].mean()),
        "runs_changed": float(flipped.any(2).mean()),
        "computed_steps": float(np.mean([(~b).sum(1).mean() for _, b in pairs])),
    }


def decision_rows(probes, rounded_probes):
    """The decisions' table, from each prompt's probes in float32 and in bfloat16."""

    def tables(probes, arithmetic):
        return [all_differences(each, arithmetic) for each in probes]

    true = tables([each.astype(np.float64) for each in rounded_probes], FLOAT32)
    built = tables(rounded_probes, FLOAT32)
    return [
        compare_decisions("the model's streams alone, the cache in float32", tables(probes, FLOAT32), built),
        compare_decisions("as built: float32 differences and means", true, built),
        compare_decisions("every result, as in ParaAttention and cache-dit", true, tables(rounded_probes, AS_PEERS)),
        compare_decisions("every partial sum too, in pairs", true, tables(rounded_probes, IN_PAIRS)),
        compare_decisions("every partial sum too, one term after another", true, tables(rounded_probes, IN_TURN)),
    ]


def relative_l1(truth, value):
    """mean|x* - x| / mean|x*|."""
    return float(np.abs(truth - value).mean() / np.abs(truth).mean())


def forecast_rows(residuals, rounded_residuals):
    """The forecasts' table, from each prompt's residuals of the span in float32 and in bfloat16."""
    arithmetics = {
        "float32": (FLOAT32, residuals),
        "as_built": (AS_BUILT, rounded_residuals),
        "float32_differences": (FLOAT32, rounded_residuals),
        "as_peers": (AS_PEERS, rounded_residuals),
    }
    rows = []
    for apart in APART:
        errors = {}
        for prompt, true in enumerate(residuals):
            for newest in range(max(ORDERS) * apart, len(true) - max(DISTANCES)):
                computed = slice(newest - max(ORDERS) * apart, newest + 1, apart)
                kept = {
                    name: arithmetic.finite_differences(values[prompt][computed], apart)
                    for name, (arithmetic, values) in arithmetics.items()
                }
                for order in ORDERS:
                    for k in DISTANCES:
                        forecasts = {
                            name: arithmetic.forecast(kept[name][: order + 1], k)
                            for name, (arithmetic, _) in arithmetics.items()
                        }
                        for name, forecast in forecasts.items():
                            # The stream that it is added to is bfloat16.
                            forecast = forecast if name == "float32" else bfloat16(forecast)
                            found = errors.setdefault((order, k, name), ([], []))
                            found[0].append(relative_l1(forecasts["float32"], forecast))
                            found[1].append(relative_l1(true[newest + k], forecast))
        for order in ORDERS:
            for k in DISTANCES:
                row = {"apart": apart, "order": order, "distance": k}
                for name in arithmetics:
                    against = map(statistics.fmean, errors[order, k, name])
                    row[f"{name}_against_float32"], row[f"{name}_against_residual"] = against
                rows.append(row)
    return rows


def decisions_text(rows):
    """The decisions' table."""
    names = {
        "mean_error": "Mean Error of d",
        "largest_error": "Largest",
        **{f"flips_within_{near:.1%}": f"Flips, Threshold within {near:.1%}" for near in NEAR},
        "decisions_flipped": "Decisions Flipped",
        "runs_changed": "Runs Changed",
    }
    return markdown(
        [
            {
                "Rounded to bfloat16": row["rounded"],
                **{column: f"{row[name]:.2%}" for name, column in names.items()},
                "Computed Steps": f"{row['computed_steps']:.2f}",
            }
            for row in rows
        ]
    )


def forecasts_text(rows):
    """The forecasts' table."""
    names = {
        "float32_against_residual": "Float32 against the Residual",
        "as_built_against_residual": "As Built against the Residual",
        "as_peers_against_residual": "As ParaAttention against the Residual",
        "as_built_against_float32": "As Built against Float32",
        "float32_differences_against_float32": "Float32 Differences against Float32",
        "as_peers_against_float32": "As ParaAttention against Float32",
    }
    return markdown(
        [
            {
                "Steps Apart": row["apart"],
                "Order": row["order"],
                "Distance": row["distance"],
                **{column: f"{row[name]:.2%}" for name, column in names.items()},
            }
            for row in rows
        ]
    )


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "precision", description=__doc__)
    add_drawing_options(parser, limit=10, save_path="./results/precision", context_parallel=False)
    parser.set_defaults(dtype="float32")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_model_and_size(args)
        shortest = max(ORDERS) * max(APART) + max(DISTANCES) + 1
        check_range("num_inference_steps", args.num_inference_steps, shortest)
        check_cache(CacheConfig(), args.ckpt, args.num_inference_steps)
        args.prompts = choose_prompts(args)
        check_into(args.into)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        from tqdm import tqdm

        with session(args) as (painter, _):
            prompts = tqdm(list(enumerate(args.prompts)), desc="streams")
            streams = [record(painter, index, prompt) for index, prompt in prompts]
            probes, residuals = zip(*(each.changes(exact) for each in streams))
            rounded_probes, rounded_residuals = zip(*(each.changes(bfloat16) for each in streams))
            decided, forecast = decision_rows(probes, rounded_probes), forecast_rows(residuals, rounded_residuals)
            settings = {**painter.common, "steps": args.num_inference_steps, "prompts": args.prompts}
            texts = decisions_text(decided), forecasts_text(forecast)
            for name, text, rows in zip(("decisions", "forecasts"), texts, (decided, forecast)):
                write_tables(args.save_path, name, text, rows, {"settings": settings, "rows": rows})
            put_into(args.into, "\n".join(texts))
            show("\n".join(texts))
            say_written(args.save_path, *(f"{name}.{kind}" for name in ("decisions", "forecasts") for kind in KINDS))

    return exit_status("precision", work)


if __name__ == "__main__":
    sys.exit(main())
