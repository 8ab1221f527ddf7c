"""Texts of any length in one graph."""

import numpy as np

import mindspore as ms
from mindspore import mint

BUCKETS = (64, 128, 256, 512, 1024, 2048)
"""Texts are padded to the least of these lengths that holds them, so that all of one bucket share a graph."""


def padded_text(text, mask, least=0):
    """A text (B, T, E) and its mask (B, T), or None for all of it, padded to the least bucket, the mask float32.

    The bucket is one that holds ``least`` tokens, too.

    Raises ValueError for a mask of another shape, or a text longer than the largest bucket.
    """
    batch, length = text.shape[:2]
    longest = max(length, least)
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"the text's mask is {tuple(mask.shape)}, its embeddings are {tuple(text.shape)}")
    bucket = next((bucket for bucket in BUCKETS if bucket >= longest), None)
    if bucket is None:
        raise ValueError(f"the text is {longest} tokens long; the cache takes {BUCKETS[-1]} at most")
    mask = np.ones((batch, length)) if mask is None else mask.asnumpy()
    mask = ms.Tensor(np.pad(mask, ((0, 0), (0, bucket - length))), ms.float32)
    if bucket > length:
        text = mint.cat((text, mint.zeros((batch, bucket - length, text.shape[2]), dtype=text.dtype)), dim=1)
    return text, mask


def keys_of(mask, text_len, tokens):
    """Which keys attention sees, (B, K), of a text's whole mask (B, T): a device's text_len, its image's tokens, and so
    on for every device that shares the picture; ``tokens`` are those of one."""
    devices = mask.shape[1] // text_len
    image = mint.ones((mask.shape[0], devices, tokens - text_len), dtype=mask.dtype)
    keys = mint.cat((mask.reshape((-1, devices, text_len)), image), dim=2)
    return keys.reshape((mask.shape[0], -1)) > 0
