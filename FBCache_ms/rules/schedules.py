"""Rows of numbers: which steps are computed, known before the loop begins.

A mask has one entry a step: 1 computes, 0 does not have to, 2 refreshes chosen tokens.
"""

from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Callable, Mapping

import numpy as np

from .options import Option

COMPUTE, REUSE, ASK, REFRESH = 1, 0, -1, 2
"""What a schedule says of a step: compute it, reuse it, ask the gate, or refresh chosen tokens."""

MAX_STEPS = 1000
"""Length of every table: Flux is trained on 1000 timesteps, no schedule has more."""

ROUNDING = 1e-6
"""Noise levels are float32: a step this near to the edge of a window is on it."""

FLUX_MAG_RATIOS = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)
"""FLUX.1-dev's mean norm of a step's residual over that of the step before, at 28 steps (MagCache4FLUX)."""

MASKS = {
    "mask_slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "mask_medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "mask_fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "mask_ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
"""Run lengths of computed and of reused steps in 28 (cache-dit 1.5.3, steps_mask)."""

SPECTRUM = {
    "spectrum_14": {50: (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46)},
    "spectrum_10": {50: (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)},
}
"""{steps: those computed} (Spectrum, CVPR 2026)."""

MEANCACHE = {
    "meancache_25": {50: (*range(17), 24, 32, 40, 43, 45, 47, 48, 49)},
    "meancache_17": {50: (*range(9), 10, 17, 24, 31, 38, 45, 48, 49)},
    "meancache_10": {50: (0, 1, 3, 7, 14, 21, 28, 35, 42, 49)},
}
"""{steps: those computed}, the shortest paths for Qwen-Image (MeanCache4Qwen-Image)."""

LEARNT = {
    "learnt_6": {
        28: (0, 7, 12, 18, 23, 26),
        50: (0, 16, 25, 33, 42, 48),
    },
    "learnt_8": {
        28: (0, 6, 10, 14, 18, 22, 25, 27),
        50: (0, 10, 17, 24, 32, 39, 45, 48),
    },
    "learnt_10": {
        28: (0, 4, 7, 10, 13, 16, 19, 23, 25, 27),
        50: (0, 9, 13, 20, 24, 31, 39, 43, 46, 48),
    },
    "learnt_12": {
        28: (0, 4, 7, 10, 12, 14, 17, 19, 21, 23, 25, 27),
        50: (0, 7, 11, 17, 22, 25, 32, 38, 43, 45, 47, 49),
    },
}
"""{steps: those computed}: the best of 60 masks by the error of the latents over six prompts, on the embedded
checkpoint and for TaylorSeer's order 1.

Made by eval/learn_mask.py of version 0.1.0, with --computed 6 8 10 12 --num_inference_steps 28 (50) --learn_from 6
--limit 16.
"""


def taylorseer(steps, interval):
    """The first three steps, then each interval-th after the last computed one (TaylorSeer's cal_type)."""
    step = np.arange(steps)
    return ((step < 3) | ((step - 2) % interval == 0)).astype(int)


def toca(steps, interval):
    """TaylorSeer's computed steps; all others refresh (ToCa for FLUX.1)."""
    return np.where(taylorseer(steps, interval) == 1, COMPUTE, REFRESH)


def duca(steps, interval):
    """TaylorSeer's computed steps; behind each a reuse and a refresh in turn (DuCa)."""
    mask = taylorseer(steps, interval)
    behind = np.arange(steps) - np.maximum.accumulate(np.where(mask == 1, np.arange(steps), 0))
    return np.where((behind > 0) & (behind % 2 == 0), REFRESH, mask)


def fora(steps, interval):
    """Every interval-th step (FORA; Delta-DiT, on the single stack)."""
    return (np.arange(steps) % interval == 0).astype(int)


def magcache(steps, ratios=None, threshold=0.24, max_skips=5, retention=0.1):
    """Reuses while |1 - product of the norm ratios|, summed over the run, stays within the threshold (MagCache4FLUX).

    Ratios for another number of steps are taken from the nearest one. As published, a step that lies nearest to the
    twelfth of 28 is computed.
    """
    ratios = nearest(FLUX_MAG_RATIOS if ratios is None else ratios, steps)
    mask = np.ones(steps, int)
    product, error, run = 1.0, 0.0, 0
    for step in range(max(int(retention * steps + 0.5), 1), steps):
        product, run = product * ratios[step], run + 1
        error += abs(1 - product)
        if error <= threshold and run <= max_skips and round(step * 27 / max(steps - 1, 1)) != 11:
            mask[step] = 0
        else:
            product, error, run = 1.0, 0.0, 0
    return mask


def run_lengths(computed, reused):
    """So many computed steps, so many reused ones, and so on in turn; the last run is computed (cache-dit)."""
    mask = []
    for index, length in enumerate(computed):
        mask += [1] * length + [0] * (reused[index] if index < len(reused) else 0)
    return np.array(mask)


def learnt(steps, tables):
    """Computes the steps of the table for the nearest number of steps, at the same shares of the way to the last one.

    Args:
        steps: N.
        tables: {number of steps: those computed}.

    Where N has a table of its own these are its steps; where N is small two of them may fall together.
    """
    of = min(tables, key=lambda number: abs(number - steps))
    return np.isin(np.arange(steps), np.round(np.array(tables[of]) * (steps - 1) / (of - 1))).astype(int)


def nearest(values, steps):
    """The values at ``steps`` places spread evenly over them, each the nearest one."""
    places = np.linspace(0, len(values) - 1, steps)
    return np.asarray(values)[np.round(places).astype(int)]


@dataclass(frozen=True)
class Schedule:
    """Steps that are computed, known before the loop.

    Args:
        name: as CacheConfig.schedule has it.
        source: the paper, or the project's function and version.
        mask: mask(steps, **values of its fields), (N,).
        options: {argument of mask: field of CacheConfig}.
        depends_on_steps: whether the same step may be treated otherwise in a generation with another number of steps.
        learnt: whether it was learnt on the embedded checkpoint, and says little of any other.
        refreshes: whether it has steps that refresh chosen tokens.
    """

    name: str
    source: str
    mask: Callable
    options: Mapping[str, str] = field(default_factory=dict)
    depends_on_steps: bool = True
    learnt: bool = False
    refreshes: bool = False

    def of(self, config, steps):
        """The mask (N,) that a CacheConfig asks for."""
        return self.mask(steps, **{name: getattr(config, option) for name, option in self.options.items()})


def mask_of_cache_dit(steps, computed, reused):
    """Run lengths in 28 steps, taken at so many places."""
    return nearest(run_lengths(computed, reused), steps)


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("taylorseer", "TaylorSeer's cal_type", taylorseer, {"interval": "schedule_interval"}, False),
        Schedule("fora", "FORA", fora, {"interval": "schedule_interval"}, False),
        Schedule("toca", "ToCa, flux-ToCa", toca, {"interval": "schedule_interval"}, False, refreshes=True),
        Schedule("duca", "DuCa, cal_type", duca, {"interval": "schedule_interval"}, False, refreshes=True),
        Schedule(
            "magcache",
            "MagCache4FLUX",
            magcache,
            {
                "ratios": "magcache_ratios",
                "threshold": "magcache_threshold",
                "max_skips": "magcache_max_skips",
                "retention": "magcache_retention",
            },
        ),
        *(
            Schedule(name, "cache-dit 1.5.3, steps_mask", partial(mask_of_cache_dit, computed=computed, reused=reused))
            for name, (computed, reused) in MASKS.items()
        ),
        *(Schedule(name, "Spectrum", partial(learnt, tables=tables)) for name, tables in SPECTRUM.items()),
        *(Schedule(name, "MeanCache", partial(learnt, tables=tables)) for name, tables in MEANCACHE.items()),
        *(Schedule(name, "FBCache_ms", partial(learnt, tables=tables), learnt=True) for name, tables in LEARNT.items()),
    )
}

