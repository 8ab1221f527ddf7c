"""The whole denoise loop of Flux as one graph."""

import mindspore as ms
from mindspore import nn, ops

from .transformer_flux_withFBCache import cached_step, embed_condition, embed_prompt, embed_time, project_time


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
        schedule,
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
            start, stop: int32 scalars; a start of 0 begins a generation, any other goes on with the last.
            schedule, coordinates, numbers: what gates.knobs makes of a CacheConfig.
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
        given = contexts, terms[-1].reshape((cache.branches, batch) + terms[-1].shape[1:]), attention_kwargs
        if cache.branches == 1:
            given = of_branch(given, ms.Tensor(0, ms.int32))
        # Each step's sinusoids, for every latent, and its stride: a step has one operator to read either.
        times = project_time(transformer, timesteps.to(dtype) / 1000, dtype).expand_dims(1)
        times = times.broadcast_to((times.shape[0], batch, times.shape[2]))
        strides = sigmas[1:] - sigmas[:-1]
        cache.knobs.set(schedule, coordinates, numbers)
        if start == 0:
            for branch in range(cache.branches):
                cache.select(branch)
                cache.reset()
        # One loop over the calls of the transformer, two a step under true CFG: an NPU's host reads every condition.
        call, positive = start * cache.branches, ops.zeros_like(latents)
        while call < stop * cache.branches:
            step, branch, here = call, 0, given
            if cache.branches > 1:
                step, branch = call // cache.branches, call % cache.branches
                here = of_branch(given, branch)
                cache.select(branch)
            context, prompt, chosen = here
            temb = embed_time(transformer, ops.gather(times, step, 0), terms[:-1] + (prompt,))
            velocity = cached_step(transformer, cache, latents, context, temb, rotary, chosen)
            stride = ops.gather(strides, step, 0)
            if cache.branches == 1:
                latents = euler_step(latents, velocity, stride)
            else:
                guided = velocity + true_cfg_scale.to(dtype) * (positive - velocity)
                latents = ops.where(branch == 1, euler_step(latents, guided, stride), latents)
                positive = velocity
            call = call + 1
        return latents

    def release(self):
        """Gives the cache's memory back."""
        self.cache.release()


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
