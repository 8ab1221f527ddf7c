import math
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
from narrow import run_step
from scipy.special import erf

import mindspore as ms
from mindspore import mint, nn, ops

from FBCache_ms import CacheConfig, CacheContext
from FBCache_ms.models import blocks, transformer_flux_withFBCache
from FBCache_ms.pipelines.cached_transformer import CachedStep
from FBCache_ms.rules.arithmetic import finite_differences, relative_difference, weighted_sum
from FBCache_ms.runtime import cpu
from FBCache_ms.runtime.cpu import flux, stand_ins
from FBCache_ms.runtime.cpu import kernels as cpu_kernels
from FBCache_ms.runtime.device import prepare_device

FLOATS = (np.float32, np.float16)
RNG = np.random.default_rng(0)


def random(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def check(stand_in, expected, *arguments, **settings):
    """Compares a stand-in, compiled and run operator by operator, with NumPy's result."""
    arguments = [ms.Tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    for call in (ms.jit(stand_in), stand_in):
        result = call(*arguments, **settings)
        pairs = [(result, expected)] if isinstance(expected, np.ndarray) else list(zip(result, expected))
        assert isinstance(expected, np.ndarray) or len(result) == len(expected)
        for got, wanted in pairs:
            tolerance = 2e-3 if wanted.dtype == np.float16 else 2e-6
            assert got.shape == wanted.shape
            assert got.asnumpy().dtype == wanted.dtype
            np.testing.assert_allclose(got.asnumpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [*FLOATS, np.int32])
@pytest.mark.parametrize("shape, chunks, dim", [((2, 6), 3, 1), ((7, 2), 3, 0), ((2, 3, 8), 2, -1), ((5,), 5, 0)])
def test_chunk(shape, chunks, dim, dtype):
    x = (random(*shape) * 9).astype(dtype)
    size = -(-shape[dim] // chunks)
    check(stand_ins.chunk, np.split(x, range(size, shape[dim], size), dim), x, chunks, dim)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape, sizes, dim", [((2, 7), 3, 1), ((6, 2), (1, 2, 3), 0), ((2, 3, 8), (5, 3), -1), ((4, 4), 4, 0)]
)
def test_split(shape, sizes, dim, dtype):
    x = random(*shape, dtype=dtype)
    cuts = range(sizes, shape[dim], sizes) if isinstance(sizes, int) else np.cumsum(sizes)[:-1]
    check(stand_ins.split, np.split(x, cuts, dim), x, sizes, dim)


@pytest.mark.parametrize("dtype", [*FLOATS, np.int32])
@pytest.mark.parametrize("shape, dim", [((3,), 0), ((2, 3), -1), ((2, 3, 4), 1)])
def test_stack_and_unbind(shape, dim, dtype):
    x = (random(*shape) * 9).astype(dtype)
    check(stand_ins.stack, np.stack([x, x + x], dim), (ms.Tensor(x), ms.Tensor(x + x)), dim)
    check(stand_ins.unbind, list(np.moveaxis(x, dim, 0)), x, dim)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, n", [(1, 4), (3, 5)])
def test_outer(m, n, dtype):
    x, y = random(m, dtype=dtype), random(n, dtype=dtype)
    check(stand_ins.outer, np.outer(x, y), x, y)


@pytest.mark.parametrize("bounds", [(5,), (2, 9), (1, 10, 3)])
@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_arange(bounds, dtype):
    check(stand_ins.arange, np.arange(*bounds, dtype=dtype), *bounds, dtype=ms.dtype.__dict__[np.dtype(dtype).name])


@pytest.mark.parametrize("size", [(1,), (2, 3), [4]])
@pytest.mark.parametrize("value, dtype", [(3.5, np.float32), (2, np.int64)])
def test_full(size, value, dtype):
    check(stand_ins.full, np.full(size, value, dtype), size, value)


@pytest.mark.parametrize("dtype", [*FLOATS, np.int32])
@pytest.mark.parametrize("shape", [(3,), (2, 1, 4)])
def test_zeros_like_and_ones_like(shape, dtype):
    x = (random(*shape) * 9).astype(dtype)
    check(stand_ins.zeros_like, np.zeros_like(x), x)
    check(stand_ins.ones_like, np.ones_like(x), x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_randn_like(dtype):
    noise = stand_ins.randn_like(ms.Tensor(np.zeros((50, 100), dtype))).asnumpy()
    assert noise.shape == (50, 100) and noise.dtype == dtype
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 8)])
def test_gelu(shape, dtype, installed):
    x = random(*shape) * 3
    x.flat[:2] = -200, 200
    tanh_form = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    check(mint.nn.functional.gelu, tanh_form.astype(dtype), x.astype(dtype), approximate="tanh")
    check(mint.nn.functional.gelu, (0.5 * x * (1 + erf(x / np.sqrt(2)))).astype(dtype), x.astype(dtype))


