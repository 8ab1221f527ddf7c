"""Small transformers and autoencoders of Qwen-Image and FLUX.2 with random weights, and one call of them, or mindone's.

Nothing is read from a checkpoint; the steps of these transformers are alike enough for a cache to reuse some.
"""

from contextlib import contextmanager
from inspect import signature

import numpy as np
from make_models import make_qwen_vae
from mindone.diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
)
from mindone.diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

import mindspore as ms
from mindspore import nn

from FBCache_ms.config import CacheConfig
from FBCache_ms.models import family
from FBCache_ms.models.qwenimage import of_one, rotary_table
from FBCache_ms.pipelines.cached_transformer import CachedStep, context_for, graph_input
from FBCache_ms.runtime.device import graph_mode

TEXT_WIDTH = 64
SIZES = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH}


def tensor(seed, *shape):
    """Normal numbers."""
    return ms.Tensor(np.random.default_rng(seed).standard_normal(shape), ms.float32)


def randomized(cell, seed=0):
    """The cell with normal numbers for weights, those of norms about 1."""
    rng = np.random.default_rng(seed)
    for name, parameter in cell.parameters_and_names():
        if not name.endswith("running_var"):
            mean = 1 if parameter.ndim == 1 and "norm" in name else 0
            parameter.set_data(ms.Tensor(rng.normal(mean, 0.1, parameter.shape), parameter.dtype))
    return cell


def smoothed(transformer):
    """The transformer with a time whose fast sinusoids count little, so that steps are alike."""
    embed = transformer.time_text_embed if hasattr(transformer, "time_text_embed") else transformer.time_guidance_embed
    weight, frequencies = embed.timestep_embedder.linear_1.weight, 1000 * 10000 ** (-np.arange(128) / 128)
    weight.set_data(ms.Tensor(weight.asnumpy() / (1 + np.tile(frequencies, 2) / 8), weight.dtype))
    return transformer


def qwen_transformer(blocks):
    """A QwenImageTransformer2DModel of so many blocks."""
    return smoothed(randomized(QwenImageTransformer2DModel(num_layers=blocks, axes_dims_rope=(8, 12, 12), **SIZES)))


def flux2_transformer(doubles, singles):
    """A Flux2Transformer2DModel of so many double and single blocks."""
    blocks = {"num_layers": doubles, "num_single_layers": singles}
    return smoothed(randomized(Flux2Transformer2DModel(in_channels=16, axes_dims_rope=(8, 8, 8, 8), **blocks, **SIZES)))


def qwen_vae(folder):
    """An AutoencoderKLQwenImage of a factor of 8, written into a folder and read from there."""
    make_qwen_vae(folder)
    return AutoencoderKLQwenImage.from_pretrained(str(folder))


def flux2_vae():
    """An AutoencoderKLFlux2 of a factor of 2."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    return randomized(vae)


class WholeRotary(nn.Cell):
    """In QwenEmbedRope's place: on a CPU in PyNative that loses the imaginary part of what it repeats."""

    def __init__(self, rope):
        super().__init__()
        self.settings = rope.theta, tuple(rope.axes_dim), rope.scale_rope

    def construct(self, shapes, lengths):
        cos, sin = (part.asnumpy()[:, ::2] for part in rotary_table(*self.settings, of_one(shapes), int(max(lengths))))
        table = (cos + 1j * sin).astype(np.complex64)
        return ms.Tensor(table[max(lengths) :]), ms.Tensor(table[: max(lengths)])


@contextmanager
def mindones_own(transformer):
    """PyNative, and mindone's forward of a transformer as it is meant."""
    own = transformer.pos_embed
    if isinstance(own, QwenEmbedRope):
        transformer.pos_embed = WholeRotary(own)
    try:
        with graph_mode(False):
            yield transformer
    finally:
        transformer.pos_embed = own


def mindones(transformer, **arguments):
    """The velocity that mindone's own forward gives."""
    with mindones_own(transformer):
        return transformer(**arguments, return_dict=False)[0].asnumpy()


def graph_inputs(transformer, **arguments):
    """What a family's file makes of a call's arguments, by the names that mindone's construct has for them."""
    file = family(transformer)
    return file.graph_inputs(transformer, {**dict.fromkeys(signature(file.KIND.construct).parameters), **arguments})


class CachedCalls:
    """Calls of a transformer through the cache, which computes every one; those of one shape share a graph."""

    def __init__(self, transformer, compiled=True):
        self.transformer, self.compiled, self.steps = transformer, compiled, {}

    def __call__(self, hidden_states, timestep, **arguments):
        given = graph_inputs(self.transformer, **arguments)
        inputs = graph_input({name: value for name, value in given.items() if value is not None})
        text_len = inputs["encoder_hidden_states"].shape[1]
        key = (*hidden_states.shape, text_len, *inputs)
        if key not in self.steps:
            context = context_for(
                self.transformer, CacheConfig(0.0), hidden_states, text_len, 1, 1, np.array([1.0, 0.0])
            )
            self.steps[key] = CachedStep(self.transformer, context)
        with graph_mode(self.compiled):
            return self.steps[key](hidden_states, timestep, inputs, {}).asnumpy()
