"""What passes between the two processes."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Drawing:
    """One picture, as the drawing process is told of it.

    Args:
        prompt, negative_prompt: texts; the latter None for no true classifier-free guidance.
        width, height: in pixels, one of the sizes that are compiled.
        steps: of the denoise loop.
        scales: {guidance scale's name: number}.
        seed: of the noise.
        tag: the CacheConfig's.
        watched: whether every step is reported; otherwise the loop runs in pieces.
    """

    prompt: str
    negative_prompt: Optional[str]
    width: int
    height: int
    steps: int
    scales: dict
    seed: int
    tag: str
    watched: bool = False