@pytest.mark.parametrize("shape, axes", [((2, 8), 1), ((2, 3, 5), 1), ((2, 3, 5), 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(shape, axes, affine):
    x, over = random(*shape) * 2 + 1, tuple(range(-axes, 0))
    weight, bias = (random(*shape[-axes:]), random(*shape[-axes:])) if affine else (None, None)
    expected = (x - x.mean(over, keepdims=True)) / np.sqrt(x.var(over, keepdims=True) + 1e-6)
    if affine:
        expected = expected * weight + bias
    check(stand_ins.layer_norm, expected, x, shape[-axes:], weight, bias, 1e-6)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", [None, "bool", "added", "causal"])
@pytest.mark.parametrize("shape, keys", [((1, 2, 5, 4), 5), ((2, 3, 4, 8), 6)])
def test_scaled_dot_product_attention(shape, keys, mask, dtype):
    query, key, value = random(*shape), random(*shape[:2], keys, shape[3]), random(*shape[:2], keys, shape[3])
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(shape[-1])
    keep = np.tril(np.ones((shape[2], keys), bool))
    settings = {}
    if mask == "added":
        extra = random(shape[2], keys)
        scores, settings = scores + extra, {"attn_mask": ms.Tensor(extra.astype(dtype))}
    elif mask is not None:
        scores = np.where(keep, scores, -np.inf)
        settings = {"is_causal": True} if mask == "causal" else {"attn_mask": ms.Tensor(keep)}
    expected = (softmax(scores) @ value).astype(dtype)
    inputs = (x.astype(dtype) for x in (query, key, value))
    check(stand_ins.scaled_dot_product_attention, expected, *inputs, **settings)


@pytest.mark.parametrize("dim, length", [(8, 5), (12, 1)])
def test_get_1d_rotary_pos_embed(dim, length):
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    angles = np.repeat(angles, 2, 1)
    expected = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
    check(flux.get_1d_rotary_pos_embed, expected, dim, np.arange(length, dtype=np.float32))


def test_stand_ins_bear_the_names_of_what_they_stand_for():
    # MindSpore's parser finds a method by its function's name where other graphs were compiled before.
    assert all(getattr(owner, name).__name__ == name for owner, name, each in cpu.STAND_INS if callable(each))


def check_cell(cell, expected, *arguments):
    """Compares a cell, whose weights are random, with NumPy's result."""
    before = ms.get_context("mode")
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        got = cell(*map(ms.Tensor, arguments)).asnumpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5e-5)
    ms.set_context(mode=before)


def with_random_weights(cell, size=1):
    for parameter in cell.get_parameters():
        parameter.set_data(ms.Tensor(size * random(*parameter.shape)))
    return cell


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 8)])
def test_norm_cells(shape, installed):
    x = random(*shape)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    cell = with_random_weights(mint.nn.LayerNorm(8, eps=1e-6))
    check_cell(cell, expected * cell.weight.asnumpy() + cell.bias.asnumpy(), x)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    check_cell(stand_ins.normalization.RMSNorm(8, eps=1e-6, elementwise_affine=False), expected, x)
    cell = with_random_weights(stand_ins.normalization.RMSNorm(8, eps=1e-6, bias=True))
    check_cell(cell, expected * cell.weight.asnumpy() + cell.bias.asnumpy(), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 4, 8)])
def test_linear_cell(shape, bias, installed):
    cell, x = with_random_weights(mint.nn.Linear(8, 5, bias=bias)), random(*shape)
    check_cell(cell, x @ cell.weight.asnumpy().T + (cell.bias.asnumpy() if bias else 0), x)


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_embedding_cell(shape):
    cell, ids = mint.nn.Embedding(7, 5), RNG.integers(0, 7, shape).astype(np.int32)
    check_cell(cell, cell.weight.asnumpy()[ids], ids)


@pytest.mark.parametrize("padding, stride, bias", [(1, 1, True), (0, 2, False)])
def test_conv2d_cell(padding, stride, bias):
    cell, x = mint.nn.Conv2d(2, 3, 3, stride=stride, padding=padding, bias=bias), random(2, 2, 7, 5)
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    expected = np.einsum("bchwij,ocij->bohw", windows, cell.weight.asnumpy())
    if bias:
        expected = expected + cell.bias.asnumpy()[:, None, None]
    check_cell(cell, expected, x)


