"""The caching rules, each in one short function: when a step may be reused, and what is added for it.

Steps are told apart by a coordinate x, which is the step's number or its noise level. ``nodes`` are the coordinates of
the last computed steps, newest first; k = x - nodes[0] is the distance from the newest.
"""

import mindspore as ms
from mindspore import mint, ops

# When: the score of a step, from the relative difference d of its probe, the sum kept since the last computed step and
# TeaCache's polynomial. The step may be reused while the score is strictly below the threshold, so that one which is
# not a number computes. REFERENCES tells what the probe is compared with: the last computed step's, the one before, or
# what the computed steps' probes forecast.


def fbcache(difference, accumulated, coefficients):
    """d against the last computed step's probe (ParaAttention 0.3.38, first_block_cache; cache-dit 1.5.3, DBCache)."""
    return difference


def cg_taylor(difference, accumulated, coefficients):
    """d against the probe's own forecast from the computed steps (CG-Taylor, arXiv 2508.02240)."""
    return difference


def dicache(difference, accumulated, coefficients):
    """The sum of d against the step before (DiCache, arXiv 2508.17356)."""
    return accumulated + difference


def teacache(difference, accumulated, coefficients):
    """The sum of p(d), d against the step before, coefficients of p with the highest power first (TeaCache4FLUX)."""
    rescaled = ops.zeros_like(difference)
    for coefficient in coefficients:
        rescaled = rescaled * difference + coefficient
    return accumulated + rescaled


SCORES = {"fbcache": fbcache, "cg_taylor": cg_taylor, "dicache": dicache, "teacache": teacache}
REFERENCES = {"fbcache": "computed", "cg_taylor": "forecast", "dicache": "previous", "teacache": "previous"}
PROBES = {"teacache": "modulated"}
"""Rules that look at something of their own; the others look at what the configuration says."""


def within_limits(tallies, limits):
    """Whether fewer than M steps were reused, fewer than MC in a row, and the compared differences sum up to less.

    Both are (3,). The order of all tests (cache-dit 1.5.3, can_cache): what schedules.row says, which gates.knobs puts
    into the limits, then these, then the score.
    """
    return (tallies < limits).all()


def relative_difference(reference, probe, batch_reduction="mean"):
    """d = mean|r* - r| / mean|r*| in float32: over everything, or the largest of each sample's own.

    The old tensor is in the denominator (ParaAttention 0.3.38, are_two_tensors_similar). Both are (B, S, D).
    """
    reference, probe = reference.astype(ms.float32), probe.astype(ms.float32)
    change, size = mint.abs(reference - probe), mint.abs(reference)
    if batch_reduction == "max":
        each = change.mean((1, 2)) / size.mean((1, 2))
        # A maximum may pass over what is no number; a sum of what is never negative does not.
        return ops.where(ops.isfinite(each.sum()), each.max(), each.sum())
    return change.mean() / size.mean()


# What: the update D'_0 = Y, D'_{i+1} = (D'_i - D_i) / gap_i on a computed step, and the forecast sum_i w_i D_i on a
# reused one. A gap or a weight is a scalar for each order.


def finite_differences(value, derivatives, filled, gaps):
    """The differences at a computed step, (K, ...), from those at the last one; zero above the valid orders.

    Args:
        value: Y, a tensor of any shape.
        derivatives: (K, ...), order 0 first.
        filled: how many of them are valid, a scalar in [0, K].
        gaps: K - 1 scalars.
    """
    orders = (value.astype(ms.float32),)
    for order in range(derivatives.shape[0] - 1):
        difference = (orders[order] - derivatives[order].astype(ms.float32)) / gaps[order]
        orders = orders + (ops.where(order < filled, difference, 0.0),)
    return mint.stack(orders, 0).astype(derivatives.dtype)


def weighted_sum(weights, derivatives):
    """sum_i w_i D_i in float32, from (K, ...); w_0 is 1."""
    if derivatives.shape[0] == 1:
        return derivatives.reshape(derivatives.shape[1:]).astype(ms.float32)
    forecast = derivatives[0].astype(ms.float32)
    for order in range(1, derivatives.shape[0]):
        forecast = forecast + weights[order] * derivatives[order].astype(ms.float32)
    return forecast


def newest_gap(x, nodes):
    """Every order divides by the distance from the last computed step (TaylorSeer, arXiv 2503.06923, eq. 4)."""
    return (x - nodes[0],) * (len(nodes) - 1)


def true_gaps(x, nodes):
    """Divided differences: order i + 1 divides by the distance from the (i + 1)-th last computed step (Newton)."""
    return tuple(x - node for node in nodes[:-1])


def taylor(x, nodes, sigma, ratio):
    """k^i / i! (TaylorSeer, arXiv 2503.06923, eq. 2); order 0 alone is First-Block Cache's reuse."""
    weights = (ops.ones_like(x),)
    for order in range(1, len(nodes)):
        weights = weights + (weights[order - 1] * (x - nodes[0]) / order,)
    return weights


def hicache(x, nodes, sigma, ratio):
    """s^i H_i(s k) / i!, H_i the physicists' Hermite polynomials, s the contraction (HiCache, arXiv 2508.16984)."""
    contracted = sigma * (x - nodes[0])
    weights = (ops.ones_like(x), 2 * sigma * contracted)
    for order in range(2, len(nodes)):
        # H_i = 2 z H_{i-1} - 2 (i - 1) H_{i-2}, with s^i / i! multiplied in.
        recent, older = weights[order - 1], weights[order - 2]
        weights = weights + ((2 * sigma * contracted * recent - 2 * sigma * sigma * older) / order,)
    return weights[: len(nodes)]


def newton(x, nodes, sigma, ratio):
    """Products of the distances from the computed steps: exact on polynomials (Newton's interpolation)."""
    weights = (ops.ones_like(x),)
    for order in range(1, len(nodes)):
        weights = weights + (weights[order - 1] * (x - nodes[order - 1]),)
    return weights


def dicache_alignment(x, nodes, sigma, ratio):
    """1 and (g - 1) h: the older residual plus g times the newest change, h = nodes[0] - nodes[1] (DiCache)."""
    return ops.ones_like(x), (ratio - 1) * (nodes[0] - nodes[1])


def probe_ratio(probe, derivatives, gap):
    """g = clip(mean|p - p_2| / mean|p_1 - p_2|, 1, 1.5), p_1 and p_2 the last two computed steps' probes (DiCache).

    1, which reuses the newest residual as it is, where that is not a number.
    """
    newest, change = derivatives[0].astype(ms.float32), derivatives[1].astype(ms.float32) * gap
    ratio = mint.abs(probe.astype(ms.float32) - newest + change).mean() / mint.abs(change).mean()
    return ops.where(ratio > 1, ops.minimum(ratio, ops.full_like(ratio, 1.5)), 1.0)


GAPS = {"taylor": newest_gap, "hicache": newest_gap, "newton": true_gaps, "dicache": newest_gap}
WEIGHTS = {"taylor": taylor, "hicache": hicache, "newton": newton, "dicache": dicache_alignment}
