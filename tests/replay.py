"""A model whose every block adds what it is told to, so that the cache can be driven with any probes."""

import os

import numpy as np

import mindspore as ms
from mindspore import nn

from FBCache_ms.cache.context import CacheContext
from FBCache_ms.cache.gates import step_tables
from FBCache_ms.cache.step import cached_step
from FBCache_ms.models.base import Model

DOUBLES, SINGLES = 3, 4
BATCH, TOKENS, TEXT, WIDTH = 2, 3, 2, 4
MAX_LENGTH = 24


@ms.jit_class
class Adding(Model):
    """Blocks that add their rows of "image" and "text" in ``given``; the modulated input is there too, as it is.

    A divided block adds to the text stream later.
    """

    def __init__(self):
        self.stacks, self.width = (DOUBLES, SINGLES), WIDTH

    def embed(self, latents):
        return latents

    def block(self, index, image, text, given):
        return image + given["image"][index], text + given["text"][index]

    def head(self, image, given):
        return image

    def modulated(self, image, given):
        return given["modulated"]

    def divides(self, index):
        return True

    def divided_block(self, index, image, text, given):
        return image + given["image"][index], (text, given["text"][index])

    def text_behind(self, index, unfinished, given):
        return unfinished[0] + unfinished[1]


class Loop(nn.Cell):
    """The denoise loop without an embedding and a scheduler."""

    def __init__(self, cache):
        super().__init__(auto_prefix=False)
        self.model, self.cache = Adding(), cache

    def construct(self, latents, context, image, text, modulated, outputs, start, stop, limits, coordinates, numbers):
        self.cache.tables.set(limits, coordinates, numbers)
        if start == 0:
            self.cache.reset()
        step = start
        while step < stop:
            given = {"image": image[step], "text": text[step], "modulated": modulated[step]}
            outputs[step] = cached_step(self.model, self.cache, latents[step], context, given)
            step = step + 1
        return outputs


class Streams:
    """Random streams of a generation: each block's share and the modulated input change a little from step to step."""

    def __init__(self, seed, steps, change=0.3):
        rng = np.random.default_rng(seed)

        def walk(*shape):
            values = np.zeros((MAX_LENGTH, *shape), np.float32)
            values[:steps] = rng.normal(size=shape) + np.cumsum(rng.normal(size=(steps, *shape)) * change, 0)
            return values

        blocks = DOUBLES + SINGLES
        self.steps = steps
        self.latents = walk(BATCH, TOKENS, WIDTH)
        self.image, self.text = walk(blocks, BATCH, TOKENS, WIDTH), walk(blocks, BATCH, TEXT, WIDTH)
        self.modulated = walk(BATCH, TOKENS, WIDTH)
        self.context = rng.normal(size=(BATCH, TEXT, WIDTH)).astype(np.float32)

    def span(self, start, stop):
        """What the blocks start to stop - 1 add to the image stream, one entry a step."""
        return self.image[: self.steps, start:stop].sum(1)

    def both(self, start, stop):
        """What they add to text and image stream, side by side."""
        return np.concatenate([self.text[: self.steps, start:stop].sum(1), self.span(start, stop)], 2)


_LOOPS = {}


def key_of(config):
    """Whose loop is whose."""
    # What other files' tests do to a process, MindSpore may compile a loop anew for; and determinism, in any case.
    return config.structure, ms.get_context("deterministic"), os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]


def text_kept(config):
    """What the gate's buffer has of the text stream after a replay under this config, (K, B, T, D)."""
    return _LOOPS[key_of(config)].cache.gates[0].text_residual.derivatives.value.asnumpy()


def replay(config, streams, sigmas=None, cut=0, progress=None):
    """What the graph makes of these streams: the outputs (N, B, S, D) and the CacheStats; in two pieces at ``cut``."""
    steps = streams.steps
    sigmas = np.linspace(1, 0, steps, endpoint=False) if sigmas is None else sigmas
    key = key_of(config)
    if key not in _LOOPS:
        shape = (BATCH, TOKENS, WIDTH)
        cache = CacheContext(*shape, config=config, text_len=TEXT, steps=steps, sigmas=sigmas, channels=WIDTH)
        _LOOPS[key] = Loop(cache)
    loop = _LOOPS[key]
    numbers = tuple(map(ms.Tensor, step_tables(config, steps, sigmas, progress)))
    inputs = [streams.latents, streams.context, streams.image, streams.text, streams.modulated]
    outputs = ms.Tensor(np.zeros_like(streams.latents))
    for start, stop in ((0, cut), (cut, steps)) if cut else ((0, steps),):
        bounds = ms.Tensor(start, ms.int32), ms.Tensor(stop, ms.int32)
        outputs = loop(*map(ms.Tensor, inputs), outputs, *bounds, *numbers)
    assert len(loop.compile_cache) == 1, loop.compile_cache
    return outputs.asnumpy()[:steps], loop.cache.stats()
