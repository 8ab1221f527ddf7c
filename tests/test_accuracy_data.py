"""What flux_accuracy_test.py draws and what it demands: prompts of our own, sizes, thresholds, orders and floors."""

from pathlib import Path

from FBCache_ms.checkpoint import TINY_FLUX, image_size, image_unit
from FBCache_ms.config import CacheConfig

PROMPTS = 4
"""How many of our own prompts are drawn."""

STEPS = 28
MOST_LOST_CLIP_SCORE = 5e-3
"""How far the mean CLIP score, a cosine, may lie from that of the uncached pictures."""

FLOORS = {
    (0.05, 0): {"psnr": 66, "ssim": 0.9995},
    (0.08, 0): {"psnr": 57, "ssim": 0.999},
    (0.12, 0): {"psnr": 50, "ssim": 0.998},
    (0.08, 1): {"psnr": 62, "ssim": 0.999},
    (0.12, 1): {"psnr": 53, "ssim": 0.999},
    (0.2, 1): {"psnr": 49, "ssim": 0.998},
}
"""{(threshold, TaylorSeer's order): lowest mean PSNR in dB and SSIM} of the embedded checkpoint."""

FLOOR_ELSEWHERE = {"psnr": 12, "ssim": 0.3}
"""For a checkpoint that nobody has measured: two pictures of one prompt and other noise are further apart than this."""


def config_of(threshold, order):
    """The CacheConfig of a key of FLOORS."""
    return CacheConfig(residual_diff_threshold=threshold, taylorseer_derivative=order)


def sizes(ckpt):
    """Heights and widths in pixels: the model's own, and one that is not square."""
    own, unit = image_size(ckpt), image_unit(ckpt)
    return [own, own], [own * 3 // 4 // unit * unit, own * 5 // 4 // unit * unit]


def is_embedded(ckpt):
    """Whether a checkpoint is the embedded one.

    It has learnt one size; at others its pictures show little of their prompts, and a CLIP score says nothing.
    """
    return Path(ckpt).resolve() == TINY_FLUX.resolve()


def test_the_sizes_are_ones_that_the_model_can_draw():
    assert sizes(TINY_FLUX) == ([64, 64], [48, 80])
