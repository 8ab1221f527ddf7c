"""What is added at a reused step: each forecast a declaration, sum_i w_i D_i of the differences D_i that were kept.

Steps are told apart by a coordinate x, which is the step's number or its noise level. ``nodes`` are the coordinates of
the last computed steps, newest first; k = x - nodes[0] is the distance from the newest. As in when.py, operators alone.
"""

from dataclasses import dataclass, field
from numbers import Real
from typing import Callable, Mapping, Optional

from .options import Option


@dataclass(frozen=True)
class Forecast:
    """One forecast.

    Args:
        name: as CacheConfig.forecast has it.
        source: the paper's equation, or the project's function and version.
        text: what it does, behind its name.
        weights: weights(x, nodes, number, ratio), a scalar for each order; ``number`` is its own field's, and ``ratio``
            the one of the probe's changes where it takes that.
        gaps: gaps(x, nodes), what each order of the differences is divided by at a computed step.
        options: {field of CacheConfig: Option}, at most one, a number.
        only_order: the one taylorseer_derivative that it works with, None for all.
        takes_ratio: whether the probe's changes scale it.
        in_any_coordinate: whether distances may be measured in the noise level too.
    """

    name: str
    source: str
    text: str
    weights: Callable
    gaps: Callable
    options: Mapping[str, Option] = field(default_factory=dict)
    only_order: Optional[int] = None
    takes_ratio: bool = False
    in_any_coordinate: bool = False


def newest_gap(x, nodes):
    """Every order divides by the distance from the last computed step (TaylorSeer, arXiv 2503.06923, eq. 4)."""
    return (x - nodes[0],) * (len(nodes) - 1)


def true_gaps(x, nodes):
    """Divided differences: order i + 1 divides by the distance from the (i + 1)-th last computed step (Newton)."""
    return tuple(x - node for node in nodes[:-1])


def taylor(x, nodes, number, ratio):
    """k^i / i!; order 0 alone is First-Block Cache's reuse."""
    weights = (1.0,)
    for order in range(1, len(nodes)):
        weights = weights + (weights[order - 1] * (x - nodes[0]) / order,)
    return weights


def hicache(x, nodes, sigma, ratio):
    """s^i H_i(s k) / i!, H_i the physicists' Hermite polynomials, s the contraction."""
    contracted = sigma * (x - nodes[0])
    weights = (1.0, 2 * sigma * contracted)
    for order in range(2, len(nodes)):
        # H_i = 2 z H_{i-1} - 2 (i - 1) H_{i-2}, with s^i / i! multiplied in.
        recent, older = weights[order - 1], weights[order - 2]
        weights = weights + ((2 * sigma * contracted * recent - 2 * sigma * sigma * older) / order,)
    return weights[: len(nodes)]


def newton(x, nodes, number, ratio):
    """Products of the distances from the computed steps: exact on polynomials."""
    weights = (1.0,)
    for order in range(1, len(nodes)):
        weights = weights + (weights[order - 1] * (x - nodes[order - 1]),)
    return weights


def dicache(x, nodes, number, ratio):
    """1 and (g - 1) h: the older residual plus g times the newest change, h = nodes[0] - nodes[1], g the ratio."""
    return 1.0, (ratio - 1) * (nodes[0] - nodes[1])


TAYLOR = Forecast(
    "taylor",
    "TaylorSeer, arXiv 2503.06923, eq. 2 and 4",
    "TaylorSeer's k^i/i!",
    taylor,
    newest_gap,
    in_any_coordinate=True,
)
HICACHE = Forecast(
    "hicache",
    "HiCache, arXiv 2508.16984",
    "HiCache's Hermite polynomials",
    hicache,
    newest_gap,
    options={
        "hicache_sigma": Option(
            0.5,
            Real,
            (0, 1),
            "forecast",
            "HiCache's contraction; 0.3 for schnell (HiCache, arXiv 2508.16984)",
        )
    },
)
NEWTON = Forecast(
    "newton",
    "Newton's interpolation",
    "Newton's, with the true gaps",
    newton,
    true_gaps,
    in_any_coordinate=True,
)
DICACHE = Forecast(
    "dicache",
    "DiCache, arXiv 2508.17356",
    "DiCache's, scaled by the probe",
    dicache,
    newest_gap,
    only_order=1,
    takes_ratio=True,
)

FORECASTS = {forecast.name: forecast for forecast in (TAYLOR, HICACHE, NEWTON, DICACHE)}
