"""CacheContext, by its published name."""

from .cache.context import CacheContext

__all__ = ["CacheContext"]
