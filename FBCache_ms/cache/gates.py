"""The gates of a configuration and its numbers: what shapes the graph, and what goes into it."""

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from ..config import OPTIONS
from ..rules.forecasts import FORECASTS
from ..rules.schedules import ASK, MAX_STEPS, REFRESH, REUSE, step_actions
from ..rules.when import FORECAST, GATES, VERIFIED, Rule

LIMITS = 3
"""Of a gate at a step: reuses in all, reuses in a row, and the sum of the compared differences stay below them.

The thresholds of its rules follow.
"""

FORECAST_NUMBER = 0
"""The place of the forecast's own number among a gate's; the rules' numbers follow, and a forecast's table."""


@dataclass(frozen=True)
class GatePlan:
    """One gate of a configuration.

    Args:
        name: for its buffers and the trace.
        stack: "all", "double" or "single": which blocks ``first`` and ``last`` are counted in; "model": all of them,
            with the embedding before and the head behind.
        first, last: so many blocks at either end of the stack run outside the span; the first ones make the probe.
        rules: all of which have to agree; none for a static schedule.
        inner: the gates within the span, asked when this one computes.
        decides: whether it may reuse; one that does not keeps differences alone.
        refreshes: whether there are steps that refresh chosen tokens.
    """

    name: str
    stack: str
    first: int
    last: int
    rules: Tuple[Rule, ...]
    inner: Tuple["GatePlan", ...] = ()
    decides: bool = True
    refreshes: bool = False

    @property
    def needs_text(self):
        """Whether blocks run behind the span: only then is the text stream's residual needed."""
        return self.stack == "double" or self.last > 0

    @property
    def probes_text(self):
        """Whether the probe is of both streams, text first (Nunchaku's single gate)."""
        return self.stack == "single" and len(self.rules) > 0

    @property
    def whole_model(self):
        """Whether a reuse stands for embedding, blocks and head, so that its span begins and ends at latents."""
        return self.stack == "model"

    @property
    def forecasts_probe(self):
        """Whether a rule compares the probe with its own forecast."""
        return any(rule.reference == FORECAST for rule in self.rules)

    @property
    def verifies(self):
        """Whether the last block checks, at every step, what is expected of it."""
        return any(rule.looks_at == VERIFIED for rule in self.rules)

    @property
    def accumulates(self):
        """Whether the differences of its first rule count for max_accumulated_residual_diff."""
        return any(rule.needs_a_block for rule in self.rules[:1])

    def span(self, doubles, singles):
        """The blocks (start, stop) that a reuse stands for, doubles and singles counted together."""
        start = doubles if self.stack == "single" else 0
        stop = doubles if self.stack == "double" else doubles + singles
        return start + self.first, stop - self.last


def plan(config):
    """The gates of a configuration, in the order of their spans."""
    gate, first, last = GATES[config.gate], config.Fn_compute_blocks, config.Bn_compute_blocks
    if not gate.is_there:
        return ()
    if config.span == "stacks":
        return tuple(GatePlan(stack, stack, 1, 0, gate.rules) for stack in ("double", "single"))
    if config.span == "model":
        return (GatePlan(config.gate, "model", 0, 0, gate.rules),)
    if config.span == "single":
        return (GatePlan(config.gate, "single", 0, 0, gate.rules),)
    if gate.within:
        outer, inner = gate.rules[0].name, gate.within[0].name
        return (GatePlan(outer, "all", 0, last, gate.rules, (GatePlan(inner, "all", first, last, gate.within),)),)
    # What the last block is expected to get.
    inner = (GatePlan("before_last", "all", 0, 1, (), decides=False),) if gate.verifies else ()
    return (GatePlan(config.gate, "all", first, last, gate.rules, inner, refreshes=gate.refreshes),)


def every_gate(plans):
    """The plans and those within them, outer before inner."""
    return tuple(gate for outer in plans for gate in (outer, *every_gate(outer.inner)))


def deciding(plans):
    """Those of every_gate that may reuse."""
    return tuple(gate for gate in every_gate(plans) if gate.decides)


