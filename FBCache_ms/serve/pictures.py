"""Pictures as bytes, how near they are to one another, and what latents show."""

import base64
import io

import numpy as np

PATCH = 4
"""A token of the latents is so many pixels of a preview in each direction."""

RIDGE = 1e-3
"""Keeps what few pictures do not tell near zero."""


def encoded(pixels, kind="png"):
    """Pixels (H, W, 3) of uint8 as the base64 of a file: png, jpeg or webp, the last two with losses."""
    from PIL import Image

    stream = io.BytesIO()
    how = {} if kind == "png" else {"quality": 95}
    Image.fromarray(pixels).save(stream, format=kind, **how)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def psnr(reference, pixels):
    """Peak signal-to-noise ratio of two pictures of uint8 in dB; None for equal ones."""
    error = np.mean((reference.astype(np.float64) - pixels) ** 2)
    return None if error == 0 else float(10 * np.log10(255**2 / error))


class Preview:
    """A linear map from a token of the latents to PATCH x PATCH pixels, learnt from finished pictures."""

    def __init__(self):
        self.squares = self.products = 0

    def learn(self, tokens, pixels):
        """Adds a finished picture: its tokens (S, C), row by row, and its pixels (H, W, 3) of uint8."""
        height, width = pixels.shape[:2]
        unit = round((height * width / len(tokens)) ** 0.5)
        rows, columns = height // unit, width // unit
        # A pixel of the preview is the mean of those that it stands for.
        small = pixels.reshape(rows, PATCH, unit // PATCH, columns, PATCH, unit // PATCH, 3).mean((2, 5)) / 255
        patches = small.transpose(0, 2, 1, 3, 4).reshape(len(tokens), -1)
        known = with_one(tokens)
        self.squares = self.squares + known.T @ known
        self.products = self.products + known.T @ patches

    def show(self, tokens, width, height):
        """A small picture of tokens (S, C), uint8, in the proportions of width to height."""
        unit = round((height * width / len(tokens)) ** 0.5)
        rows, columns = height // unit, width // unit
        size = len(self.squares)
        weights = np.linalg.solve(self.squares + RIDGE * np.trace(self.squares) / size * np.eye(size), self.products)
        patches = (with_one(tokens) @ weights).reshape(rows, columns, PATCH, PATCH, 3)
        small = patches.transpose(0, 2, 1, 3, 4).reshape(rows * PATCH, columns * PATCH, 3)
        return (small.clip(0, 1) * 255).round().astype(np.uint8)


def with_one(tokens):
    """Tokens (S, C) with a column of ones behind them, float64."""
    return np.concatenate([tokens.astype(np.float64), np.ones((len(tokens), 1))], 1)
