"""The gates of a configuration and its numbers: what shapes the graph, and what goes into it."""

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from .schedules import ASK, MAX_STEPS, REUSE, row

LIMITS = 3
"""Of a gate at a step: reuses in all, reuses in a row, and the sum of the compared differences stay below them."""

NUMBERS = 8
SIGMA, THRESHOLD, COEFFICIENTS = 0, 1, 3
"""Places in a gate's row of numbers: two thresholds, five coefficients."""


@dataclass(frozen=True)
class GatePlan:
    """One gate of a configuration.

    Args:
        name: for its buffers and the trace.
        stack: "all", "double" or "single": which blocks ``first`` and ``last`` are counted in.
        first, last: so many blocks at either end of the stack run outside the span; the first ones make the probe.
        rules: names in rules.SCORES, all of which have to agree; none for a static schedule.
        inner: the gates within the span, asked when this one computes.
    """

    name: str
    stack: str
    first: int
    last: int
    rules: Tuple[str, ...]
    inner: Tuple["GatePlan", ...] = ()

    @property
    def needs_text(self):
        """Whether blocks run behind the span: only then is the text stream's residual needed."""
        return self.stack == "double" or self.last > 0

    @property
    def probes_text(self):
        """Whether the probe is of both streams, text first (Nunchaku's single gate)."""
        return self.stack == "single" and len(self.rules) > 0

    def span(self, doubles, singles):
        """The blocks (start, stop) that a reuse stands for, doubles and singles counted together."""
        start = doubles if self.stack == "single" else 0
        stop = doubles if self.stack == "double" else doubles + singles
        return start + self.first, stop - self.last


def plan(config):
    """The gates of a configuration, in the order of their spans."""
    gate, first, last = config.gate, config.Fn_compute_blocks, config.Bn_compute_blocks
    if gate == "none":
        return ()
    tests = {"fbcache_and_teacache": ("fbcache", "teacache"), "static": ()}.get(gate, (gate,))
    if config.span == "stacks":
        return GatePlan("double", "double", 1, 0, tests), GatePlan("single", "single", 1, 0, tests)
    if config.span == "single":
        return (GatePlan(gate, "single", 0, 0, tests),)
    if gate == "fbcache_or_teacache":
        inner = GatePlan("fbcache", "all", first, last, ("fbcache",))
        return (GatePlan("teacache", "all", 0, last, ("teacache",), (inner,)),)
    return (GatePlan(gate, "all", first, last, tests),)


def every_gate(plans):
    """The plans and those within them, outer before inner."""
    return tuple(gate for outer in plans for gate in (outer, *every_gate(outer.inner)))


def check_shape(config, batch_size, seq_len, inner_dim, text_len, branches):
    """Raises ValueError, naming what is wrong, for a shape that no CacheContext of this CacheConfig can have."""
    for name, size in {"batch_size": batch_size, "seq_len": seq_len, "inner_dim": inner_dim}.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, not {size}")
    if branches not in (1, 2):
        raise ValueError(f"branches must be 1 or 2, not {branches}")
    if text_len < 1 and any(gate.needs_text or gate.probes_text for gate in every_gate(plan(config))):
        raise ValueError(f"text_len must be 1 or more for {config}, not {text_len}")


def threshold(config, gate, rule):
    """What a rule's score has to stay below; DBCache's 1 lets everything pass that is a number."""
    if rule == "teacache":
        return config.teacache_threshold
    if (config.gate, config.span, config.residual_diff_threshold) == ("fbcache", "blocks", 1):
        return np.inf
    return config.residual_diff_threshold_single if gate.name == "single" else config.residual_diff_threshold


def knobs(config, steps, sigmas=None, progress=None):
    """A configuration's numbers as the graph's inputs, NumPy arrays.

    Args:
        config: the CacheConfig.
        steps: N, the generation's number of steps, in [1, 1000].
        sigmas: (N,) or longer, the noise levels; for forecast_coordinate="sigma" only.
        progress: as for schedules.row.

    Returns:
        limits (G, 1000, 3), float32: what the gate's tallies must stay below for a step to be reused: the
            configuration's limits at a step that asks, infinity at one that is reused, minus infinity at one that
            computes. G is 1 where there is no gate.
        coordinates (1000,), float32: where each step lies for the forecast.
        numbers (G, 8), float32: HiCache's contraction, thresholds, TeaCache's polynomial, highest power first.
    """
    if config.forecast_coordinate == "sigma" and sigmas is None:
        raise ValueError("forecast_coordinate 'sigma' needs the schedule's sigmas")
    gates = every_gate(plan(config))
    limits = np.full((max(len(gates), 1), MAX_STEPS, LIMITS), -np.inf, np.float32)
    numbers = np.zeros((max(len(gates), 1), NUMBERS), np.float32)
    for index, gate in enumerate(gates):
        thresholds = [threshold(config, gate, rule) for rule in gate.rules]
        actions = row(config, steps, min(thresholds, default=0), "teacache" in gate.rules, progress)
        most = config.max_cached_steps, config.max_consecutive_cache_hits, config.max_accumulated_residual_diff or -1
        limits[index, :steps][actions == ASK] = [np.inf if limit < 0 else limit for limit in most]
        limits[index, :steps][actions == REUSE] = np.inf
        if gate.name == "teacache":
            limits[index, :, -1] = np.where(limits[index, :, -1] > 0, np.inf, -np.inf)
        coefficients = (0.0,) * (5 - len(config.teacache_coefficients)) + config.teacache_coefficients
        numbers[index, SIGMA] = config.hicache_sigma
        numbers[index, THRESHOLD : THRESHOLD + len(thresholds)] = thresholds
        numbers[index, COEFFICIENTS:] = coefficients
    coordinates = np.arange(MAX_STEPS, dtype=np.float32)
    if config.forecast_coordinate == "sigma":
        coordinates[:steps] = np.asarray(sigmas)[:steps]
    return limits, coordinates, numbers
