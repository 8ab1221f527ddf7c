"""What flux_accuracy_test.py draws: prompts of our own, sizes, steps and settings."""

from FBCache_ms.config import CacheConfig
from FBCache_ms.runtime.checkpoint import TINY_FLUX, image_size, image_unit

PROMPTS = 4
"""How many of our own prompts are drawn."""

STEPS = 28


def config_of(threshold, order):
    """The CacheConfig of a key of floors.FLOORS."""
    return CacheConfig(residual_diff_threshold=threshold, taylorseer_derivative=order)


def sizes(ckpt):
    """Heights and widths in pixels: the model's own, and one that is not square."""
    own, unit = image_size(ckpt), image_unit(ckpt)
    return [own, own], [own * 3 // 4 // unit * unit, own * 5 // 4 // unit * unit]


def test_the_sizes_are_ones_that_the_model_can_draw():
    assert sizes(TINY_FLUX) == ([64, 64], [48, 80])