class Parts(nn.Cell):
    """A cell that returns several tensors, as one."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, x, emb):
        return ops.concat(tuple(part.reshape(x.shape[0], -1) for part in self.cell(x, emb=emb)), 1)


@pytest.mark.parametrize("kind, parts", [("AdaLayerNormZero", 6), ("AdaLayerNormZeroSingle", 3)])
def test_ada_layer_norm_cells(kind, parts, installed):
    cell = getattr(stand_ins.normalization, kind)(8)
    x, emb = random(2, 4, 8), random(2, 8)
    linear = (emb / (1 + np.exp(-emb))) @ cell.linear.weight.asnumpy().T + cell.linear.bias.asnumpy()
    shift, scale, *others = np.split(linear, parts, 1)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    normed = normed * (1 + scale[:, None]) + shift[:, None]
    check_cell(Parts(cell), np.concatenate([normed.reshape(2, -1), *others], 1), x, emb)


def test_ada_layer_norm_continuous_cell(installed):
    cell = stand_ins.normalization.AdaLayerNormContinuous(8, 8, elementwise_affine=False, eps=1e-6)
    x, emb = random(2, 4, 8), random(2, 8)
    scale, shift = np.split(linear(cell.linear, emb / (1 + np.exp(-emb))), 2, 1)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    check_cell(cell, normed * (1 + scale[:, None]) + shift[:, None], x, emb)
    shared = normed * (1 + scale[:1, None]) + shift[:1, None]
    check_cell(cell, shared, x, emb[:1])


def linear(cell, x):
    return x @ cell.weight.asnumpy().T + cell.bias.asnumpy()


def rms_norm(cell, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * cell.weight.asnumpy()


def rotate(x, cosine, sine):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = np.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
    return x * cosine[:, None] + turned * sine[:, None]


class Attend(nn.Cell):
    """Flux's attention as one tensor: text and image one after the other."""

    def __init__(self, attention, text):
        super().__init__()
        self.attention, self.text = attention, text

    def construct(self, x, cosine, sine):
        if self.text == 0:
            return self.attention(x, image_rotary_emb=(cosine, sine))
        image, text = self.attention(x[:, self.text :], x[:, : self.text], image_rotary_emb=(cosine, sine))
        return ops.concat((text, image), 1)


@pytest.mark.parametrize("text", [0, 3], ids=["single", "double"])
@pytest.mark.parametrize("batch, heads, length", [(1, 2, 8), (2, 3, 8), (1, 2, 75), (2, 2, 300)])
def test_flux_attention(batch, heads, length, text, installed):
    """Within a tile of the compiled kernel, over several, and shared among threads."""
    width = heads * 4
    settings = {"added_kv_proj_dim": width, "context_pre_only": False} if text else {"pre_only": True}
    cell = flux.transformer_flux.FluxAttention(
        query_dim=width, dim_head=4, heads=heads, out_dim=width, bias=True, eps=1e-6, **settings
    )
    with_random_weights(cell)
    x, cosine, sine = random(batch, length, width), random(length, 4), random(length, 4)

    def project(image, added):
        parts = [linear(added, x[:, :text])] if text else []
        return np.concatenate([*parts, linear(image, x[:, text:])], 1).reshape(batch, length, heads, 4)

    def normed(values, image, added):
        parts = [rms_norm(added, values[:, :text])] if text else []
        return np.concatenate([*parts, rms_norm(image, values[:, text:])], 1)

    added = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out")
    add_q, add_k, add_v, norm_add_q, norm_add_k, add_out = (getattr(cell, name, None) for name in added)
    query = rotate(normed(project(cell.to_q, add_q), cell.norm_q, norm_add_q), cosine, sine).swapaxes(1, 2)
    key = rotate(normed(project(cell.to_k, add_k), cell.norm_k, norm_add_k), cosine, sine).swapaxes(1, 2)
    value = project(cell.to_v, add_v).swapaxes(1, 2)
    attended = softmax(query @ key.swapaxes(-1, -2) / 2) @ value
    expected = attended.swapaxes(1, 2).reshape(batch, length, width)
    if text:
        expected = np.concatenate([linear(add_out, expected[:, :text]), linear(cell.to_out[0], expected[:, text:])], 1)
    check_cell(Attend(cell, text), expected, x, cosine, sine)


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 12, 80, 80)])
def test_group_norm_cell(shape, installed):
    cell, x = with_random_weights(mint.nn.GroupNorm(3, shape[1], eps=1e-6)), random(*shape)
    grouped = x.reshape(shape[0], 3, -1)
    channels = (1, -1, 1, 1)
    weight, bias = (each.asnumpy().reshape(channels) for each in (cell.weight, cell.bias))
    check_cell(cell, layer_norm(grouped).reshape(shape) * weight + bias, x)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def modulation(cell, emb, parts):
    return [part[:, None] for part in np.split(linear(cell.linear, emb / (1 + np.exp(-emb))), parts, 1)]


