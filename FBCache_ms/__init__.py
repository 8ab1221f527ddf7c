"""FLUX.1, FLUX.2 and Qwen-Image on MindSpore with First-Block Cache, the whole denoise loop as one graph."""

from importlib import import_module

from .runtime.noise import leave_out_noise

_HOMES = {
    "CacheConfig": "config",
    "CacheContext": "cache.context",
    "CacheStats": "cache.stats",
    "ContextParallelConfig": "runtime.parallel",
    "Device": "runtime.device",
    "FBCache_transformer_construct": "models.transformer_flux_withFBCache",
    "Flux2Pipeline": "pipelines.flux2",
    "FluxDenoiseLoop": "models.transformer_flux_withFBCache",
    "FluxPipeline": "pipelines.flux",
    "QuantizeConfig": "runtime.quantize",
    "QwenImagePipeline": "pipelines.qwenimage",
    "TINY_FLUX": "runtime.checkpoint",
    "apply_cache_on_pipe": "pipelines.apply",
    "choose_device": "runtime.device",
    "dequantize": "runtime.quantize",
    "prepare_device": "runtime.device",
    "quantize": "runtime.quantize",
    "remove_cache_from_pipe": "pipelines.apply",
}
__all__ = list(_HOMES)

leave_out_noise()


def __getattr__(name):
    # Importing mindspore takes seconds: a program that only checks its arguments must not wait for it.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