SCHEDULE_OPTIONS = {
    "schedule": Option(
        None,
        str,
        tuple(SCHEDULES),
        "schedule",
        "steps that are computed: taylorseer, the first three and every N-th from there; fora, every N-th; toca and "
        "duca, taylorseer's, where the others refresh, or reuse and refresh in turn; magcache; cache-dit's four masks; "
        "Spectrum's two; MeanCache's three; learnt_N, N steps in all, learnt on the embedded checkpoint. At the others "
        "the gate decides, or with the gates static and refresh they are reused",
    ),
    "schedule_interval": Option(
        5, Integral, (1, None), "schedule", "N, in steps (TaylorSeer, FORA, Delta-DiT, ToCa, DuCa)"
    ),
    "steps_computation_mask": Option(
        None,
        tuple,
        (1, None),
        "schedule",
        "a schedule of one's own, a digit a step: 1 computes, 0 as above (cache-dit)",
        digits=True,
    ),
    "magcache_threshold": Option(0.24, Real, (0, None), "schedule", "largest accumulated error (MagCache)"),
    "magcache_max_skips": Option(5, Integral, (0, None), "schedule", "MagCache's K: reuses in a row"),
    "magcache_retention": Option(0.1, Real, (0, 1), "schedule", "share of steps computed first (MagCache)"),
    "magcache_ratios": Option(
        None,
        tuple,
        (1, None),
        "schedule",
        "each step's residual norm over the one before; default: FLUX.1-dev's (MagCache)",
        fitted_to="FluxTransformer2DModel",
    ),
}
"""Fields of CacheConfig."""

