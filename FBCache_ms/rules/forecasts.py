"""What is added at a reused step: each forecast a declaration, sum_i w_i D_i of the differences D_i that were kept.

Steps are told apart by a coordinate x, which is the step's number or its noise level. ``nodes`` are the coordinates of
the last computed steps, newest first; k = x - nodes[0] is the distance from the newest. As in when.py, operators alone.
"""

from dataclasses import dataclass, field
from numbers import Real
from typing import Callable, Mapping, Optional

import numpy as np

from .options import Option
from .schedules import REUSE

DIFFERENCES, SUMS, VALUES = "differences", "sums", "values"
"""What is kept, K of each: finite differences over the computed steps; sums over them, from which a ridge regression on
K functions of the coordinate forecasts; the values of the last K steps, newest first, those of reused steps as they
were forecast."""


@dataclass(frozen=True)
class Forecast:
    """One forecast.

    Args:
        name: as CacheConfig.forecast has it.
        source: the paper's equation, or the project's function and version.
        text: what it does, behind its name.
        weights: weights(x, nodes, number, ratio), a scalar for each order; ``number`` is its own field's, and ``ratio``
            the one of the probe's changes where it takes that. None for sums, where the number is the regression's
            penalty.
        gaps: gaps(x, nodes), what each order of the differences is divided by at a computed step; for sums the K
            functions at x; None for values.
        options: {field of CacheConfig: Option}, at most one; a number, unless ``rows`` reads it.
        only_order: the one taylorseer_derivative that it works with, None for all.
        takes_ratio: whether the probe's changes scale it.
        in_any_coordinate: whether distances may be measured in the noise level too.
        rows: rows(config, actions, sigmas), the weights of each reused step (R, K), where they are known before the
            loop: ``actions`` are those of schedules.step_actions, ``sigmas`` the noise levels (N + 1,), or None unless
            it is ``by_noise``. Then ``number`` is this step's row.
        coordinate: coordinate(N), each step's (N,), for one that is neither its number nor its noise level.
        keeps: DIFFERENCES, SUMS or VALUES.
        by_noise: whether it always looks at the noise levels.
        of_velocity: whether it is of the velocity, so that its span is the whole model.
    """

    name: str
    source: str
    text: str
    weights: Optional[Callable]
    gaps: Optional[Callable]
    options: Mapping[str, Option] = field(default_factory=dict)
    only_order: Optional[int] = None
    takes_ratio: bool = False
    in_any_coordinate: bool = False
    rows: Optional[Callable] = None
    coordinate: Optional[Callable] = None
    keeps: str = DIFFERENCES
    by_noise: bool = False
    of_velocity: bool = False


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


def known(x, nodes, row, ratio):
    """The weights that this step has by a table."""
    return row


def fitted(config, actions, sigmas):
    """forecast_weights, a row for each reused step. Raises ValueError where there are more or fewer of them."""
    weights, orders, reused = config.forecast_weights or (), config.taylorseer_derivative + 1, (actions == REUSE).sum()
    if len(weights) != orders * reused:
        raise ValueError(
            f"forecast_weights has {len(weights)} numbers, and {config.forecast!r} needs {orders} for each of the "
            f"{reused} steps that are reused of {len(actions)}"
        )
    return np.reshape(weights, (reused, orders))


def around_the_middle(steps):
    """tau = (step - N/2) / (N/2)."""
    return np.arange(steps) / (steps / 2) - 1


def chebyshev(x, nodes):
    """T_m(x), Chebyshev's polynomials of the first kind: T_m = 2 x T_{m-1} - T_{m-2}."""
    values = (x * 0 + 1, x)
    for order in range(2, len(nodes)):
        values = values + (2 * x * values[order - 1] - values[order - 2],)
    return values[: len(nodes)]


def mean_velocity(config, actions, sigmas):
    """v + (s - t) J with J = (u - v_r) / (t - r), u the mean velocity from noise level r to t (MeanCache, ICLR 2026).

    t and s are the noise levels before and behind this step, r that of K steps ago; v is the last step's velocity.
    Raises ValueError where K is more than the velocities that are kept, or r is t.
    """
    kept, spans, strides = config.taylorseer_derivative + 1, config.meancache_steps, np.diff(sigmas)
    if not set(spans) <= set(range(1, kept + 1)):
        raise ValueError(
            f"meancache_steps must be whole numbers from 1 to taylorseer_derivative + 1 = {kept}, not {spans}"
        )
    runs, rows = np.cumsum(np.diff(actions == REUSE, prepend=False) & (actions == REUSE)), []
    for step in np.flatnonzero(actions == REUSE):
        span = min(int(spans[min(runs[step], len(spans)) - 1]), step)
        way = sigmas[step] - sigmas[step - span]
        if way == 0:
            raise ValueError(
                f"{config} divides by distances in the noise level: steps {step - span} to {step} have none"
            )
        slope = np.zeros(kept)
        slope[:span] = strides[step - span : step][::-1] / way
        slope[span - 1] -= 1
        rows.append(np.eye(kept)[0] + strides[step] / way * slope)
    return np.reshape(rows, (-1, kept))


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
TABLE = Forecast(
    "table",
    "FBCache_ms; after L2P",
    "weights that were fitted for each reused step (fbcache learn)",
    known,
    newest_gap,
    options={
        "forecast_weights": Option(
            None,
            tuple,
            (2, None),
            "forecast",
            "the weights of TaylorSeer's differences D_0, D_1, ... at each reused step in turn, so many for each as "
            "there are differences (FBCache_ms; after L2P)",
        )
    },
    rows=fitted,
)
SPECTRUM = Forecast(
    "spectrum",
    "Spectrum, CVPR 2026",
    "Spectrum's ridge regression of Chebyshev polynomials on all computed steps",
    None,
    chebyshev,
    options={
        "spectrum_ridge": Option(
            0.1, Real, (1e-6, None), "forecast", "lambda, what the regression's weights are held back by (Spectrum)"
        )
    },
    coordinate=around_the_middle,
    keeps=SUMS,
)
MEANCACHE = Forecast(
    "meancache",
    "MeanCache, arXiv 2601.19961",
    "MeanCache's, from the velocities of the last steps and the mean velocity over them",
    known,
    None,
    options={
        "meancache_steps": Option(
            (2,),
            tuple,
            (1, 100),
            "forecast",
            "K of MeanCache's JVP_K, for each run of reused steps in turn, the last number also for the runs behind: "
            "the mean velocity is that of so many steps, at most taylorseer_derivative + 1; 1: plain reuse",
        )
    },
    rows=mean_velocity,
    keeps=VALUES,
    by_noise=True,
    of_velocity=True,
)

FORECASTS = {forecast.name: forecast for forecast in (TAYLOR, HICACHE, NEWTON, DICACHE, TABLE, SPECTRUM, MEANCACHE)}
