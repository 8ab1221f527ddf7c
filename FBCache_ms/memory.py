"""Bytes that a cache takes, by its published name."""

from .predict.memory import cache_bytes, cache_parts

__all__ = ["cache_bytes", "cache_parts"]
