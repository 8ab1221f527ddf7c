"""Nodes for mindone's port of ComfyUI: a Flux pipeline, First-Block Cache on it, and pictures of it.

mindone 0.5.0's port has no diffusion model, so that its own loaders and samplers cannot run Flux. MODEL is a mindone
pipeline here, which patching nodes meet as ComfyUI's ModelPatcher.
"""

from dataclasses import dataclass, replace
from typing import Optional

import numpy as np

from FBCache_ms.config import OPTIONS, CacheConfig

THRESHOLD = "0 puts the cache off; FLUX.1-dev: careful 0.08, fast 0.12"

CATEGORY = "FBCache_ms"
DIFFUSION_MODEL = "diffusion_model"


@dataclass(frozen=True)
class FluxModel:
    """What goes along a MODEL link: our FluxPipeline, and the CacheConfig that it draws with; None for no cache."""

    pipe: object
    config: Optional[CacheConfig] = None

    def clone(self):
        """ModelPatcher.clone: the same weights, patched apart."""
        return replace(self)

    def get_model_object(self, name):
        """ModelPatcher.get_model_object. Raises ValueError for another name than diffusion_model."""
        if name != DIFFUSION_MODEL:
            raise ValueError(f"object_to_patch must be {DIFFUSION_MODEL}, not {name!r}")
        return self.pipe.transformer


class LoadFluxPipeline:
    """A folder or a name on a hub, as MODEL."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        checkpoint = {"default": "black-forest-labs/FLUX.1-dev", "tooltip": "folder or name of a diffusers checkpoint"}
        return {"required": {"checkpoint": ("STRING", checkpoint)}}

    def load(self, checkpoint):
        """Loads it for the device that is there. Raises OSError or ValueError for what is no such checkpoint."""
        from FBCache_ms import FluxPipeline, choose_device

        return (FluxModel(FluxPipeline.from_pretrained(checkpoint, device=choose_device())),)


class ApplyFBCacheOnModel:
    """Apply First Block Cache, with Comfy-WaveSpeed's inputs, defaults and limits.

    The probe is what the first block adds, as in ParaAttention; Comfy-WaveSpeed compares the stream behind that block,
    so its thresholds for Flux are others.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "object_to_patch": ("STRING", {"default": DIFFUSION_MODEL}),
                "residual_diff_threshold": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": THRESHOLD},
                ),
                "start": ("FLOAT", {"default": 0.0, **share, "tooltip": OPTIONS["start"].text}),
                "end": ("FLOAT", {"default": 1.0, **share, "tooltip": OPTIONS["end"].text}),
                "max_consecutive_cache_hits": (
                    "INT",
                    {"default": -1, "min": -1, "tooltip": "reuses in a row; -1: no limit, 0 puts the cache off"},
                ),
            }
        }

    def patch(self, model, object_to_patch, residual_diff_threshold, max_consecutive_cache_hits=-1, start=0.0, end=1.0):
        """A clone of the model that draws with the cache; the model itself where the inputs put it off.

        Raises ValueError for a model that is not mindone's FluxTransformer2DModel, and for inputs out of their limits.
        """
        from FBCache_ms.models import foreign_transformer

        if residual_diff_threshold <= 0 or max_consecutive_cache_hits == 0:
            return (model,)
        config = CacheConfig(
            residual_diff_threshold, start=start, end=end, max_consecutive_cache_hits=max_consecutive_cache_hits
        )
        model = model.clone()
        transformer = model.get_model_object(object_to_patch)
        reason = foreign_transformer(transformer)
        if reason:
            raise ValueError(reason)
        config.check_blocks(*transformer.cached_model.stacks)
        return (replace(model, config=config),)


class FluxTextToImage:
    """A prompt's pictures, as IMAGE: (B, H, W, 3) in [0, 1]."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "draw", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        size = {"default": 1024, "min": 16, "max": 16384, "step": 16}
        return {
            "required": {
                "model": ("MODEL",),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "width": ("INT", size),
                "height": ("INT", size),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
                "steps": ("INT", {"default": 28, "min": 1, "max": 1000}),
                "guidance": ("FLOAT", {"default": 3.5, "min": 0.0, "max": 100.0, "step": 0.1}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
            }
        }

    def draw(self, model, text, width, height, batch_size, steps, guidance, seed):
        """Draws with the model's CacheConfig."""
        import mindspore as ms

        images = model.pipe(
            text,
            width=width,
            height=height,
            num_images_per_prompt=batch_size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=np.random.default_rng(seed),
            output_type="np",
            cache_config=model.config,
        )[0]
        return (ms.Tensor(images),)


NODE_CLASS_MAPPINGS = {
    "LoadFluxPipeline": LoadFluxPipeline,
    "ApplyFBCacheOnModel": ApplyFBCacheOnModel,
    "FluxTextToImage": FluxTextToImage,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadFluxPipeline": "Load Flux Pipeline (mindone)",
    "ApplyFBCacheOnModel": "Apply First Block Cache",
    "FluxTextToImage": "Flux Text to Image (mindone)",
}
