"""A transformer whose every block adds what it is told to, so that the cache can be driven with any probes."""

import numpy as np

import mindspore as ms
from mindspore import nn, ops

from FBCache_ms.cache.context import CacheContext
from FBCache_ms.cache.gates import knobs
from FBCache_ms.models.transformer_flux_withFBCache import cached_step

DOUBLES, SINGLES = 3, 4
BATCH, TOKENS, TEXT, WIDTH = 2, 3, 2, 4
MAX_LENGTH = 24


class Same(nn.Cell):
    """A norm that changes nothing."""

    eps = 1.0

    def construct(self, streams):
        return streams


class Zeros(nn.Cell):
    """A feed-forward layer that adds nothing."""

    kernel_weights = None

    def construct(self, streams):
        return ops.zeros_like(streams)


class Block(nn.Cell):
    """A block whose attention gives its rows of what stands in for the rotary table, (image, text), and nothing else.

    The modulated input is what stands in for the modulation vector.
    """

    kernel_weights = None

    def __init__(self, index):
        super().__init__()
        self.index = index
        self.one, self.zero = ops.ones((BATCH, WIDTH), ms.float32), ops.zeros((BATCH, WIDTH), ms.float32)

    def construct(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs):
        image, text = image_rotary_emb
        return encoder_hidden_states + text[self.index], hidden_states + image[self.index]


class Double(Block):
    """The parts of a FluxTransformerBlock."""

    def __init__(self, index):
        super().__init__(index)
        self.norm2 = self.norm2_context = Same()
        self.ff = self.ff_context = Zeros()

    def norm1(self, image, emb):
        return emb, self.one, self.zero, self.zero, self.zero

    def norm1_context(self, text, emb):
        return text, self.one, self.zero, self.zero, self.zero

    def attn(self, hidden_states, encoder_hidden_states, image_rotary_emb):
        return image_rotary_emb[0][self.index], image_rotary_emb[1][self.index]


class Single(Block):
    """The parts of a FluxSingleTransformerBlock."""

    def norm(self, streams, emb):
        return streams, self.one

    def attn(self, hidden_states, image_rotary_emb):
        image, text = image_rotary_emb
        return ops.concat((text[self.index], image[self.index]), 1)

    def proj_mlp(self, streams):
        return streams

    def act_mlp(self, streams):
        return streams

    def proj_out(self, streams):
        return streams[..., :WIDTH]


class Transformer(nn.Cell):
    """mindone's names around such blocks; what goes in comes out."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.CellList([Double(index) for index in range(DOUBLES)])
        self.single_transformer_blocks = nn.CellList([Single(index) for index in range(DOUBLES, DOUBLES + SINGLES)])

    def x_embedder(self, image):
        return image

    def norm_out(self, image, temb):
        return image

    def proj_out(self, image):
        return image


class Loop(nn.Cell):
    """The denoise loop without an embedding and a scheduler."""

    def __init__(self, cache):
        super().__init__(auto_prefix=False)
        self.transformer, self.cache = Transformer(), cache

    def construct(self, latents, context, image, text, modulated, outputs, start, stop, limits, coordinates, numbers):
        self.cache.knobs.set(limits, coordinates, numbers)
        if start == 0:
            self.cache.reset()
        step = start
        while step < stop:
            given = (modulated[step], (image[step], text[step]), None, None, None, False)
            outputs[step] = cached_step(self.transformer, self.cache, latents[step], context, given)
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


def replay(config, streams, sigmas=None, cut=0, progress=None):
    """What the graph makes of these streams: the outputs (N, B, S, D) and the CacheStats; in two pieces at ``cut``."""
    steps = streams.steps
    sigmas = np.linspace(1, 0, steps, endpoint=False) if sigmas is None else sigmas
    # A program that ran in this process may have made MindSpore deterministic, for which it compiles anew.
    key = config.structure, ms.get_context("deterministic")
    if key not in _LOOPS:
        shape = (BATCH, TOKENS, WIDTH)
        cache = CacheContext(*shape, config=config, text_len=TEXT, steps=steps, sigmas=sigmas, channels=WIDTH)
        _LOOPS[key] = Loop(cache)
    loop = _LOOPS[key]
    numbers = tuple(map(ms.Tensor, knobs(config, steps, sigmas, progress)))
    inputs = [streams.latents, streams.context, streams.image, streams.text, streams.modulated]
    outputs = ms.Tensor(np.zeros_like(streams.latents))
    for start, stop in ((0, cut), (cut, steps)) if cut else ((0, steps),):
        bounds = ms.Tensor(start, ms.int32), ms.Tensor(stop, ms.int32)
        outputs = loop(*map(ms.Tensor, inputs), outputs, *bounds, *numbers)
    assert len(loop.compile_cache) == 1, loop.compile_cache
    return outputs.asnumpy()[:steps], loop.cache.stats()
