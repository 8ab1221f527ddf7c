"""FluxPipeline, and what puts the cache into other pipelines, by their published names."""

from .pipelines.flux import FluxPipeline, apply_cache_on_pipe, remove_cache_from_pipe

__all__ = ["FluxPipeline", "apply_cache_on_pipe", "remove_cache_from_pipe"]
