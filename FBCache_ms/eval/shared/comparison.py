"""A picture with the cache beside the same without, and the difference between them."""

import math

import numpy as np

LEAST_SIDE = 256
"""Pixels that the longer side of a small picture is enlarged to, or nearly."""

TEXT, GAP, PAPER = 15, 8, (224, 224, 224)
"""Pixels of a line of text and between the panels; the colour behind them, on which white pictures end too."""


def amplification(difference):
    """The least power of two, from 1 on, that brings the largest of the differences, in [0, 1], to 1 or above."""
    largest = float(np.max(difference))
    return 2 ** max(math.ceil(-math.log2(largest)), 0) if largest else 1


def side_by_side(reference, picture, labels):
    """One picture of three panels: the uncached picture, the amplified difference, the cached picture.

    Args:
        reference, picture: float arrays (H, W, 3) in [0, 1].
        labels: two lines of text over each panel; "{times}" in them becomes the amplification.

    The difference is |picture - reference|, black where they are equal. Small pictures are enlarged by a whole factor.
    """
    from PIL import Image, ImageDraw, ImageFont

    difference = np.abs(np.asarray(picture, np.float64) - reference)
    times = amplification(difference)
    height, width = difference.shape[:2]
    factor = max(LEAST_SIDE // max(height, width), 1)
    panels = [
        Image.fromarray((each * 255).round().astype(np.uint8)).resize(
            (width * factor, height * factor), Image.Resampling.NEAREST
        )
        for each in (reference, np.minimum(difference * times, 1), picture)
    ]
    font = ImageFont.load_default(TEXT)
    texts = [[line.format(times=times) for line in lines] for lines in labels]
    column = max(width * factor, math.ceil(max(font.getlength(line) for lines in texts for line in lines)))
    top = 2 * (TEXT + GAP // 2) + GAP
    page = Image.new("RGB", (3 * column + 4 * GAP, top + height * factor + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for place, (panel, lines) in enumerate(zip(panels, texts)):
        left = GAP + place * (column + GAP)
        for number, line in enumerate(lines):
            draw.text((left, GAP + number * (TEXT + GAP // 2)), line, fill=0, font=font)
        page.paste(panel, (left, top + GAP))
    return page
