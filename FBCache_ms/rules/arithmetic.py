"""What rules and forecasts are computed with, in float32 whatever the tensors are in."""

import mindspore as ms
from mindspore import mint, ops

from . import kernels


def within_limits(tallies, limits):
    """Whether fewer than M steps were reused, fewer than MC in a row, and the compared differences sum up to less.

    Both are (3,). The order of all conditions (cache-dit 1.5.3, can_cache): what schedules.step_actions says, which
    gates.step_tables puts into the limits, then these, then the score.
    """
    return (tallies < limits).all()


def mean(values, axes=None):
    """The mean of a tensor, or the means of a tuple of them, over everything or over some axes."""
    if isinstance(values, tuple):
        return tuple([value.mean(axes) for value in values])
    return values.mean(axes)


def relative_difference(reference, probe, batch_reduction="mean", over_ranks=None):
    """d = mean|r* - r| / mean|r*| in float32: over everything, or the largest of each sample's own.

    The old tensor is in the denominator (ParaAttention 0.3.38, are_two_tensors_similar).

    Args:
        reference, probe: r* and r, (B, S, D).
        batch_reduction: "mean" or "max".
        over_ranks: the mean of tokens that several devices share, as ``mean`` is called; None where one has all.
    """
    if over_ranks is not None:
        return difference_equations(reference, probe, batch_reduction, over_ranks)
    by_kernel = kernels.relative_difference(reference, probe, batch_reduction)
    if by_kernel is not None:
        return by_kernel
    return difference_equations(reference, probe, batch_reduction, mean)


def difference_equations(reference, probe, batch_reduction, mean):
    """relative_difference by a mean."""
    reference, probe = reference.astype(ms.float32), probe.astype(ms.float32)
    change, size = mint.abs(reference - probe), mint.abs(reference)
    if batch_reduction == "max":
        change, size = mean((change, size), (1, 2))
        each = change / size
        # A maximum may pass over what is no number; a sum of what is never negative does not.
        return ops.where(ops.isfinite(each.sum()), each.max(), each.sum())
    change, size = mean((change, size))
    return change / size


def finite_differences(value, derivatives, filled, gaps):
    """The differences at a computed step, (K, ...), from those at the last one; zero above the valid orders.

    D'_0 = Y, D'_{i+1} = (D'_i - D_i) / gap_i.

    Args:
        value: Y, a tensor of any shape.
        derivatives: (K, ...), order 0 first.
        filled: how many of them are valid, a scalar in [0, K].
        gaps: K - 1 scalars.
    """
    by_kernel = kernels.finite_differences(value, derivatives, filled, gaps)
    if by_kernel is not None:
        return by_kernel
    if derivatives.shape[0] == 1:
        return value.expand_dims(0).astype(derivatives.dtype)
    orders = (value.astype(ms.float32),)
    for order in range(derivatives.shape[0] - 1):
        difference = (orders[order] - derivatives[order].astype(ms.float32)) / gaps[order]
        orders = orders + (ops.where(order < filled, difference, 0.0),)
    return mint.stack(orders, 0).astype(derivatives.dtype)


def running_sums(value, sums, factors):
    """The sums at a computed step, (K, ...): S'_m = S_m + f_m Y in float32.

    Args:
        value: Y, a tensor of any shape.
        sums: (K, ...).
        factors: K scalars.
    """
    value, new = value.astype(ms.float32), ()
    for order in range(sums.shape[0]):
        new = new + (sums[order].astype(ms.float32) + factors[order] * value,)
    return mint.stack(new, 0).astype(sums.dtype)


def ridge_inverse(inverse, basis):
    """(X^T X + lambda I)^-1 with one more row t of X: P - P t (P t)^T / (1 + t^T P t) (Sherman and Morrison).

    Args:
        inverse: P, (K, K), symmetric.
        basis: t, (K,).
    """
    moved = ridge_weights(inverse, basis)
    return inverse - moved.expand_dims(1) * moved / (1 + (basis * moved).sum())


def ridge_weights(inverse, basis):
    """P t, (K,): what a ridge regression's value at t takes of each sum over its points."""
    return (inverse * basis).sum(1)


def last_values(value, values):
    """The last K values, newest first, (K, ...), with one more."""
    return mint.cat((value.expand_dims(0).astype(values.dtype), values[:-1]), 0)


def weighted_sum(weights, derivatives):
    """sum_i w_i D_i in float32, from (K, ...)."""
    by_kernel = kernels.weighted_sum(weights, derivatives)
    if by_kernel is not None:
        return by_kernel
    if derivatives.shape[0] == 1:
        return derivatives.reshape(derivatives.shape[1:]).astype(ms.float32)
    forecast = weights[0] * derivatives[0].astype(ms.float32)
    for order in range(1, derivatives.shape[0]):
        forecast = forecast + weights[order] * derivatives[order].astype(ms.float32)
    return forecast


def probe_ratio(probe, derivatives, gap, mean=mean):
    """g = clip(mean|p - p_2| / mean|p_1 - p_2|, 1, 1.5), p_1 and p_2 the last two computed steps' probes (DiCache).

    1, which reuses the newest residual as it is, where that is not a number.
    """
    newest, change = derivatives[0].astype(ms.float32), derivatives[1].astype(ms.float32) * gap
    now, before = mean((mint.abs(probe.astype(ms.float32) - newest + change), mint.abs(change)))
    ratio = now / before
    return ops.where(ratio > 1, ops.minimum(ratio, ops.full_like(ratio, 1.5)), 1.0)