class Blocks(nn.Cell):
    """A block's streams as one tensor, text first."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def construct(self, image, text, temb, cosine, sine):
        return ops.concat(self.block(image, text, temb, (cosine, sine)), 1)


SIZES = [(2, 5, 3, 2, 4), (1, 40, 9, 2, 64), (3, 17, 50, 4, 32), (1, 500, 40, 2, 16)]
"""Samples, image and text tokens, heads and their width: in one piece, shared among threads, keys in several pieces."""


def block_inputs(batch, image, text, heads, width):
    streams = random(batch, image, heads * width), random(batch, text, heads * width)
    return (*streams, random(batch, heads * width), random(image + text, width), random(image + text, width))


@pytest.mark.parametrize("size", SIZES)
def test_double_block(size, installed):
    heads, width = size[3:]
    block = flux.transformer_flux.FluxTransformerBlock(heads * width, heads, width)
    with_random_weights(block, 0.8 / math.sqrt(heads * width))
    image, text, temb, cosine, sine = block_inputs(*size)
    modulations = [modulation(norm, temb, 6) for norm in (block.norm1, block.norm1_context)]
    normed = [layer_norm(x) * (1 + by[1]) + by[0] for x, by in zip((image, text), modulations)]
    outputs = block.attn(*map(ms.Tensor, normed), image_rotary_emb=(ms.Tensor(cosine), ms.Tensor(sine)))
    behind = []
    for x, a, by, feed_forward in zip((image, text), outputs, modulations, (block.ff, block.ff_context)):
        x = x + by[2] * a.asnumpy()
        wide = gelu_tanh(linear(feed_forward.net[0].proj, layer_norm(x) * (1 + by[4]) + by[3]))
        behind.append(x + by[5] * linear(feed_forward.net[2], wide))
    check_cell(Blocks(block), np.concatenate(behind[::-1], 1), image, text, temb, cosine, sine)


@pytest.mark.parametrize("size", SIZES)
def test_single_block(size, installed):
    heads, width = size[3:]
    block = flux.transformer_flux.FluxSingleTransformerBlock(heads * width, heads, width)
    with_random_weights(block, 0.8 / math.sqrt(heads * width))
    image, text, temb, cosine, sine = block_inputs(*size)
    x = np.concatenate([text, image], 1)
    shift, scale, gate = modulation(block.norm, temb, 3)
    normed = layer_norm(x) * (1 + scale) + shift
    attended = block.attn(ms.Tensor(normed), image_rotary_emb=(ms.Tensor(cosine), ms.Tensor(sine))).asnumpy()
    wide = np.concatenate([attended, gelu_tanh(linear(block.proj_mlp, normed))], 2)
    check_cell(Blocks(block), x + gate * linear(block.proj_out, wide), image, text, temb, cosine, sine)


@pytest.mark.parametrize("kind", ["FluxTransformerBlock", "FluxSingleTransformerBlock"])
def test_a_block_takes_one_modulation_vector_for_all_samples(kind, installed):
    block = with_random_weights(getattr(flux.transformer_flux, kind)(16, 2, 8), 0.2)
    image, text, temb, *rotary = block_inputs(2, 5, 3, 2, 8)
    shared = np.repeat(temb[:1], 2, 0)
    expected = Blocks(block)(*map(ms.Tensor, (image, text, shared, *rotary))).asnumpy()
    check_cell(Blocks(block), expected, image, text, temb[:1], *rotary)


class Divided(nn.Cell):
    """A double block, divided and put together again."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def construct(self, image, text, temb, cosine, sine):
        image, unfinished = transformer_flux_withFBCache.divided_double(
            self.block, image, text, temb, (cosine, sine), {}
        )
        text = blocks.behind_double(self.block.norm2_context, self.block.ff_context, *unfinished)
        return ops.concat((text, image), 1)


def test_a_divided_double_block_is_the_whole_one(installed):
    block = with_random_weights(flux.transformer_flux.FluxTransformerBlock(16, 2, 8), 0.2)
    inputs = block_inputs(2, 5, 3, 2, 8)
    whole = Blocks(block)(*map(ms.Tensor, inputs)).asnumpy()
    check_cell(Divided(block), whole, *inputs)


class Softened(mint.nn.LayerNorm):
    """A norm of the user's own."""

    def construct(self, input):
        return 0.5 * input


class Squared(stand_ins.activations.GELU):
    """An activation of the user's own, whose construct is mindone's."""

    def gelu(self, gate):
        return gate * gate


class Halved(nn.Cell):
    """A layer of another class."""

    def construct(self, x):
        return 0.5 * x


@ms.jit_class
class Unattended(flux.transformer_flux.FluxAttnProcessor):
    """An attention processor of the user's own."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **kwargs
    ):
        if encoder_hidden_states is None:
            return 0.5 * hidden_states
        return 0.5 * hidden_states, 2.0 * encoder_hidden_states


def doubled(cell, inputs, output):
    return 2 * output


def halved(self, hidden_states):
    return 0.5 * hidden_states


class WrittenOut(nn.Cell):
    """A block's equations, its layers called one by one."""

    def __init__(self, block, equations):
        super().__init__()
        self.block, self.equations = block, equations

    def construct(self, image, text, temb, cosine, sine):
        return self.equations(self.block, image, text, temb, (cosine, sine))


def double_equations(block, image, text, temb, rotary):
    image, unfinished = transformer_flux_withFBCache.double_equations(block, image, text, temb, rotary, {})
    text = blocks.behind_double_equations(block.norm2_context, block.ff_context, *unfinished)
    return ops.concat((text, image), 1)


def single_equations(block, image, text, temb, rotary):
    streams = ops.concat((text, image), 1)
    normed, gate = block.norm(streams, emb=temb)
    return flux.behind_single(block, streams, normed, block.attn(normed, image_rotary_emb=rotary), gate)


