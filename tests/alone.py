"""Requests to a cached pipeline, each of which can be answered among others, or alone in a process of its own."""

import mindone.diffusers
import numpy as np

import mindspore as ms

from FBCache_ms import CacheConfig, FluxPipeline, apply_cache_on_pipe, prepare_device
from FBCache_ms.runtime.device import graph_mode

CIRCLE, SQUARE = "a big red circle in the center, blue background", "a small green square on the left"
REQUESTS = {
    "a picture": (CacheConfig(0.6), {"prompt": CIRCLE, "num_inference_steps": 8}),
    "the same shape": (CacheConfig(0.45), {"prompt": SQUARE, "num_inference_steps": 6, "guidance_scale": 1.0}),
    "true CFG": (
        CacheConfig(0.6),
        {"prompt": CIRCLE, "negative_prompt": SQUARE, "true_cfg_scale": 2.0, "num_inference_steps": 6},
    ),
    "a wider batch": (
        CacheConfig(0.6, taylorseer_derivative=1),
        {"prompt": [SQUARE, CIRCLE], "width": 96, "max_sequence_length": 24, "num_inference_steps": 7},
    ),
}
"""By name, what is set and what is given."""

FINISHED, INTERRUPTED, RAISED = "finished", "interrupted", "raised"
ENDS = (FINISHED, INTERRUPTED, RAISED)


def whole_loop(folder):
    """Our pipeline."""
    return FluxPipeline.from_pretrained(str(folder))


def cached_step(folder):
    """mindone's, with the cache on it."""
    prepare_device()
    return apply_cache_on_pipe(mindone.diffusers.FluxPipeline.from_pretrained(str(folder)))


def embedded(pipe, prompt, max_sequence_length=32, **settings):
    """A request with embeddings in place of its prompts, made operator by operator, which takes less time."""
    prompts = {"": prompt, **({"negative_": settings.pop("negative_prompt")} if "negative_prompt" in settings else {})}
    with graph_mode(False):
        for kind, text in prompts.items():
            embeds, pooled = pipe.encode_prompt(text, None, max_sequence_length=max_sequence_length)[:2]
            settings.update({f"{kind}prompt_embeds": embeds, f"{kind}pooled_prompt_embeds": pooled})
    return settings


def answer(pipe, name, end=FINISHED):
    """The latents and the cache's statistics; None where the request is broken off after its third step."""
    config, settings = REQUESTS[name]
    apply_cache_on_pipe(pipe, config)
    pipe.set_progress_bar_config(disable=True)

    def break_off(pipe, step, timestep, tensors):
        if step == 2 and end == RAISED:
            raise InterruptedError
        pipe._interrupt = step == 2
        return {}

    settings = {"height": 64, "width": 64, "output_type": "latent", **embedded(pipe, **settings)}
    if end != FINISHED:
        settings["callback_on_step_end"] = break_off
    with graph_mode(True):
        try:
            latents = pipe(**settings, generator=np.random.default_rng(0))[0]
        except InterruptedError:
            return None
    if end != FINISHED:
        return None
    stats = pipe.cache_stats if isinstance(pipe, FluxPipeline) else pipe.transformer.cache_stats
    return latents.asnumpy(), stats


def alone(make, folder, name):
    """The answer in this process, which has done nothing else."""
    ms.set_device("CPU")
    return answer(make(folder), name)
