"""The whole denoise loop as one graph."""

import math
import time

import mindspore as ms
from mindspore import nn, ops

from ..rules import kernels
from ..rules.schedules import MAX_STEPS
from .step import approach, begin, cached_step, compute, part, reached_shapes, reuse, velocity


class DenoiseLoop(nn.Cell):
    """Every step of a generation, or a piece of them, in one call.

    Args:
        model: the Model.
        cache_context: a CacheContext for the latents' shape, with two branches for true CFG.
        pair: the gathered.Ranks of two devices that have a branch of true CFG each; None where this one has all.
    """

    def __init__(self, model, cache_context, pair=None):
        super().__init__(auto_prefix=False)
        self.transformer, self.model, self.cache, self.pair = model.transformer, model, cache_context, pair
        self.step_seconds = None
        # ms.export looks for the graph's Parameters in the Cell that it is given.
        for parameter in cache_context.parameters():
            self.insert_param_to_cell(parameter.name, parameter)

    def construct(self, latents, inputs, true_cfg_scale, timesteps, sigmas, start, stop, limits, coordinates, numbers):
        """See denoise."""
        return self.denoise(
            latents, inputs, true_cfg_scale, timesteps, sigmas, start, stop, limits, coordinates, numbers
        )

    def denoise(self, latents, inputs, true_cfg_scale, timesteps, sigmas, start, stop, limits, coordinates, numbers):
        """The latents after steps start to stop - 1.

        Args:
            latents: (B, S, C), packed.
            inputs: as for Model.prepare, with a leading axis for the branches where each has its own.
            true_cfg_scale: scalar; not used with one branch.
            timesteps, sigmas: (N,) in [0, 1000] and (N + 1,) in [0, 1], padded to any fixed length.
            start, stop: int32 scalars from 0 on; a start of 0 begins a generation, any other goes on with the last. The
                loop ends with the timesteps, or at 1000, where stop is beyond.
            limits, coordinates, numbers: what gates.step_tables makes of a CacheConfig.
        """
        model, cache, batch, dtype = self.model, self.cache, latents.shape[0], latents.dtype
        branch, common = model.prepare(inputs, None, dtype)
        text_shape = branch["text"].shape[-3:]
        if cache.branches == 1:
            branch = of_branch(branch, ms.Tensor(0, ms.int32))
        # Each step's times, for every latent, and its stride: a step has one operator to read either.
        times = model.times(timesteps.to(dtype) / 1000, dtype).expand_dims(1)
        times = times.broadcast_to((times.shape[0], batch, times.shape[2]))
        conditions = branch, common, times
        updates = sigmas[1:] - sigmas[:-1], true_cfg_scale
        cache.tables.set(limits, coordinates, numbers)
        if start == 0:
            for number in range(cache.branches):
                cache.select(number)
                cache.reset()
        # One loop over the calls of the transformer, two a step under true CFG: an NPU's host reads every condition.
        stop = ops.minimum(stop, min(timesteps.shape[0], MAX_STEPS))
        call, last = start * cache.branches, stop * cache.branches
        if len(cache.gates) == 1 and (cache.gates[0].refreshes or model.hands_over_blocks(common)):
            return self.computed_and_reused(call, last, latents, text_shape, conditions, updates)
        state = self.begun(latents)
        while call < last:
            text, given = self.condition(call, conditions)
            output = cached_step(model, cache, self.latents(state), text, given)
            state = self.advance(call, state, output, updates)
            call = call + 1
        return self.latents(state)

    def computed_and_reused(self, call, last, latents, text_shape, conditions, updates):
        """The latents after the calls up to ``last``, under one gate: each that computes, and those that reuse it.

        The latter are a loop of their own, since a graph's branch is handed the weights of the blocks within it, taken
        or not. With 57 blocks that takes a host longer than all that a reuse runs. Where kernels are told where the
        weights lie, one loop for all calls hands over less.
        """
        model, gate, shape = self.model, self.cache.gates[0], self.cache.shape
        shapes = reached_shapes(model, gate, latents.shape if gate.whole_model else shape, text_shape)
        if not gate.whole_model:
            shapes["pending"] = model.pending_shapes(shape[0])
        # Never read; no constants, as which MindSpore 2.10.0 then takes what the loop puts in their places.
        reached = filled(shapes, call.to(latents.dtype))
        state = self.begun(latents)
        # MindSpore 2.7.0 and 2.10.0 never free what a condition in this place was handed when it ended the loop: a
        # kilobyte a weight and launch.
        while True:
            call, state, reached = self.reused_calls(call, last, state, reached, conditions, updates)
            if call >= last:
                break
            given = self.condition(call, conditions)[1]
            given = given if gate.whole_model else model.resume(given, reached["pending"])
            image, text = compute(model, gate, reached, given)
            state = self.advance(call, state, self.output(image, text, given), updates)
            call = call + 1
        return self.latents(state)

    def reused_calls(self, call, last, state, reached, conditions, updates):
        """Calls that reuse, up to one that has to compute, under the one gate; what that begins with is handed over.

        That is ``reached``: what ``approach`` returns, and as "pending" what of ``given`` depends on the step.
        """
        model, gate = self.model, self.cache.gates[0]
        while call < last:
            text, given = self.condition(call, conditions)
            reached = approach(model, gate, 0, begin(model, self.cache, self.latents(state)), text, given)
            # A reuse of the whole model does not embed the time, and has none to hand over.
            if not gate.whole_model:
                reached["pending"] = model.pending(given)
            if not gate.decide(part(reached, "probes")):
                break
            image, text = reuse(gate, reached)
            state = self.advance(call, state, self.output(image, text, given), updates)
            call = call + 1
        return call, state, reached

    def condition(self, call, conditions):
        """What a call gets beside the latents: the text stream, and what every block gets; turns the cache to it."""
        branch, common, times = conditions
        step, branches = call, self.cache.branches
        if branches > 1:
            step, number = call // branches, call % branches
            branch = of_branch(branch, number)
            self.cache.select(number)
        return self.model.condition(ops.gather(times, step, 0), branch, common)

    def output(self, image, text, given):
        """The velocity from the streams behind the one gate's span."""
        start = self.cache.gates[0].span(*self.model.stacks)[1]
        return velocity(self.model, self.cache, start, image, text, given)

    def begun(self, latents):
        """What a call finds: the latents, under true CFG with the velocity of the call before."""
        return latents if self.cache.branches == 1 else (latents, ops.zeros_like(latents))

    def latents(self, state):
        """The latents that a call finds."""
        return state if self.cache.branches == 1 else state[0]

    def advance(self, call, state, output, updates):
        """What the next call finds."""
        strides, true_cfg_scale = updates
        branches = self.cache.branches
        if self.pair is not None:
            both = self.pair.all_gather(output.expand_dims(0))
            output = self.model.guide(both[1], both[0], true_cfg_scale)
        if branches == 1:
            return euler_step(state, output, strides, call)
        latents, positive = state
        guided = self.model.guide(output, positive, true_cfg_scale)
        moved = euler_step(latents, guided, strides, call // branches)
        return ops.where(call % branches == 1, moved, latents), output

    def run(self, inputs, latents, start, stop, wait=True):
        """The latents after steps start to stop - 1, ``inputs(latents, start, stop)`` being the loop's arguments.

        With ``wait`` they are there when this returns, and the loop knows how long a step takes.
        """
        begin, tokens = time.perf_counter(), latents.shape[1]
        latents = inputs.all_of(self(*inputs(latents, start, stop)))
        latents = latents if latents.shape[1] == tokens else latents[:, :tokens]
        if wait:
            latents.asnumpy()
            self.step_seconds = (time.perf_counter() - begin) / (stop - start)
        return latents

    def piece_of(self, steps, seconds):
        """How many of so many steps to run at once, in pieces of equal length that take about so long each."""
        if self.step_seconds is None:
            return 1
        pieces = max(round(steps * self.step_seconds / seconds), 1)
        return math.ceil(steps / pieces)

    def release(self):
        """Gives the cache's memory back."""
        self.cache.release()


def filled(shapes, value):
    """Tensors of these shapes, each full of a scalar; a dictionary or a tuple of them where there is one of shapes."""
    if isinstance(shapes, dict):
        return {name: filled(shape, value) for name, shape in shapes.items()}
    if len(shapes) > 0 and isinstance(shapes[0], int):
        return ops.broadcast_to(value, shapes)
    return tuple([filled(shape, value) for shape in shapes])


def of_branch(stacked, branch):
    """A branch's part of a tensor, of each in a tuple or a dictionary, or of None."""
    if stacked is None:
        return None
    if isinstance(stacked, tuple):
        return tuple([of_branch(each, branch) for each in stacked])
    if isinstance(stacked, dict):
        return {name: of_branch(each, branch) for name, each in stacked.items()}
    return ops.gather(stacked, branch, 0)


def euler_step(latents, velocity, strides, step):
    """x + (sigma' - sigma) v in float32: FlowMatchEulerDiscreteScheduler.step, without noise."""
    by_kernel = kernels.euler_step(latents, velocity, strides, step)
    if by_kernel is not None:
        return by_kernel
    return (latents.float() + ops.gather(strides, step, 0) * velocity.float()).to(latents.dtype)
