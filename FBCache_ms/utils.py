"""CacheContext: the state of one cached generation, the decision and the forecast."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

import mindspore as ms
from mindspore import Parameter, mint, ops

from .config import CacheConfig

MAX_STEPS = 1000
"""Length of the trace: Flux is trained on 1000 timesteps, no schedule has more."""

BRANCHES = ("cond", "uncond")
"""mindone's names for the two guidance branches of true CFG."""

NOT_COMPARED = -1.0
"""Stands in the trace for the difference of a step that was not compared; a real one is never negative."""


@dataclass(frozen=True)
class CacheStats:
    """What one generation did.

    Args:
        reused: one bool a step, true where the step was reused.
        residual_diffs: one relative difference a step, None where the step was not compared.
        uncond: the same for true CFG's negative branch, None without it.
    """

    reused: Tuple[bool, ...]
    residual_diffs: Tuple[Optional[float], ...]
    uncond: Optional["CacheStats"] = None

    @property
    def computed_steps(self):
        """Indices of the steps that ran every block."""
        return [step for step, reused in enumerate(self.reused) if not reused]

    @property
    def cached_steps(self):
        """Indices of the steps that ran the first block alone."""
        return [step for step, reused in enumerate(self.reused) if reused]


def relative_difference(reference, probe):
    """mean|reference - probe| / mean|reference| over all elements, in float32 (ParaAttention, first_block_cache)."""
    reference, probe = reference.astype(ms.float32), probe.astype(ms.float32)
    return mint.abs(reference - probe).mean() / mint.abs(reference).mean()


def finite_differences(residual, derivatives, filled, gap):
    """TaylorSeer's update on a computed step (arXiv 2503.06923, eq. 4).

    D'_0 = residual, D'_{i+1} = (D'_i - D_i) / gap for the orders that were valid, 0 above them.

    Args:
        residual: (B, S, D), the skipped span's residual at this step.
        derivatives: (K, B, S, D), the differences of the last computed step, newest first order 0.
        filled: how many of them are valid, a scalar in [0, K].
        gap: steps since the last computed one, a scalar of at least 1.
    """
    orders = (residual.astype(ms.float32),)
    for order in range(derivatives.shape[0] - 1):
        difference = (orders[order] - derivatives[order].astype(ms.float32)) / gap
        orders = orders + (ops.where(order < filled, difference, 0.0),)
    return mint.stack(orders, 0).astype(derivatives.dtype)


def taylor_forecast(derivatives, distance):
    """sum_i distance^i / i! * D_i in float32, (B, S, D); derivatives is (K, B, S, D) (arXiv 2503.06923, eq. 2)."""
    weight = mint.ones_like(distance)
    forecast = derivatives[0].astype(ms.float32)
    for order in range(1, derivatives.shape[0]):
        weight = weight * distance / order
        forecast = forecast + weight * derivatives[order].astype(ms.float32)
    return forecast


