"""Published times of FLUX.1-dev with First-Block Cache, and the devices and decisions that they imply."""

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Optional, Tuple

import numpy as np

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.cases import UNCACHED
from FBCache_ms.predict.roofline import (
    PER_STEP,
    PYNATIVE,
    Accelerator,
    Design,
    Shapes,
    decisions,
    run_seconds,
    seconds,
    step,
)
from FBCache_ms.runtime.checkpoint import FLUX_DEV

PLAIN = CacheConfig.named(UNCACHED)
SHAPES = Shapes(FLUX_DEV, 1, 4096, 512)
"""Of all published times here: one picture of 1024 x 1024."""

LONGEST_TURN = 0.05
"""Seconds; with longer turns of the host ever more reuses fit the same times."""


@dataclass(frozen=True)
class Published:
    """Times that somebody measured on a device.

    Args:
        device: the device's public figures.
        design: the Design of what was measured.
        steps: N.
        uncached: seconds.
        cache: the cached rows' tag up to the threshold.
        cached: (threshold, seconds) of each of them, larger thresholds later.
        pynative: seconds operator by operator, None where nobody measured it.
    """

    device: Accelerator
    design: Design
    steps: int
    uncached: float
    cache: str
    cached: Tuple[Tuple[float, float], ...]
    pynative: Optional[float] = None

    @property
    def configs(self):
        """The CacheConfig of each cached row."""
        return [CacheConfig.from_tag(f"{self.cache}_R{threshold:g}") for threshold, _ in self.cached]


# Times: mindone's example FBCache_ms (PR #1475). Figures: CANN's cross-platform migration guide
# (gitcode.com/cann/ops-math), 24 cores at 1.8 GHz with 16 x 16 x 16 multiply-adds; the 10 microseconds that a graph
# takes to launch an operator are assumed, and hidden behind the device's work at these times' size.
ATLAS = Published(
    Accelerator("Atlas 800T A2", 353.9e12, 1.6e12, launch_seconds=10e-6),
    PER_STEP,
    28,
    12.7,
    "F1B0_W0_T1O2",
    ((0.08, 7.68), (0.12, 6.35)),
    17.5,
)
# Times: ParaAttention, in torch. Figures: topcpu.net; the tensor cores' rate is taken as twice that of float32.
L20 = Published(
    Accelerator("NVIDIA L20", 118.7e12, 864e9),
    PYNATIVE,
    28,
    26.36,
    "F1B0_W0",
    ((0.06, 21.83), (0.08, 17.01), (0.1, 16.0), (0.12, 13.78)),
)


@dataclass(frozen=True)
class Fit:
    """A device that takes about as long as published, and the decisions with which it does.

    Args:
        device: with its efficiency and its host's turn.
        reused: how many steps each cached row reuses.
        predicted: seconds, of the uncached row and of each cached one.
        error: the largest difference from the published ones, as a share of them.
    """

    device: Accelerator
    reused: Tuple[int, ...]
    predicted: Tuple[float, ...]
    error: float


def predict(device, design, config, steps, computed=(), shapes=SHAPES):
    """Predicted seconds of a run in which each gate computes so many of the steps, as in roofline.decisions."""
    return run_seconds(device, design, shapes, config, decisions(config, steps, computed))


def fits(published):
    """A Fit for all numbers of reuses in the cached rows that an efficiency of at most 1 allows, best first.

    A run takes what its device does, over the efficiency, and the host's turns: both by least squares of the relative
    errors, a turn at least 0.
    """
    device, design, steps = replace(published.device, launch_seconds=0.0), published.design, published.steps

    def once(config, reused=()):
        return seconds(device, design, step(SHAPES, config, design, reused))

    costs = np.array([(once(config), once(config, ("fbcache",))) for config in published.configs])
    reused = np.array(list(combinations_with_replacement(range(steps), len(costs))))
    work = (steps - reused) * costs[:, 0] + reused * costs[:, 1]
    work = np.concatenate((np.full((len(work), 1), steps * once(PLAIN)), work), 1)
    times = np.array((published.uncached, *(cached for _, cached in published.cached)))
    # The normal equations of works / efficiency + turns * turn = 1.
    works, turns = work / times, np.broadcast_to(steps / times, work.shape)
    squares, mixed = (works**2).sum(1), (works * turns).sum(1)
    turn = (squares * turns.sum(1) - mixed * works.sum(1)) / (squares * (turns**2).sum(1) - mixed**2)
    turn = np.maximum(turn, 0)
    inverse = (works.sum(1) - turn * mixed) / squares
    predicted = inverse[:, None] * work + turn[:, None] * steps
    errors = np.abs(predicted / times - 1).max(1)
    return [
        Fit(
            replace(published.device, efficiency=float(1 / inverse[index]), turn_seconds=float(turn[index])),
            tuple(reused[index].tolist()),
            tuple(predicted[index].tolist()),
            float(errors[index]),
        )
        for index in np.argsort(errors, kind="stable")
        if inverse[index] >= 1
    ]


def best(published):
    """The best Fit with a turn of the host of at most LONGEST_TURN; dispatch_seconds are what PyNative's row leaves."""
    fit = next(fit for fit in fits(published) if fit.device.turn_seconds <= LONGEST_TURN)
    if published.pynative is None:
        return fit
    operators = sum(work.operators for work in step(SHAPES, PLAIN, PYNATIVE))
    dispatch = (published.pynative / published.steps - fit.device.turn_seconds) / operators
    return replace(fit, device=replace(fit.device, dispatch_seconds=dispatch))


def with_fusion(published):
    """The best Fit if a graph is faster than PyNative by fusing operators alone, and launching costs nothing.

    Found by halving: the more a graph fuses, the longer PyNative takes for the same times of the graph.
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        fused = (low + high) / 2
        fit = best(replace(published, device=replace(published.device, fused=fused), pynative=None))
        if predict(fit.device, PYNATIVE, PLAIN, published.steps) < published.pynative:
            low = fused
        else:
            high = fused
    return fit


def neighbours(published, fit):
    """The Fits whose rows reuse at most one step more or less, best first."""
    return [
        other
        for other in fits(published)
        if max(abs(one - another) for one, another in zip(fit.reused, other.reused)) <= 1
    ]


def predict_rows(published, fit, device, design):
    """Predicted seconds of the published rows, uncached and cached, on another device or under another design."""
    steps = published.steps
    cached = [
        predict(device, design, config, steps, (steps - hits,)) for config, hits in zip(published.configs, fit.reused)
    ]
    return predict(device, design, PLAIN, steps), *cached