for _name in {name for schedule in SCHEDULES.values() for name in schedule.options.values()}:
    _schedules = tuple(schedule.name for schedule in SCHEDULES.values() if _name in schedule.options.values())
    SCHEDULE_OPTIONS[_name] = SCHEDULE_OPTIONS[_name].used(("schedule", _schedules))


def progress_of(sigmas, steps):
    """How much of the sampling lies before each step, (N,) in [0, 1], for ``start`` and ``end`` of a CacheConfig.

    1 - t, t the noise levels (N,) that a caller gives, before the scheduler shifts them; i / N, Flux's own, where it
    gives none, or where a scheduler makes another number of steps of them. ComfyUI tests the shifted levels, in the
    same order.
    """
    if sigmas is None or len(sigmas) != steps:
        return np.arange(steps) / steps
    return 1 - np.asarray(sigmas, float)


def step_actions(config, steps, thresholds, computes_last=False, progress=None):
    """COMPUTE, REUSE, ASK or REFRESH for each of the N steps of a generation, (N,).

    Args:
        config: the CacheConfig.
        steps: N.
        thresholds: of each of the gate's rules; none for a schedule alone. Where one is 0 the gate is never asked.
        computes_last: whether the gate always computes the last step.
        progress: (N,), as progress_of gives it.

    Raises ValueError if config has a mask of another length.
    """
    rest = REUSE if not thresholds else ASK if min(thresholds) > 0 else COMPUTE
    actions = np.full(steps, rest)
    mask = None
    if config.schedule is not None:
        mask = SCHEDULES[config.schedule].of(config, steps)
    elif config.steps_computation_mask is not None:
        mask = np.array(config.steps_computation_mask)
        if len(mask) != steps:
            raise ValueError(f"steps_computation_mask is for {len(mask)} steps, the generation has {steps}")
    if mask is not None:
        actions[mask == COMPUTE] = COMPUTE
        actions[mask == REFRESH] = REFRESH
    progress = progress_of(None, steps) if progress is None else np.asarray(progress)[:steps]
    actions[(progress < config.start - ROUNDING) | (progress > config.end + ROUNDING)] = COMPUTE
    actions[: config.warmup_steps : config.warmup_interval] = COMPUTE
    actions[0] = COMPUTE
    if computes_last:
        actions[-1] = COMPUTE
    return actions
