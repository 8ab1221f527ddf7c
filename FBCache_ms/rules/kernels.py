"""Where a device's kernels stand in for the rules' arithmetic: each gives what arithmetic.py would, or None.

None here; runtime code for a device, such as runtime/cpu/stand_ins.py, puts its own in these places.
"""


def relative_difference(reference, probe, batch_reduction):
    """arithmetic.relative_difference."""
    return None


def decision(tallies, limits, step, first, difference, score, trace):
    """Gate.decided of one rule, whose limits begin in row ``first``: the decision, and tallies and trace with it."""
    return None


def euler_step(latents, velocity, strides, step):
    """loop.euler_step."""
    return None


def finite_differences(value, derivatives, filled, gaps):
    """arithmetic.finite_differences."""
    return None


def weighted_sum(weights, derivatives):
    """arithmetic.weighted_sum."""
    return None
