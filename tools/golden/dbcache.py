"""What the programs that run cache-dit share."""

import cache_dit
import numpy as np


def settings(config, separate_cfg=None):
    """A CacheConfig in cache-dit's words; separate_cfg says whether every other call is the other branch of CFG."""
    limit = config.max_accumulated_residual_diff
    mask = config.steps_computation_mask
    cache = cache_dit.DBCacheConfig(
        Fn_compute_blocks=config.Fn_compute_blocks,
        Bn_compute_blocks=config.Bn_compute_blocks,
        residual_diff_threshold=config.residual_diff_threshold,
        max_accumulated_residual_diff_threshold=limit or None,
        max_warmup_steps=config.warmup_steps,
        warmup_interval=config.warmup_interval,
        max_cached_steps=config.max_cached_steps,
        max_continuous_cached_steps=config.max_consecutive_cache_hits,
        enable_separate_cfg=separate_cfg,
        steps_computation_mask=None if mask is None else list(mask),
        steps_computation_policy="static" if config.gate == "static" else "dynamic",
    )
    order = config.taylorseer_derivative
    return cache, cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None


def branches(stats, steps, separate_cfg):
    """Which steps a stack reused, and the differences that were compared, both (branches, steps)."""
    kept = [(stats.cached_steps, stats.residual_diffs)]
    if separate_cfg:
        kept.append((stats.cfg_cached_steps, stats.cfg_residual_diffs))
    reused = np.array([np.isin(np.arange(steps), cached) for cached, _ in kept])
    diffs = np.array([[diffs.get(str(step), np.nan) for step in range(steps)] for _, diffs in kept], float)
    return reused, diffs


def nearest(diffs, config):
    """How close the closest difference, or sum of differences, comes to its limit, as a part of it.

    Raises ValueError where that is so close that rounding may decide.
    """
    gaps = [np.abs(diffs[diffs > 0] / config.residual_diff_threshold - 1)]
    if config.max_accumulated_residual_diff:
        sums = np.cumsum(np.where(diffs > 0, diffs, 0), -1)
        gaps.append(np.abs(sums / config.max_accumulated_residual_diff - 1).ravel())
    closest = np.concatenate(gaps).min(initial=np.inf)
    if closest < 0.01:
        raise ValueError(f"a difference is within {closest:.1%} of its limit: choose another one")
    return round(float(closest), 3)