DOUBLE, SINGLE = "FluxTransformerBlock", "FluxSingleTransformerBlock"
EQUATIONS = {DOUBLE: double_equations, SINGLE: single_equations}
OWN = {
    "norm within norm1": (DOUBLE, lambda block: setattr(block.norm1, "norm", Softened(16, elementwise_affine=False))),
    "norm2": (DOUBLE, lambda block: setattr(block, "norm2", Softened(16, elementwise_affine=False))),
    "norm2_context": (DOUBLE, lambda block: setattr(block, "norm2_context", Softened(16, elementwise_affine=False))),
    "norm2 with weights": (DOUBLE, lambda block: setattr(block, "norm2", with_random_weights(mint.nn.LayerNorm(16)))),
    "ff": (DOUBLE, lambda block: setattr(block, "ff", Halved())),
    "ff_context": (DOUBLE, lambda block: setattr(block, "ff_context", Halved())),
    "ff's construct": (DOUBLE, lambda block: setattr(block.ff, "construct", MethodType(halved, block.ff))),
    "activation's form": (DOUBLE, lambda block: setattr(block.ff.net[0], "approximate", "none")),
    "activation's method": (DOUBLE, lambda block: block.ff.net.__setitem__(0, Squared(16, 64, "tanh"))),
    "final dropout": (DOUBLE, lambda block: block.ff_context.net.append(mint.nn.Dropout(0.5))),
    "processor": (DOUBLE, lambda block: setattr(block.attn, "processor", Unattended())),
    "one epsilon": (DOUBLE, lambda block: setattr(block.attn.norm_added_k, "eps", 0.5)),
    "hook": (DOUBLE, lambda block: block.attn.to_v.register_forward_hook(doubled)),
    "norm's epsilon": (SINGLE, lambda block: setattr(block.attn.norm_q, "eps", 0.5)),
    "act_mlp": (SINGLE, lambda block: setattr(block, "act_mlp", mint.nn.SiLU())),
    "act_mlp's form": (SINGLE, lambda block: setattr(block.act_mlp, "approximate", "none")),
    "a single block's processor": (SINGLE, lambda block: setattr(block.attn, "processor", Unattended())),
    "a single block's hook": (SINGLE, lambda block: block.proj_mlp.register_forward_hook(doubled)),
    "a single block's norm": (
        SINGLE,
        lambda block: setattr(block.norm, "norm", Softened(16, elementwise_affine=False)),
    ),
}
"""What may be the user's own within a block, and how it comes there."""


@pytest.mark.release
@pytest.mark.parametrize("own", OWN)
def test_what_is_the_users_own_in_a_block_is_run(own):
    kind, change = OWN[own]
    block = with_random_weights(getattr(flux.transformer_flux, kind)(16, 2, 8), 0.2)
    inputs = block_inputs(1, 5, 3, 2, 8)
    before = Blocks(block)(*map(ms.Tensor, inputs)).asnumpy()
    change(block)
    expected = WrittenOut(block, EQUATIONS[kind])(*map(ms.Tensor, inputs)).asnumpy()
    assert own == "final dropout" or np.abs(expected - before).max() > 1e-5
    check_cell(Blocks(block), expected, *inputs)


def test_a_users_method_on_a_class_is_run_and_stays(monkeypatch):
    block = with_random_weights(flux.transformer_flux.FluxTransformerBlock(16, 2, 8), 0.2)
    inputs = block_inputs(1, 5, 3, 2, 8)
    monkeypatch.setattr(stand_ins.attention.FeedForward, "construct", halved)
    cpu.install()
    assert stand_ins.attention.FeedForward.construct is halved
    expected = WrittenOut(block, double_equations)(*map(ms.Tensor, inputs)).asnumpy()
    check_cell(Blocks(block), expected, *inputs)


def attending_to_the_first(query, key, value, attn_mask=None, **_):
    """Attention of the user's own, (B, L, heads, d)."""
    return query + value[:, :1]


@pytest.mark.parametrize("kind", [DOUBLE, SINGLE])
def test_attention_of_the_users_own_is_run(kind, monkeypatch):
    inputs, stream = block_inputs(1, 5, 3, 2, 8), random(1, 5, 16)
    block = with_random_weights(getattr(flux.transformer_flux, kind)(16, 2, 8), 0.2)
    before = Blocks(block)(*map(ms.Tensor, inputs)).asnumpy()
    monkeypatch.setattr(flux.transformer_flux, "dispatch_attention_fn", attending_to_the_first)
    expected = WrittenOut(block, EQUATIONS[kind])(*map(ms.Tensor, inputs)).asnumpy()
    assert np.abs(expected - before).max() > 1e-3
    check_cell(Blocks(block), expected, *inputs)
    if kind == SINGLE:
        attended = block.attn(ms.Tensor(stream)).asnumpy()
        query = block.attn.norm_q(block.attn.to_q(ms.Tensor(stream)).reshape(1, 5, 2, 8)).asnumpy().reshape(1, 5, 16)
        np.testing.assert_allclose(attended, query + block.attn.to_v(ms.Tensor(stream)).asnumpy()[:, :1], rtol=1e-4)


