"""The whole denoise loop of Flux as one graph."""

import math
import time

import mindspore as ms
from mindspore import nn, ops

from ..models.transformer_flux_withFBCache import (
    approach,
    cached_step,
    compute,
    embed_condition,
    embed_prompt,
    embed_time,
    enter,
    project_time,
    reached_shapes,
    reuse,
    stacks,
    velocity,
)
from ..rules.schedules import MAX_STEPS


class FluxDenoiseLoop(nn.Cell):
    """Every step of a generation, or a piece of them, in one call.

    Args:
        transformer: mindone's FluxTransformer2DModel.
        cache_context: a CacheContext for the latents' shape, with two branches for true CFG.
    """

    def __init__(self, transformer, cache_context):
        super().__init__(auto_prefix=False)
        self.transformer = transformer
        self.cache = cache_context
        self.step_seconds = None
        # ms.export looks for the graph's Parameters in the Cell that it is given.
        for parameter in cache_context.parameters():
            self.insert_param_to_cell(parameter.name, parameter)

    def construct(
        self,
        latents,
        prompt_embeds,
        pooled_prompt_embeds,
        text_ids,
        latent_image_ids,
        guidance,
        true_cfg_scale,
        timesteps,
        sigmas,
        start,
        stop,
        limits,
        coordinates,
        numbers,
        attention_kwargs=None,
    ):
        """The latents after steps start to stop - 1.

        Args:
            latents: (B, S, C), packed.
            prompt_embeds, pooled_prompt_embeds: (B, T, E) and (B, P) a branch, stacked on a leading axis.
            text_ids, latent_image_ids: (T, 3), (S, 3).
            guidance: (B,), or None for a model without guidance embedding.
            true_cfg_scale: scalar; not used with one branch.
            timesteps, sigmas: (N,) in [0, 1000] and (N + 1,) in [0, 1], padded to any fixed length.
            start, stop: int32 scalars from 0 on; a start of 0 begins a generation, any other goes on with the last. The
                loop ends with the timesteps, or at 1000, where stop is beyond.
            limits, coordinates, numbers: what gates.knobs makes of a CacheConfig.
            attention_kwargs: what attention gets beside the streams, tensors and tuples of them by name, a branch each
                on a leading axis; None for nothing.
        """
        transformer, cache = self.transformer, self.cache
        batch, dtype = latents.shape[0], latents.dtype
        contexts, rotary = embed_condition(
            transformer, prompt_embeds.reshape((-1,) + prompt_embeds.shape[2:]), text_ids, latent_image_ids
        )
        contexts = contexts.reshape((cache.branches, batch) + contexts.shape[1:])
        pooled = pooled_prompt_embeds.reshape((-1,) + pooled_prompt_embeds.shape[2:])
        terms = embed_prompt(transformer, guidance, pooled, dtype)
        stacked = contexts, terms[-1].reshape((cache.branches, batch) + terms[-1].shape[1:]), attention_kwargs
        if cache.branches == 1:
            stacked = of_branch(stacked, ms.Tensor(0, ms.int32))
        # Each step's sinusoids, for every latent, and its stride: a step has one operator to read either.
        times = project_time(transformer, timesteps.to(dtype) / 1000, dtype).expand_dims(1)
        times = times.broadcast_to((times.shape[0], batch, times.shape[2]))
        conditions = stacked, terms[:-1], times, rotary
        updates = sigmas[1:] - sigmas[:-1], true_cfg_scale
        cache.knobs.set(limits, coordinates, numbers)
        if start == 0:
            for branch in range(cache.branches):
                cache.select(branch)
                cache.reset()
        # One loop over the calls of the transformer, two a step under true CFG: an NPU's host reads every condition.
        stop = ops.minimum(stop, min(timesteps.shape[0], MAX_STEPS))
        call, last = start * cache.branches, stop * cache.branches
        if len(cache.gates) == 1:
            return self.computed_and_reused(call, last, latents, contexts.shape[1:], conditions, updates)
        positive = ops.zeros_like(latents)
        while call < last:
            context, given = self.condition(call, conditions)
            output = cached_step(transformer, cache, latents, context, given)
            latents, positive = self.advance(call, latents, positive, output, updates)
            call = call + 1
        return latents

    def computed_and_reused(self, call, last, latents, text_shape, conditions, updates):
        """The latents after the calls up to ``last``, under one gate: each that computes, and those that reuse it."""
        transformer, gate, shape = self.transformer, self.cache.gates[0], self.cache.shape
        temb = shape[0], shape[2]
        stream = latents.shape if gate.whole_model else shape
        shapes = (temb,) + reached_shapes(transformer, gate, stream, text_shape, temb)
        # Never read; no constants, as which MindSpore 2.10.0 then takes what the loop puts in their places.
        pending = tuple([ops.broadcast_to(call.to(latents.dtype), shape) for shape in shapes])
        positive = ops.zeros_like(latents)
        call, latents, positive, pending = reuses(self, call, last, latents, positive, pending, conditions, updates)
        while call < last:
            given = self.condition(call, conditions)[1]
            # A reuse of the whole model does not embed the time, and has none to hand over.
            given = given if gate.whole_model else pending[:1] + given[1:]
            image, text = compute(transformer, gate, pending[1:], given)
            latents, positive = self.advance(call, latents, positive, self.output(image, text, given), updates)
            call, latents, positive, pending = reuses(
                self, call + 1, last, latents, positive, pending, conditions, updates
            )
        return latents

    def condition(self, call, conditions):
        """What a call gets beside the latents: the text stream, and what every block gets; turns the cache to it."""
        stacked, terms, times, rotary = conditions
        step, branches = call, self.cache.branches
        if branches > 1:
            step, branch = call // branches, call % branches
            stacked = of_branch(stacked, branch)
            self.cache.select(branch)
        context, prompt, attention_kwargs = stacked
        temb = embed_time(self.transformer, ops.gather(times, step, 0), terms + (prompt,))
        return context, (temb, rotary, attention_kwargs, None, None, False)

    def output(self, image, text, given):
        """The velocity from the streams behind the one gate's span."""
        return velocity(
            self.transformer, self.cache, self.cache.gates[0].span(*stacks(self.transformer))[1], image, text, given
        )

    def advance(self, call, latents, positive, output, updates):
        """The latents after a call, and under true CFG the velocity that the negative prompt's call finds."""
        strides, true_cfg_scale = updates
        branches = self.cache.branches
        if branches == 1:
            return euler_step(latents, output, ops.gather(strides, call, 0)), positive
        guided = output + true_cfg_scale.to(latents.dtype) * (positive - output)
        moved = euler_step(latents, guided, ops.gather(strides, call // branches, 0))
        return ops.where(call % branches == 1, moved, latents), output

    def run(self, inputs, latents, start, stop, wait=True):
        """The latents after steps start to stop - 1, ``inputs(latents, start, stop)`` being the loop's arguments.

        With ``wait`` they are there when this returns, and the loop knows how long a step takes.
        """
        begin = time.perf_counter()
        latents = self(*inputs(latents, start, stop))
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


def reuses(loop, call, last, latents, positive, pending, conditions, updates):
    """Calls that reuse, up to one that has to compute, under the one gate: (call, latents, positive, pending).

    ``pending`` is what the computing call begins with, its modulation vector and what ``approach`` returns. The
    loop is one of its own, since a graph's branch is handed the weights of the blocks within it, taken or not,
    and with 57 blocks that takes a CPU's host longer than all that a reuse runs. It is no method, since MindSpore holds
    one that a graph calls twice, and its cell with it, for good.
    """
    transformer, gate = loop.transformer, loop.cache.gates[0]
    while call < last:
        context, given = loop.condition(call, conditions)
        reached = approach(transformer, gate, 0, enter(transformer, loop.cache, latents), context, given)
        pending = (pending[:1] if gate.whole_model else given[:1]) + reached
        if not gate.decide(reached[2:]):
            break
        image, text = reuse(gate, reached)
        latents, positive = loop.advance(call, latents, positive, loop.output(image, text, given), updates)
        call = call + 1
    return call, latents, positive, pending


def of_branch(stacked, branch):
    """A branch's part of a tensor, of each in a tuple or a dictionary, or of None."""
    if stacked is None:
        return None
    if isinstance(stacked, tuple):
        return tuple([of_branch(each, branch) for each in stacked])
    if isinstance(stacked, dict):
        return {name: of_branch(each, branch) for name, each in stacked.items()}
    return ops.gather(stacked, branch, 0)


def euler_step(latents, velocity, stride):
    """x + (sigma' - sigma) v in float32: FlowMatchEulerDiscreteScheduler.step, without noise."""
    return (latents.float() + stride * velocity.float()).to(latents.dtype)