@ms.jit_class
class CacheContext:
    """The preallocated state of First-Block Cache with TaylorSeer, for one shape.

    Every value that a generation changes is a Parameter, so that the compiled graph keeps it on the device, and
    reset() puts all of them back. The settings are Parameters too: changing them compiles nothing.

    Args:
        batch_size: B, latents per call.
        seq_len: S, image tokens: height / 16 * width / 16 for Flux.
        inner_dim: D, the transformer's width: 3072 for Flux.
        taylorseer_derivative: order of the forecast, 0 for plain reuse.
        branches: 1, or 2 for true CFG, which caches its positive and its negative prompt apart; every buffer then has
            a leading axis of that length.
        mindspore_dtype: dtype of the two large buffers; computations are in float32 whatever it is.
        config: settings to start with; its order is taylorseer_derivative's default.

    Raises:
        ValueError: a size is below 1, branches is neither 1 nor 2, or config and taylorseer_derivative disagree.
    """

    def __init__(
        self,
        batch_size,
        seq_len,
        inner_dim,
        taylorseer_derivative=None,
        branches=1,
        mindspore_dtype=ms.float32,
        config=None,
    ):
        for name, size in {"batch_size": batch_size, "seq_len": seq_len, "inner_dim": inner_dim}.items():
            if size < 1:
                raise ValueError(f"{name} must be 1 or more, not {size}")
        if branches not in (1, 2):
            raise ValueError(f"branches must be 1 or 2, not {branches}")
        if config is None:
            config = CacheConfig(taylorseer_derivative=taylorseer_derivative or 0)
        if taylorseer_derivative is None:
            taylorseer_derivative = config.taylorseer_derivative
        self.taylorseer_derivative = taylorseer_derivative
        self.shape = (batch_size, seq_len, inner_dim)
        self.branches = branches

        def state(name, shape, initial, dtype):
            shape = shape if branches == 1 else (branches, *shape)
            return Parameter(ms.Tensor(np.full(shape, initial), dtype), name=f"cache_{name}", requires_grad=False)

        self.first_residual = state("first_residual", self.shape, 0, mindspore_dtype)
        self.derivatives = state("derivatives", (self.taylorseer_derivative + 1, *self.shape), 0, mindspore_dtype)
        self.filled = state("filled", (), 0, ms.int32)
        self.step = state("step", (), 0, ms.int32)
        self.last = state("last", (), 0, ms.int32)
        self.run = state("run", (), 0, ms.int32)
        self.total = state("total", (), 0, ms.int32)
        self.reused = state("reused", (MAX_STEPS,), 0, ms.int32)
        self.diffs = state("diffs", (MAX_STEPS,), NOT_COMPARED, ms.float32)
        self.timestep = state("timestep", (), 0, ms.float32)

        self.branch = Parameter(ms.Tensor(0, ms.int32), name="cache_branch", requires_grad=False)
        self.residual_diff_threshold = Parameter(ms.Tensor(0, ms.float32), name="cache_threshold", requires_grad=False)
        self.warmup_steps = Parameter(ms.Tensor(0, ms.int32), name="cache_warmup_steps", requires_grad=False)
        self.configure(config)

    def configure(self, config):
        """Takes over a CacheConfig's numbers. Raises ValueError if its order is not this context's."""
        if config.taylorseer_derivative != self.taylorseer_derivative:
            raise ValueError(
                f"taylorseer_derivative is {config.taylorseer_derivative} in the config, but this CacheContext was "
                f"made for {self.taylorseer_derivative}; make another one"
            )
        self.set_knobs(ms.Tensor(config.residual_diff_threshold, ms.float32), ms.Tensor(config.warmup_steps, ms.int32))

    def set_knobs(self, residual_diff_threshold, warmup_steps):
        """Takes over the settings, float32 and int32 scalars, inside the graph or outside.

        By assign, not by set_data: a compiled graph with a branch in it goes on with the old memory after set_data
        (MindSpore 2.7.0, CPU).
        """
        ops.assign(self.residual_diff_threshold, residual_diff_threshold)
        ops.assign(self.warmup_steps, warmup_steps)

    @contextmanager
    def __call__(self, name):
        """Turns to the buffers of a guidance branch: mindone's FluxPipeline enters "cond" and "uncond" each step.

        Raises ValueError for another name, and for "uncond" if this context has one branch only.
        """
        if name not in BRANCHES[: self.branches]:
            raise ValueError(
                f"cache_context {name!r} must be one of {', '.join(BRANCHES[:self.branches])}; for true CFG make the "
                "CacheContext with branches=2"
            )
        self.select(ms.Tensor(BRANCHES.index(name), ms.int32))
        yield self

    def select(self, branch):
        """Turns to the buffers of branch number ``branch``."""
        ops.assign(self.branch, branch)

    def read(self, buffer):
        """The active branch's part of a buffer."""
        if self.branches == 1:
            return buffer
        return ops.gather(buffer, self.branch, 0)

    def write(self, buffer, value):
        """Replaces the active branch's part of a buffer."""
        if self.branches > 1:
            rows = ops.arange(self.branches).reshape((-1,) + (1,) * value.ndim)
            value = ops.where(rows == self.branch, value.expand_dims(0), buffer)
        ops.assign(buffer, value)

    def reset(self):
        """Puts every buffer of the active branch back to where a generation starts."""
        for buffer in (self.first_residual, self.derivatives):
            self.write(buffer, ops.zeros_like(self.read(buffer)))
        for scalar in (self.filled, self.step, self.last, self.run, self.total):
            self.write(scalar, ms.Tensor(0, ms.int32))
        self.write(self.reused, ops.zeros_like(self.read(self.reused)))
        self.write(self.diffs, ops.full_like(self.read(self.diffs), NOT_COMPARED))

    def begin_step(self, timestep):
        """Resets if this timestep, a scalar falling within a generation, shows that a new generation has begun.

        One that is as large as the last is a new generation's only after a first step: further on, a half-precision
        schedule may repeat a value.
        """
        last = self.read(self.timestep)
        timestep = timestep.astype(ms.float32)
        if ops.logical_or(timestep > last, ops.logical_and(timestep == last, self.read(self.step) <= 1)):
            self.reset()
        self.write(self.timestep, timestep)

    def forget(self):
        """Makes the next step, of either branch, a generation's first."""
        ops.assign(self.timestep, ops.zeros_like(self.timestep))
        ops.assign(self.step, ops.zeros_like(self.step))

    def decide(self, probe):
        """Whether this step is reused, and its relative difference or NOT_COMPARED; both are scalars.

        Reused iff step >= warmup_steps, something is stored, the threshold is above 0 and the difference is strictly
        below it; a difference that is not a number computes (ParaAttention, first_block_cache).
        """
        compared = ops.logical_and(self.read(self.filled) > 0, self.read(self.step) >= self.warmup_steps)
        compared = ops.logical_and(compared, self.residual_diff_threshold > 0)
        difference = relative_difference(self.read(self.first_residual), probe)
        reuse = ops.logical_and(compared, difference < self.residual_diff_threshold)
        return reuse, ops.where(compared, difference, NOT_COMPARED)

    def forecast(self):
        """The skipped span's residual at this step, (B, S, D) in float32."""
        distance = self.read(self.step) - self.read(self.last)
        return taylor_forecast(self.read(self.derivatives), distance.astype(ms.float32))

    def store(self, probe, residual):
        """Takes over a computed step: its probe as the reference, the span's residual into the differences."""
        step, filled, derivatives = self.read(self.step), self.read(self.filled), self.read(self.derivatives)
        gap = ops.maximum(step - self.read(self.last), 1).astype(ms.float32)
        self.write(self.derivatives, finite_differences(residual, derivatives, filled, gap))
        self.write(self.first_residual, probe.astype(self.first_residual.dtype))
        self.write(self.filled, ops.minimum(filled + 1, self.taylorseer_derivative + 1))
        self.write(self.last, step)

    def end_step(self, reuse, difference):
        """Writes a step into the trace and counts it."""
        step, hit = self.read(self.step), reuse.astype(ms.int32)
        here = ops.arange(MAX_STEPS) == step
        self.write(self.reused, ops.where(here, hit, self.read(self.reused)))
        self.write(self.diffs, ops.where(here, difference, self.read(self.diffs)))
        self.write(self.run, (self.read(self.run) + 1) * hit)
        self.write(self.total, self.read(self.total) + hit)
        self.write(self.step, step + 1)

    def parameters(self):
        """Every buffer and setting."""
        return [value for value in vars(self).values() if isinstance(value, Parameter)]

    @property
    def nbytes(self):
        """Bytes that the buffers take."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def stats(self):
        """The generation's trace so far, a CacheStats; reads the device."""
        step, reused, diffs = (
            buffer.asnumpy().reshape(self.branches, -1) for buffer in (self.step, self.reused, self.diffs)
        )
        stats = None
        for branch in reversed(range(self.branches)):
            steps = int(step[branch, 0])
            stats = CacheStats(
                tuple(bool(hit) for hit in reused[branch, :steps]),
                tuple(None if diff == NOT_COMPARED else float(diff) for diff in diffs[branch, :steps]),
                stats,
            )
        return stats