class Other(flux.transformer_flux.FluxTransformerBlock):
    """A double block of the user's own."""

    def construct(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        return 0.5 * encoder_hidden_states, hidden_states + encoder_hidden_states[:, :1]


def other(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    return 0.5 * encoder_hidden_states, hidden_states + encoder_hidden_states[:, :1]


class Wrapped(nn.Cell):
    """A block within a layer of another class."""

    def __init__(self, block):
        super().__init__()
        self.inner = block

    def construct(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        text, image = self.inner(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        return 0.5 * text, 2.0 * image


class Mixed(nn.Cell):
    """An activation that sees the tokens together."""

    def construct(self, x):
        return x - x.mean(1, keep_dims=True)


OWN_BLOCKS = {
    "subclass": (1, lambda blocks, singles: blocks.__setitem__(0, Other(32, 2, 16))),
    "another class": (1, lambda blocks, singles: blocks.__setitem__(0, Wrapped(blocks[0]))),
    "construct": (1, lambda blocks, singles: setattr(blocks[0], "construct", MethodType(other, blocks[0]))),
    "act_mlp": (2, lambda blocks, singles: setattr(singles[0], "act_mlp", Mixed())),
}
"""How many blocks run before the span, and what makes one of them the user's own."""


@pytest.mark.parametrize("own", OWN_BLOCKS)
def test_a_block_of_the_users_own_before_the_span_is_not_divided(own):
    """The cached step's first call computes every block: it is mindone's transformer."""
    first, change = OWN_BLOCKS[own]
    transformer = flux.transformer_flux.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    with_random_weights(transformer, 0.2)
    ids = random(3, 3), random(5, 3)
    inputs = [ms.Tensor(x) for x in (random(1, 5, 4), random(1, 3, 8), random(1, 8), random(1), ids[1], ids[0])]
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    plain = transformer(*inputs)[0].asnumpy()
    change(transformer.transformer_blocks, transformer.single_transformer_blocks)
    transformer.compile_cache.clear()
    expected = transformer(*inputs)[0].asnumpy()
    context = CacheContext(1, 5, 32, text_len=3, config=CacheConfig(Fn_compute_blocks=first))
    step = CachedStep(transformer, context)
    names = "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"
    got = run_step(step, inputs[0], **dict(zip(names, inputs[1:])))
    ms.set_context(mode=before)
    assert np.abs(expected - plain).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_what_a_probe_cannot_look_at_is_named():
    block = flux.transformer_flux.FluxTransformerBlock(16, 2, 8)
    transformer = SimpleNamespace(transformer_blocks=[block], single_transformer_blocks=[])
    why_not_probed = transformer_flux_withFBCache.why_not_probed
    assert why_not_probed(transformer, "modulated") is None
    block.norm1 = Halved()
    assert "norm1, Halved, is not mindone's" in why_not_probed(transformer, "modulated")
    transformer.transformer_blocks = [Halved()]
    assert "Halved, has no norm1" in why_not_probed(transformer, "modulated")
    transformer.transformer_blocks = []
    assert "no double block" in why_not_probed(transformer, "modulated")
    assert why_not_probed(transformer, "latents") is None


class Call(nn.Cell):
    """An operator in a graph."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def construct(self, *inputs):
        return self.operator(*inputs)


ONE = np.float32(1)
MISFITS = {
    "linear": ((2, 8), (5, 7), (5,)),
    "layer_norm": ((2, 8), (2,)),
    "group_norm": ((2, 6, 3), (5,), (6,), (), ()),
    "relative_difference": ((2, 3, 8), (2, 4, 8)),
    "sinusoids": ((3, 1), (4,)),
    "weighted_sum_2": ((2, 3, 8), (), (), ()),
    "finite_differences_1": ((3, 8), (2, 3, 9), (), ()),
    "ada_layer_norm": ((2, 3, 8), (1, 8), (16, 8), (16,), ()),
    "timestep_embedding": ((2, 8), (6, 8), (6,), (4, 5), (4,)),
    "behind_double": ((1, 3, 8), (1, 3, 8), *[(1, 8)] * 3, (1, 7), (), (32, 8), (32,), (8, 32), (8,)),
}
"""A kernel's inputs, one of which does not fit the others."""


@pytest.mark.skipif(cpu_kernels.LINEAR is None, reason="no kernels")
@pytest.mark.parametrize("name", MISFITS)
def test_a_kernel_refuses_what_does_not_fit(name):
    shapes = MISFITS[name]
    operator = cpu_kernels.kernel(name, len(shapes))
    with pytest.raises(RuntimeError, match=rf"{name}: input \d is \("):
        Call(operator)(*[ms.Tensor(random(*shape)) for shape in shapes])


@pytest.mark.parametrize("kind", [DOUBLE, SINGLE])
@pytest.mark.parametrize("rows, width", [(7, 8), (9, 8), (8, 4)])
def test_a_block_refuses_a_rotary_table_for_others(kind, rows, width):
    block = getattr(flux.transformer_flux, kind)(16, 2, 8)
    inputs = random(1, 5, 16), random(1, 3, 16), random(1, 16), random(rows, width), random(rows, width)
    with pytest.raises(RuntimeError, match=r"input \d+ is \(\d.*not \((T\+S )?d\)"):
        Blocks(block)(*map(ms.Tensor, inputs))


@pytest.mark.parametrize("groups", [0, 4])
def test_groups_divide_the_channels(groups):
    inputs = random(2, 6, 3), random(6), random(6), groups * ONE, ONE
    with pytest.raises(RuntimeError, match=f"group_norm: {groups} groups of 6 channels"):
        cpu_kernels.GROUP_NORM(*map(ms.Tensor, inputs)).asnumpy()


class Doubled(nn.Cell):
    """A linear layer in another's place, as an adapter is."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def construct(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize("kind", ["FluxTransformerBlock", "FluxSingleTransformerBlock"])
def test_a_block_with_an_adapter_is_more_than_its_kernel(kind, installed):
    block = with_random_weights(getattr(flux.transformer_flux, kind)(16, 2, 8), 0.2)
    inputs = block_inputs(1, 5, 3, 2, 8)
    key = block.attn.to_k.weight, block.attn.to_k.bias
    layer, values = block.attn.to_k, [parameter.asnumpy().copy() for parameter in key]
    for parameter, value in zip(key, values):
        parameter.set_data(ms.Tensor(2 * value))
    expected = Blocks(block)(*map(ms.Tensor, inputs)).asnumpy()
    for parameter, value in zip(key, values):
        parameter.set_data(ms.Tensor(value))
    block.attn.to_k = Doubled(layer)
    check_cell(Blocks(block), expected, *inputs)


def test_timesteps_and_their_embedding(installed):
    times = np.concatenate([[0, 0.5, 1000, 3500], RNG.uniform(0, 1000, 300)]).astype(np.float32)
    angles = times[:, None] * (10000.0 ** (-np.arange(128, dtype=np.float32) / 128)).astype(np.float32)
    expected = np.concatenate([np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)], 1)
    projected = stand_ins.embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(ms.Tensor(times))
    # A frequency is off by rounding, and its angle by that times the time.
    assert (np.abs(projected.asnumpy() - expected) <= 2e-6 * (1 + times[:, None])).all()
    cell, x = with_random_weights(stand_ins.embeddings.TimestepEmbedding(8, 24), 0.3), random(3, 8)
    hidden = linear(cell.linear_1, x)
    check_cell(cell, linear(cell.linear_2, hidden / (1 + np.exp(-hidden))), x)


@pytest.mark.parametrize("shape", [(1, 4, 8), (2, 300, 64)])
def test_relative_difference(shape, installed):
    reference, probe = random(*shape), random(*shape)
    difference = relative_difference(ms.Tensor(reference), ms.Tensor(probe))
    expected = np.abs(reference - probe).mean(dtype=np.float64) / np.abs(reference).mean(dtype=np.float64)
    assert difference.shape == () and difference.asnumpy() == pytest.approx(expected, rel=1e-6)
    nothing = ms.Tensor(np.zeros(shape), ms.float32)
    assert not np.isfinite(relative_difference(nothing, ms.Tensor(probe)).asnumpy())


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 3, 8), (2, 300, 64)])
def test_differences_and_their_weighted_sum(shape, order, installed):
    """Those of every order against the equations that they stand for."""
    value, before = random(*shape), random(order + 1, *shape)
    gaps, weights = 1 + RNG.random(order).astype(np.float32), random(order + 1)
    for filled in range(order + 2):
        expected = [value]
        for each in range(order):
            difference = (expected[each] - before[each]) / gaps[each]
            expected.append(difference if each < filled else 0 * value)
        arguments = ms.Tensor(value), ms.Tensor(before), ms.Tensor(filled, ms.int32), tuple(map(ms.Tensor, gaps))
        differences = finite_differences(*arguments).asnumpy()
        np.testing.assert_allclose(differences, np.stack(expected), rtol=1e-6, atol=1e-6)
    # Plain reuse has no weight.
    expected = np.tensordot(weights, before, 1) if order else before[0]
    summed = weighted_sum(tuple(map(ms.Tensor, weights)), ms.Tensor(before)).asnumpy()
    np.testing.assert_allclose(summed, expected, rtol=1e-5, atol=1e-5)


class SeeImages(nn.Cell):
    """A double block's attention with image prompts: its three parts as one tensor."""

    def __init__(self, attention, processor, text):
        super().__init__()
        self.attention, self.processor, self.text = attention, processor, text
        processor.construct = processor.__call__

    def construct(self, x, *images):
        image, text, seen = self.processor(
            self.attention, x[:, self.text :], x[:, : self.text], None, None, ip_hidden_states=images
        )
        return ops.concat((text, image, seen), 1)


@pytest.mark.parametrize("batch, tokens, scales", [(1, (4,), [1.0]), (2, (4, 2), [0.5, 2.0])])
def test_flux_ip_adapter_attention(batch, tokens, scales):
    heads, text, length, width, seen = 3, 3, 8, 12, 0
    cell = flux.transformer_flux.FluxAttention(
        query_dim=width,
        dim_head=4,
        heads=heads,
        out_dim=width,
        added_kv_proj_dim=width,
        context_pre_only=False,
        bias=True,
        eps=1e-6,
    )
    processor = flux.transformer_flux.FluxIPAdapterAttnProcessor(width, 5, num_tokens=tokens, scale=scales)
    for each in (cell, processor):
        with_random_weights(each)
    x, images = random(batch, length, width), [random(batch, 1, count, 5) for count in tokens]

    def project(layer, values):
        return linear(layer, values).reshape(batch, -1, heads, 4).swapaxes(1, 2)

    query = rms_norm(cell.norm_q, project(cell.to_q, x[:, text:]))
    for index, (scale, image) in enumerate(zip(scales, images)):
        key, value = project(processor.to_k_ip[index], image), project(processor.to_v_ip[index], image)
        attended = softmax(query @ key.swapaxes(-1, -2) / 2) @ value
        seen = seen + scale * attended.swapaxes(1, 2).reshape(batch, -1, width)
    image, text_out = flux.flux_attention(processor, cell, ms.Tensor(x[:, text:]), ms.Tensor(x[:, :text]))
    expected = np.concatenate([text_out.asnumpy(), image.asnumpy(), seen], 1)
    check_cell(SeeImages(cell, processor, text), expected, x, *images)


@pytest.mark.parametrize("height, width", [(2, 3), (4, 4)])
def test_the_autoencoders_attention(height, width):
    cell = stand_ins.attention_processor.Attention(
        8, heads=2, dim_head=4, bias=True, residual_connection=True, _from_deprecated_attn_block=True
    )
    with_random_weights(cell)
    x = random(2, 8, height, width)
    tokens = x.reshape(2, 8, -1).swapaxes(1, 2)
    query, key, value = (
        linear(part, tokens).reshape(2, -1, 2, 4).swapaxes(1, 2) for part in (cell.to_q, cell.to_k, cell.to_v)
    )
    attended = (softmax(query @ key.swapaxes(-1, -2) / 2) @ value).swapaxes(1, 2).reshape(2, -1, 8)
    check_cell(cell, linear(cell.to_out[0], attended).swapaxes(1, 2).reshape(x.shape) + x, x)


def test_many_elements_are_shared_among_threads(installed):
    x = random(3, 100, 256)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    check_cell(mint.nn.LayerNorm(256), expected, x)
    layer = with_random_weights(mint.nn.Linear(256, 300))
    check_cell(layer, linear(layer, x / 16), x / 16)


def test_without_mindspores_onednn_linear_layers_are_its_own_operators(installed, monkeypatch):
    monkeypatch.setattr(cpu_kernels.ms, "__file__", "/nowhere/__init__.py")
    assert not cpu_kernels.has_products()
    monkeypatch.setattr(cpu_kernels, "LINEAR", None)
    layer, x = with_random_weights(mint.nn.Linear(8, 5)), random(3, 8)
    check_cell(layer, linear(layer, x), x)


def test_products_are_of_whichever_onednn_mindspore_brings_along(tmp_path, monkeypatch):
    (library,) = (Path(ms.__file__).parent / "lib").glob("libdnnl.so.[23]")
    for name in ("libdnnl.so.2", "libdnnl.so.3"):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "lib" / name).symlink_to(library)
        monkeypatch.setattr(cpu_kernels.ms, "__file__", str(tmp_path / name / "__init__.py"))
        assert cpu_kernels.has_products()


def test_what_is_no_number_stays_none(installed):
    x = np.full((2, 8), np.nan, np.float32)
    check_cell(mint.nn.LayerNorm(8), x, x)
    check(mint.nn.functional.gelu, x, x, approximate="tanh")


def test_int8_products_of_what_is_no_number_are_none():
    x = np.ones((2, 8), np.float32)
    x[0, 3] = np.nan
    weight, scale = ms.Tensor(np.ones((4, 8)), ms.int8), ms.Tensor(np.ones(4), ms.float32)
    products = stand_ins.int8_product(ms.Tensor(x), weight, scale).asnumpy()
    assert np.isnan(products[0]).all() and np.isfinite(products[1]).all()


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    said, compiler = [], tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'kernels.cc:9: fatal error: dlfcn.h: no such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(cpu_kernels.logger, "warning", said.append)
    assert cpu_kernels.compiled(str(compiler), tmp_path / "cache") is None
    assert len(said) == 1 and "dlfcn.h: no such file" in said[0]


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_that_works_there_are_no_kernels(compiler, tmp_path):
    assert cpu_kernels.compiled(compiler, tmp_path / "cache") is None
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(cpu_kernels.COMPILER is None, reason="no C++ compiler")
def test_the_kernels_are_compiled_once(tmp_path):
    library = cpu_kernels.compiled(cpu_kernels.COMPILER, tmp_path)
    assert cpu_kernels.compiled("false", tmp_path) == library and list(tmp_path.iterdir()) == [library]


def test_install_is_idempotent():
    before = [getattr(owner, name) for owner, name, _ in cpu.STAND_INS]
    cpu.install()
    assert before == [getattr(owner, name) for owner, name, _ in cpu.STAND_INS]


def test_nothing_is_installed_on_another_device(monkeypatch):
    monkeypatch.setattr(ms, "get_context", lambda key: "Ascend")
    monkeypatch.setattr(cpu, "install", lambda: pytest.fail("installed"))
    prepare_device()