def check_shape(config, batch_size, seq_len, inner_dim, text_len, branches, channels, stacks=(0, 0)):
    """Raises ValueError, naming what is wrong, for a shape that no CacheContext of this CacheConfig can have."""
    for name, size in {"batch_size": batch_size, "seq_len": seq_len, "inner_dim": inner_dim}.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, not {size}")
    if branches not in (1, 2):
        raise ValueError(f"branches must be 1 or 2, not {branches}")
    if channels < 1 and any(gate.whole_model for gate in plan(config)):
        raise ValueError(f"channels must be 1 or more for {config}, not {channels}")
    if sum(stacks) < 1 and any(gate.refreshes for gate in plan(config)):
        raise ValueError(f"stacks must have 1 block or more for {config}, not {stacks}")
    if text_len < 1 and any(gate.needs_text or gate.probes_text or gate.refreshes for gate in every_gate(plan(config))):
        raise ValueError(f"text_len must be 1 or more for {config}, not {text_len}")


def thresholds_width(config):
    """How many thresholds each gate has: those of the one with most."""
    return max((len(gate.rules) for gate in every_gate(plan(config))), default=0)


def threshold(config, gate, rule):
    """What a rule's score has to stay below; at everything_at (DBCache's 1) all passes that is a number."""
    value = getattr(config, f"{rule.threshold}_single" if gate.name == "single" else rule.threshold)
    return np.inf if (config.gate, config.span, value) == (rule.name, "blocks", rule.everything_at) else value


def width(name):
    """How many numbers a field takes, at most."""
    option = OPTIONS[name]
    return option.allowed[1] if option.kind is tuple else 1


def places(rules):
    """For each rule the places of its own numbers among a gate's."""
    found, place = [], FORECAST_NUMBER + 1
    for rule in rules:
        found.append(tuple(range(place, place + sum(map(width, rule.numbers)))))
        place += len(found[-1])
    return tuple(found)


def table_width(config):
    """How many numbers a gate's table has: a row for each step that there may be, none without a table.

    It is the forecast's, or what refreshes are numbered in.
    """
    there = FORECASTS[config.forecast].rows is not None or any(gate.refreshes for gate in plan(config))
    return MAX_STEPS * (config.taylorseer_derivative + 1) * there


def numbers_width(config):
    """How many numbers each gate has: those before a table filled up to the most that one needs, and the table."""
    rules = [places(gate.rules) for gate in every_gate(plan(config))]
    most = max((FORECAST_NUMBER + 1 + sum(map(len, each)) for each in rules), default=1)
    return most + table_width(config)


def gate_numbers(config, gate):
    """A gate's numbers: the forecast's own, and each rule's own.

    Those of a field with fewer than it may have stand last: a polynomial's lowest powers.
    """
    forecast = FORECASTS[config.forecast]
    numbers = [0.0 if forecast.rows else sum(getattr(config, name) for name in forecast.options)]
    for rule in gate.rules:
        for name in rule.numbers:
            values = np.atleast_1d(getattr(config, name)).tolist()
            numbers += [0.0] * (width(name) - len(values)) + values
    return numbers


def weights_table(config, actions, sigmas=None):
    """The table of a forecast's rows (1000, K): 0 but at the steps that ``actions`` reuse.

    ``sigmas`` are the noise levels, (N + 1,) or longer. Raises ValueError as the forecast's ``rows`` does.
    """
    if sigmas is not None:
        sigmas = np.asarray(sigmas, float)[: len(actions) + 1]
    table = np.zeros((MAX_STEPS, config.taylorseer_derivative + 1), np.float32)
    table[: len(actions)][actions == REUSE] = FORECASTS[config.forecast].rows(config, actions, sigmas)
    return table


def refreshes_table(actions):
    """Which of its generation's refreshes each step is, counted from 1, (1000,); 0 for any other step."""
    table, refreshes = np.zeros(MAX_STEPS, np.float32), actions == REFRESH
    table[: len(actions)] = np.where(refreshes, np.cumsum(refreshes), 0)
    return table


