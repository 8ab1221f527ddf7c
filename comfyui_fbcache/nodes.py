"""Nodes for ComfyUI that draw on an FBCache_ms server: they need nothing but ComfyUI itself."""

import base64
import io
import os
from dataclasses import dataclass, field, replace

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from . import client

CATEGORY = "FBCache"
DIFFUSION_MODEL = "diffusion_model"
OFF = "none"
"""What the server calls a picture without the cache."""

PRESETS_OWN = -1.0
"""A threshold that leaves the preset's in place."""

SERVER = {"default": "http://127.0.0.1:8000", "tooltip": "address of `fbcache serve`"}
KEY = {"default": "", "tooltip": "API key; saved in the workflow. Empty: the environment's FBCACHE_API_KEY, or none"}
WINDOW = {"min": 0.0, "max": 1.0, "step": 0.01}
START = {"default": 0.0, **WINDOW, "tooltip": "share of the steps before which none is reused"}
END = {"default": 1.0, **WINDOW, "tooltip": "share of the steps behind which none is reused"}
HITS = {"default": -1, "min": -1, "tooltip": "reuses in a row; -1: no limit, 0 puts the cache off"}
THRESHOLD = {"min": PRESETS_OWN, "max": 1.0, "step": 0.001}


@dataclass(frozen=True)
class ServedModel:
    """What goes along a MODEL link of these nodes: where to draw, and with which settings of the cache.

    Args:
        server, key: address and API key.
        cache: a preset, a tag or "none"; empty for the server's first preset.
        numbers: {field of the server's ``fbcache``: number}.
    """

    server: str
    key: str
    cache: str = ""
    numbers: dict = field(default_factory=dict)

    def with_numbers(self, threshold, start, end, max_consecutive_cache_hits):
        """The same with other numbers of the cache; off where they put it off."""
        if max_consecutive_cache_hits == 0:
            return replace(self, cache=OFF, numbers={})
        names = ("start", "end", "max_consecutive_cache_hits", "threshold")
        usual = (0.0, 1.0, -1, PRESETS_OWN)
        values = (start, end, max_consecutive_cache_hits, threshold)
        numbers = {name: value for name, value, each in zip(names, values, usual) if value != each}
        return replace(self, numbers=numbers)


class LoadServedModel:
    """An FBCache_ms server, as MODEL."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"server": ("STRING", SERVER), "api_key": ("STRING", KEY)}}

    def load(self, server, api_key):
        """Names it; it is asked once something is to be drawn."""
        return (ServedModel(server, api_key),)


class ApplyFBCacheOnModel:
    """Apply First Block Cache, with Comfy-WaveSpeed's inputs, defaults and limits, on a served MODEL.

    The server compares what the first block adds, as ParaAttention does. Comfy-WaveSpeed compares the stream behind
    that block, so its thresholds for Flux are others.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        threshold = {"default": 0.0, **THRESHOLD, "min": 0.0}
        return {
            "required": {
                "model": ("MODEL",),
                "object_to_patch": ("STRING", {"default": DIFFUSION_MODEL}),
                "residual_diff_threshold": (
                    "FLOAT",
                    {**threshold, "tooltip": "0 puts the cache off; FLUX.1-dev: careful 0.08, fast 0.12"},
                ),
                "start": ("FLOAT", START),
                "end": ("FLOAT", END),
                "max_consecutive_cache_hits": ("INT", HITS),
            }
        }

    def patch(self, model, object_to_patch, residual_diff_threshold, max_consecutive_cache_hits=-1, start=0.0, end=1.0):
        """A MODEL that is drawn with the cache. Raises ValueError for a MODEL that no server has."""
        checked(model)
        if object_to_patch != DIFFUSION_MODEL:
            raise ValueError(f"object_to_patch must be {DIFFUSION_MODEL}, not {object_to_patch!r}")
        hits = 0 if residual_diff_threshold <= 0 else max_consecutive_cache_hits
        return (model.with_numbers(residual_diff_threshold, start, end, hits),)


class DrawOnServer:
    """A prompt's pictures, drawn by the server, as IMAGE: (B, H, W, 3) in [0, 1]."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "draw", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "server": ("STRING", SERVER),
                "api_key": ("STRING", KEY),
                "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "size": ("STRING", {"default": "auto", "tooltip": "WIDTHxHEIGHT; auto: the server's first"}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 10}),
                "steps": ("INT", {"default": 28, "min": 1, "max": 1000}),
                "preset": ("STRING", {"default": "", "tooltip": "a preset, a tag or none; empty: the server's first"}),
                "threshold": (
                    "FLOAT",
                    {"default": PRESETS_OWN, **THRESHOLD, "tooltip": "in place of the preset's; -1: the preset's"},
                ),
                "start": ("FLOAT", START),
                "end": ("FLOAT", END),
                "max_consecutive_cache_hits": ("INT", HITS),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
            },
            "optional": {
                "model": (
                    "MODEL",
                    {"tooltip": "of Apply First Block Cache: its server and cache in place of those of this node"},
                ),
            },
        }

    def draw(
        self,
        server,
        api_key,
        prompt,
        size,
        batch_size,
        steps,
        preset,
        threshold,
        start,
        end,
        max_consecutive_cache_hits,
        seed,
        model=None,
    ):
        """Draws, with ComfyUI's bar, preview and interrupt. Raises client.ServerError with the server's words."""
        if model is None:
            model = ServedModel(server, api_key, preset)
            model = model.with_numbers(threshold, start, end, max_consecutive_cache_hits)
        checked(model)
        fields = {"prompt": prompt, "n": batch_size, "size": size, "num_inference_steps": steps, "seed": seed}
        if model.cache:
            fields["cache"] = model.cache
        if model.numbers:
            fields["fbcache"] = model.numbers
        bar = comfy.utils.ProgressBar(batch_size * steps)

        def on_step(step):
            preview = None if step["b64_json"] is None else ("JPEG", opened(step["b64_json"]), 512)
            bar.update_absolute(step["index"] * steps + step["step"], preview=preview)

        check = comfy.model_management.throw_exception_if_processing_interrupted
        key = model.key or os.environ.get("FBCACHE_API_KEY", "")
        found = client.draw(model.server, key, fields, check, on_step)
        pixels = np.stack([np.asarray(opened(each["b64_json"]), np.float32) / 255 for each in found])
        return (torch.from_numpy(pixels),)


def checked(model):
    """Raises ValueError for a MODEL of another node."""
    if not isinstance(model, ServedModel):
        raise ValueError(f"model must come from FBCache: served model; a {type(model).__name__} is on no server")


def opened(text):
    """The picture in base64's letters."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


NODE_CLASS_MAPPINGS = {
    "FBCacheServedModel": LoadServedModel,
    "ApplyFBCacheOnModel": ApplyFBCacheOnModel,
    "FBCacheFluxTextToImage": DrawOnServer,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FBCacheServedModel": "FBCache: served model",
    "ApplyFBCacheOnModel": "Apply First Block Cache",
    "FBCacheFluxTextToImage": "FBCache: Flux text to image",
}
