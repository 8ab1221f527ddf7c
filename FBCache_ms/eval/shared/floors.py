"""How near cached pictures have to be to the uncached ones."""

from pathlib import Path

from FBCache_ms.runtime.checkpoint import TINY_FLUX

FLOORS = {
    (0.05, 0): {"psnr": 66, "ssim": 0.9995},
    (0.08, 0): {"psnr": 57, "ssim": 0.999},
    (0.12, 0): {"psnr": 50, "ssim": 0.998},
    (0.08, 1): {"psnr": 62, "ssim": 0.999},
    (0.12, 1): {"psnr": 53, "ssim": 0.999},
    (0.2, 1): {"psnr": 49, "ssim": 0.998},
}
"""{(threshold, TaylorSeer's order): lowest mean PSNR in dB and SSIM} of the embedded checkpoint, 28 steps, float32."""

FLOOR_ELSEWHERE = {"psnr": 12, "ssim": 0.3}
"""For a checkpoint that nobody has measured: two pictures of one prompt and other noise are further apart than this."""

MOST_LOST_CLIP_SCORE = 5e-3
"""How far the mean CLIP score, a cosine, may lie from that of the uncached pictures."""


def is_embedded(ckpt):
    """Whether a checkpoint is the embedded one.

    It has learnt one size; at others its pictures show little of their prompts, and a CLIP score says nothing.
    """
    return Path(ckpt).resolve() == TINY_FLUX.resolve()
