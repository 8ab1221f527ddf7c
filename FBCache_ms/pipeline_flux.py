"""FluxPipeline, and what puts the cache into other pipelines, by their published names."""

from .pipelines.apply import apply_cache_on_pipe, remove_cache_from_pipe
from .pipelines.flux import FluxPipeline

__all__ = ["FluxPipeline", "apply_cache_on_pipe", "remove_cache_from_pipe"]