def refreshed_steps(config, steps):
    """How many of so many steps refresh chosen tokens."""
    return int((step_actions(config, steps, ()) == REFRESH).sum()) if config.refreshes else 0


def check_steps(config, steps):
    """Raises ValueError for a mask or a table that is for another number of steps."""
    actions = step_actions(config, steps, ())
    if FORECASTS[config.forecast].rows:
        # Whether there is a row for each does not depend on the noise levels.
        weights_table(config, actions, np.linspace(1, 0, steps + 1))


def check_noise_levels(config, sigmas):
    """Raises ValueError where two steps in a row have one noise level, and a configuration divides by the distance."""
    same = np.flatnonzero(np.diff(sigmas) == 0)
    if len(same) > 0:
        step, level = int(same[0]), sigmas[same[0]]
        raise ValueError(
            f"{config} divides by distances in the noise level: steps {step} and {step + 1} have {level:g}"
        )


def step_tables(config, steps, sigmas=None, progress=None):
    """A configuration's numbers as the graph's inputs, NumPy arrays.

    Args:
        config: the CacheConfig.
        steps: N, the generation's number of steps, in [1, 1000].
        sigmas: (N + 1,) or longer, the noise levels; only where distances are measured in them.
        progress: as for schedules.step_actions.

    Returns:
        limits (G, 1000, 3 + R), float32: what the gate's tallies must stay below for a step to be reused: the
            configuration's limits at a step that asks, infinity at one that is reused, minus infinity at one that
            computes or refreshes. Then what each of its rules' scores must stay below, R at most. G is 1 where there is
            no gate.
        coordinates (1000,), float32: where each step lies for the forecast.
        numbers (G, numbers_width), float32: gate_numbers of each gate, and at their ends weights_table or
            refreshes_table.

    Raises ValueError for a number of steps out of range, where sigmas are missing or two in a row are equal, or where a
    mask or a table is for another number of steps.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be in [1, {MAX_STEPS}], not {steps}")
    if config.by_noise and sigmas is None:
        raise ValueError(f"{config} measures distances in the noise level and needs the schedule's sigmas")
    if config.forecast_coordinate == "sigma" and config.taylorseer_derivative > 0:
        check_noise_levels(config, np.asarray(sigmas, np.float32)[:steps])
    gates, forecast = every_gate(plan(config)), FORECASTS[config.forecast]
    limits = np.full((max(len(gates), 1), MAX_STEPS, LIMITS + thresholds_width(config)), -np.inf, np.float32)
    numbers = np.zeros((max(len(gates), 1), numbers_width(config)), np.float32)
    for index, gate in enumerate(gates):
        thresholds = [threshold(config, gate, rule) for rule in gate.rules]
        computes_last = any(rule.computes_last for rule in gate.rules)
        actions = step_actions(config, steps, thresholds, computes_last, progress)
        most = config.max_cached_steps, config.max_consecutive_cache_hits, config.max_accumulated_residual_diff or -1
        limits[index, :steps, :LIMITS][actions == ASK] = [np.inf if limit < 0 else limit for limit in most]
        limits[index, :steps, :LIMITS][actions == REUSE] = np.inf
        if not gate.accumulates:
            summed = LIMITS - 1
            limits[index, :, summed] = np.where(limits[index, :, summed] > 0, np.inf, -np.inf)
        for place, rule in enumerate(gate.rules):
            at_each = rule.threshold_at and rule.threshold_at(config, np.arange(steps) / steps)
            limits[index, :steps, LIMITS + place] = thresholds[place] if at_each is None else at_each
        own = gate_numbers(config, gate)
        numbers[index, : len(own)] = own
        if forecast.rows:
            numbers[index, -table_width(config) :] = weights_table(config, actions, sigmas).ravel()
        if gate.refreshes:
            numbers[index, -table_width(config) :] = refreshes_table(actions)
    coordinates = np.arange(MAX_STEPS, dtype=np.float32)
    if config.by_noise:
        coordinates[:steps] = np.asarray(sigmas)[:steps]
    if forecast.coordinate:
        coordinates[:steps] = forecast.coordinate(steps)
    return limits, coordinates, numbers
