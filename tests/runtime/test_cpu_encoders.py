"""The stand-ins for text encoders and autoencoders against NumPy, run operator by operator."""

import numpy as np
import pytest
from mindone.diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageAttentionBlock

import mindspore as ms
from mindspore import mint

from FBCache_ms.runtime.cpu import encoders

pytestmark = pytest.mark.usefixtures("pynative")
RNG = np.random.default_rng(0)


@pytest.fixture
def pynative():
    """PYNATIVE_MODE, in which mindone's encoders run."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=mode)


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def same(tensor, expected):
    assert tensor.shape == expected.shape
    np.testing.assert_allclose(tensor.asnumpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_, np.complex64])
def test_a_clone_is_another_tensor(dtype):
    x = np.array([[1, 0, 1], [0, 1, 1]], dtype)
    tensor = ms.Tensor(x)
    clone = tensor.clone()
    tensor[0] = tensor[1]
    same(clone, x)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_masked_fill_changes_the_tensor_itself(dtype):
    x, mask = (9 * random(2, 3)).astype(dtype), random(2, 3) > 0
    tensor = ms.Tensor(x) + 0
    assert tensor.masked_fill_(ms.Tensor(mask), 1) is tensor
    same(tensor, np.where(mask, 1, x).astype(dtype))


def test_dropout():
    x = ms.Tensor(random(50, 50))
    for settings in ({"p": 0.0}, {"p": 0.5, "training": False}):
        assert mint.nn.functional.dropout(x, **settings) is x
    kept = mint.nn.functional.dropout(x, p=0.25, training=True).asnumpy()
    assert abs((kept == 0).mean() - 0.25) < 0.1
    np.testing.assert_allclose(kept[kept != 0], x.asnumpy()[kept != 0] / 0.75, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, sides", [((2, 3), (1, 2)), ((1, 2, 3, 4), (0, 1, 0, 1)), ((1, 2, 1, 3, 4), (1, 1, 2, 0, 2, 0))]
)
@pytest.mark.parametrize("value", [0, 1.5])
def test_pad(shape, sides, value):
    x, pairs = random(*shape), list(zip(sides[::2], sides[1::2]))[::-1]
    expected = np.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs, constant_values=value)
    same(mint.nn.functional.pad(ms.Tensor(x), list(sides), value=value), expected)


@pytest.mark.parametrize("dim, keepdim", [(-1, True), (1, False), (None, False)])
def test_norm(dim, keepdim):
    x = random(2, 3, 4)
    expected = np.asarray(np.sqrt((x * x).sum(dim, keepdims=keepdim)))
    same(mint.norm(ms.Tensor(x), dim=dim, keepdim=keepdim), expected)
    with pytest.raises(NotImplementedError, match="order 1 is not supported on CPU; 2 is"):
        mint.norm(ms.Tensor(x), 1)


@pytest.mark.parametrize("dim", [1, -1])
def test_normalize(dim):
    x = random(2, 3, 4)
    x[:, 0] = 0
    x[..., 0] = 0
    length = np.maximum(np.sqrt((x * x).sum(dim, keepdims=True)), 1e-12)
    same(mint.nn.functional.normalize(ms.Tensor(x), dim=dim), x / length)


@pytest.mark.parametrize("stride, padding", [((1, 1, 1), (0, 0, 0)), ((2, 1, 3), (1, 0, 2))])
@pytest.mark.parametrize("bias", [True, False])
def test_conv3d(stride, padding, bias):
    cell = mint.nn.Conv3d(2, 3, (3, 1, 2), stride=stride, padding=padding, bias=bias)
    x, weight = random(2, 2, 5, 4, 6), cell.weight.asnumpy()
    padded = np.pad(x, [(0, 0), (0, 0), *((side, side) for side in padding)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (2, 3, 4))
    windows = windows[:, :, :: stride[0], :: stride[1], :: stride[2]]
    expected = np.einsum("bcthwijk,ocijk->bothw", windows, weight)
    if bias:
        expected = expected + cell.bias.asnumpy().reshape(1, -1, 1, 1, 1)
    same(cell(ms.Tensor(x)), expected)


def test_each_frame_attends_to_itself():
    block = QwenImageAttentionBlock(8)
    x = random(2, 8, 3, 4, 5)
    rows = x.transpose(0, 2, 3, 4, 1).reshape(6, 20, 8)
    normed = rows / np.sqrt((rows * rows).sum(-1, keepdims=True)) * np.sqrt(8)
    layers = [(layer.weight.asnumpy()[:, :, 0, 0], layer.bias.asnumpy()) for layer in (block.to_qkv, block.proj)]
    query, key, value = np.split(normed @ layers[0][0].T + layers[0][1], 3, -1)
    scores = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(8))
    attended = scores / scores.sum(-1, keepdims=True) @ value @ layers[1][0].T + layers[1][1]
    same(block(ms.Tensor(x)), (rows + attended).reshape(2, 3, 4, 5, 8).transpose(0, 4, 1, 2, 3))


def test_every_stand_in_is_in_its_place():
    for owner, name, stand_in in encoders.STAND_INS:
        assert getattr(owner, name) is stand_in
